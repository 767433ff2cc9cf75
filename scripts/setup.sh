#!/bin/sh
# `setup.sh` makes .venv and installs everything into it; `setup.sh libero` and `setup.sh maniskill` make .venv-libero and
# .venv-maniskill for a simulator that cannot live there; `setup.sh browser` installs Chromium for the browser tests where
# that is possible. All are safe to repeat and to interrupt.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
EXTRAS=vla,metaworld,kitchen,tensorboard,dev
NEXT="make demo"
TORCH=2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
stop() { say "$*"; exit 1; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || stop "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13; name another one."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "No Python 3.11, 3.12 or 3.13 was found; install one, or name it: make setup PYTHON=/path/to/python3.11"
}

make_venv() {
    if [ -x "$VENV/bin/python" ] && fits "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
    "$python" -m venv --clear "$VENV"
}

pip() { "$VENV/bin/python" -m pip "$@"; }

# The CPU build is a tenth of the CUDA build's size, so it is tried first where there is no NVIDIA GPU.
install_torch() {
    if [ "$("$VENV/bin/python" -c 'import torch; print(torch.__version__.partition("+")[0])' 2>/dev/null)" = "$TORCH" ]; then
        return
    fi
    say "Installing torch $TORCH."
    if nvidia-smi >/dev/null 2>&1; then
        pip install -q -c constraints.txt "torch==$TORCH"
    elif pip install -q -c constraints.txt "torch==$TORCH+cpu" 2>/dev/null; then
        :
    elif pip install -q uv &&
        "$VENV/bin/uv" pip install -q --python "$VENV/bin/python" -c constraints.txt --torch-backend=cpu "torch==$TORCH"; then
        :
    else
        say "The CPU build of torch could not be had; installing the default build, which brings several GB of CUDA."
        pip install -q -c constraints.txt "torch==$TORCH"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

may_apt() { command -v apt-get >/dev/null && as_root true 2>/dev/null; }

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@" </dev/null
}

has_gl() {
    [ "$(uname)" = Linux ] || return 0
    "$VENV/bin/python" - <<'PYTHON'
import ctypes

def loads(*names):
    try:
        return all(ctypes.CDLL(name) for name in names)
    except OSError:
        return False

raise SystemExit(not any([loads("libOSMesa.so.8"), loads("libOSMesa.so"), loads("libEGL.so.1", "libOpenGL.so.0")]))
PYTHON
}

install_gl() {
    has_gl && return
    if may_apt && as_root apt-get -q update && apt_install libosmesa6 && has_gl; then
        return
    fi
    say "No OpenGL library was found, so simulators cannot draw; on Debian and Ubuntu: apt-get install libosmesa6"
}

install_browser() {
    for candidate in chromium chromium-browser google-chrome; do
        if command -v "$candidate" >/dev/null; then
            return
        fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get -q update && apt_install chromium; } >/dev/null 2>&1 && return
    fi
    say "Chromium was not found; the browser tests are skipped."
}

case "${1:-}" in
    browser) install_browser; exit ;;
    libero) VENV=.venv-libero EXTRAS=vla,libero,metaworld,dev NEXT=".venv-libero/bin/perennial doctor" ;;
    maniskill) VENV=.venv-maniskill EXTRAS=vla,maniskill,dev NEXT=".venv-maniskill/bin/perennial doctor" ;;
esac
make_venv
install_torch
say "Installing everything else."
pip install -q -c constraints.txt -e ".[$EXTRAS]"
# hf-libero brings the default build of torchvision, which nothing needs and beside which transformers fails on CPU torch.
if [ "${1:-}" = libero ]; then
    pip uninstall -q --yes torchvision
fi
install_gl
say "$VENV is ready; next: $NEXT"
