"""The installer, with every program that it calls replaced by one that only notes how it was called."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TOOLS = ["sh", "dirname", "uname", "env", "cat", "mkdir", "cp", "chmod"]

# A pretended Python: `-c` snippets answer as the files in $STATE say, `-m venv` makes a copy of itself.
PYTHON = """#!/bin/sh
echo "python $*" >>"$LOG"
refuses() { grep -qxF -- "$1" "$STATE/refuse" 2>/dev/null; }
case "$*" in
    *version_info*) ! refuses version ;;
    *"import ensurepip"*) ! refuses ensurepip ;;
    *"import torch"*) cat "$STATE/torch" 2>/dev/null ;;
    *"-m venv"*) for venv; do :; done; mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python" ;;
    *"-m pip --version"*) ! refuses pip ;;
    *"torch==2.13.0+cpu"*) ! refuses wheel ;;
    *"install -q uv"*) printf '#!/bin/sh\\necho "uv $*" >>"$LOG"\\n! grep -qxF uv "$STATE/refuse" 2>/dev/null\\n' \
        >.venv/bin/uv && chmod +x .venv/bin/uv ;;
    -) cat >/dev/null; ! refuses gl ;;
esac
"""
NOTE = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
"""


class Machine:
    """A checkout of the installer and a PATH on which nothing real can be installed."""

    def __init__(self, folder):
        self.root, self.state, self.bin = folder / "checkout", folder / "state", folder / "bin"
        for made in (self.root / "scripts", self.state, self.bin):
            made.mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.root / "scripts")
        for tool in [*TOOLS, "grep", "basename"]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.program("python3.11", PYTHON)
        self.program("id", "#!/bin/sh\necho 1000\n")

    def program(self, name, text=NOTE):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def refuse(self, *what):
        (self.state / "refuse").write_text("\n".join(what) + "\n")

    def run(self, *arguments, **environment):
        log = self.state / "log"
        log.write_text("")
        done = subprocess.run(
            [self.bin / "sh", self.root / "scripts/setup.sh", *arguments],
            env={"PATH": str(self.bin), "LOG": str(log), "STATE": str(self.state), **environment},
            cwd=self.state,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        return done, log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def installs(log):
    return [re.sub(r"^python -m pip install -q (-c constraints.txt )?", "", line) for line in log if "install" in line]


EVERYTHING = "-e .[vla,metaworld,kitchen,tensorboard,dev]"


def test_the_cpu_wheel_comes_first_and_then_everything_else(machine):
    done, log = machine.run()
    assert done.returncode == 0
    assert installs(log) == ["torch==2.13.0+cpu", EVERYTHING]
    assert all("-c constraints.txt" in line for line in log if "pip install" in line)


@pytest.mark.parametrize("simulator", ["libero", "maniskill"])
def test_a_simulator_that_cannot_live_there_gets_an_environment_of_its_own(machine, simulator):
    done, log = machine.run(simulator)
    assert done.returncode == 0
    everything = {"libero": "-e .[vla,libero,metaworld,dev]", "maniskill": "-e .[vla,maniskill,dev]"}[simulator]
    assert installs(log)[:2] == ["torch==2.13.0+cpu", everything]
    assert ("python -m pip uninstall -q --yes torchvision" in log) == (simulator == "libero")
    assert (machine.root / f".venv-{simulator}/bin/python").exists()
    assert not (machine.root / ".venv").exists()
    assert f".venv-{simulator} is ready; next: .venv-{simulator}/bin/perennial doctor" in done.stderr


def test_a_gpu_gets_the_default_build(machine):
    machine.program("nvidia-smi")
    _, log = machine.run()
    assert installs(log) == ["torch==2.13.0", EVERYTHING]


def test_a_driver_without_a_gpu_gets_the_cpu_build(machine):
    machine.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    _, log = machine.run()
    assert installs(log)[0] == "torch==2.13.0+cpu"


def test_uv_brings_the_cpu_build_where_no_wheel_is_at_hand(machine):
    machine.refuse("wheel")
    done, log = machine.run()
    assert done.returncode == 0
    uv = "uv pip install -q --python .venv/bin/python -c constraints.txt --torch-backend=cpu torch==2.13.0"
    assert installs(log) == ["torch==2.13.0+cpu", "uv", uv, EVERYTHING]


def test_the_cuda_build_is_the_last_resort_and_says_so(machine):
    machine.refuse("wheel", "uv")
    done, log = machine.run()
    assert done.returncode == 0
    assert installs(log)[-2:] == ["torch==2.13.0", EVERYTHING]
    assert "brings several GB of CUDA" in done.stderr


def test_a_second_run_keeps_the_environment_and_torch(machine):
    machine.run()
    (machine.state / "torch").write_text("2.13.0\n")
    done, log = machine.run()
    assert done.returncode == 0
    assert installs(log) == [EVERYTHING]
    assert not any("venv" in line for line in log)


def test_an_environment_that_was_left_half_made_is_made_anew(machine):
    machine.run()
    machine.refuse("pip")
    _, log = machine.run()
    assert "python -m venv --clear .venv" in log


@pytest.mark.parametrize("name", ["python3.12", "python3.13", "python3", "python"])
def test_any_python_that_fits_is_found(machine, name):
    (machine.bin / "python3.11").rename(machine.bin / name)
    assert machine.run()[0].returncode == 0


def test_no_fitting_python_is_one_sentence(machine):
    machine.refuse("version")
    done, log = machine.run()
    assert done.returncode == 1
    assert "No Python 3.11, 3.12 or 3.13 was found" in done.stderr
    assert installs(log) == []


def test_a_named_python_is_taken_or_refused_by_name(machine):
    machine.program("mine", PYTHON)
    (machine.bin / "python3.11").unlink()
    assert machine.run(PYTHON="mine")[0].returncode == 0
    shutil.rmtree(machine.root / ".venv")
    done, _ = machine.run(PYTHON="/no/such/python")
    assert done.returncode == 1
    assert "PYTHON=/no/such/python is not" in done.stderr


def test_debian_without_ensurepip_is_told_the_package(machine):
    machine.refuse("ensurepip")
    done, log = machine.run()
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr
    assert installs(log) == []


def test_a_missing_gl_library_is_installed_by_root(machine):
    machine.refuse("gl")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("apt-get", NOTE + ': >"$STATE/refuse"\n')
    done, log = machine.run()
    assert [line for line in log if line.startswith("apt-get")] == [
        "apt-get -q update",
        "apt-get -q install -y --no-install-recommends libosmesa6",
    ]
    assert "OpenGL" not in done.stderr


@pytest.mark.parametrize("apt", [None, NOTE, "#!/bin/sh\nexit 100\n"])
def test_a_missing_gl_library_that_cannot_be_installed_is_a_sentence(machine, apt):
    machine.refuse("gl")
    if apt:
        machine.program("id", "#!/bin/sh\necho 0\n")
        machine.program("apt-get", apt)
    done, _ = machine.run()
    assert done.returncode == 0
    assert "apt-get install libosmesa6" in done.stderr


def test_nothing_is_installed_system_wide_without_root(machine):
    machine.refuse("gl")
    machine.program("apt-get")
    machine.program("sudo", "#!/bin/sh\nexit 1\n")
    _, log = machine.run()
    assert not any(line.startswith("apt-get") for line in log)


def test_a_browser_that_is_there_is_left_alone(machine):
    machine.program("chromium")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("apt-get")
    done, log = machine.run("browser")
    assert (done.returncode, log) == (0, [])


@pytest.mark.parametrize(("user", "apt"), [("0", NOTE), ("0", "#!/bin/sh\nexit 100\n"), ("1000", NOTE)])
def test_a_missing_browser_never_fails(machine, user, apt):
    machine.program("id", f"#!/bin/sh\necho {user}\n")
    machine.program("apt-get", apt)
    done, log = machine.run("browser")
    assert done.returncode == 0
    assert (log == ["apt-get -q update", "apt-get -q install -y --no-install-recommends chromium"]) == (
        (user, apt) == ("0", NOTE)
    )
    assert ("browser tests are skipped" in done.stderr) == ((user, apt) != ("0", NOTE))


def test_an_interpreter_of_the_real_machine_fits():
    """The version question itself, asked of the Python that runs this test and of a pretended older one."""
    question = re.search(r"-c '(import sys; .*?)'", (ROOT / "scripts/setup.sh").read_text()).group(1)
    assert subprocess.run([sys.executable, "-c", question], check=False).returncode == 0
    for old in ((3, 10), (3, 14), (2, 7)):
        pretended = question.replace("sys.version_info", f"{(*old, 0)}")
        assert subprocess.run([sys.executable, "-c", pretended], check=False).returncode == 1


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements}


def declared():
    """The requirements that `make setup` installs: those of the package and of the extras that the script names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chosen = re.search(r"^EXTRAS=([\w,]+)$", (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)[1].split(",")
    extras = [text for name in chosen for text in project["optional-dependencies"][name]]
    return [Requirement(text) for text in project["dependencies"] + extras]


def test_every_constraint_is_an_exact_release():
    for name, specifier in pins().items():
        (only,) = specifier
        assert only.operator == "==", name
        assert "+" not in only.version, name
        assert "*" not in only.version, name


def test_the_pins_satisfy_what_is_declared():
    pinned = pins()
    for requirement in declared():
        (only,) = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(only.version), requirement


def test_the_extra_of_libero_lives_with_the_pins_and_leaves_them_alone():
    """It would bring torchvision, so it has an environment of its own; both simulators accept one MuJoCo."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    for requirement in map(Requirement, project["optional-dependencies"]["libero"]):
        if requirement.name in pinned:
            (only,) = pinned[requirement.name]
            assert requirement.specifier.contains(only.version), requirement
    assert not {canonicalize_name(r.name) for r in declared()} & {"hf-libero", "robosuite"}


def test_torch_is_the_release_that_the_installer_puts_first():
    (only,) = pins()["torch"]
    assert f"TORCH={only.version}\n" in (ROOT / "scripts/setup.sh").read_text()


def test_everything_that_is_pulled_in_is_pinned():
    """Closure over the installed distributions; a CUDA build of torch pulls in more, which torch pins itself."""
    pinned, waiting, seen = pins(), declared(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(name)
        assert name in pinned, name
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(one) for one in environments):
                waiting.append(needed)
    assert {"torch", "numpy", "mujoco"} <= seen


def test_packages_that_would_bring_another_torch_are_absent():
    assert not {"torchvision", "timm", "perennial"} & pins().keys()


def test_ci_runs_the_tests_from_anywhere(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout/.ci")
    (tmp_path / "checkout/Makefile").write_text("test:\n\t@pwd\n\t@exit 3\n")
    done = subprocess.run(
        [tmp_path / "checkout/.ci/run"], cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert Path(done.stdout.splitlines()[0]).samefile(tmp_path / "checkout")
    assert done.returncode != 0
