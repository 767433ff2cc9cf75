"""Finds LIBERO on this machine without its questions and downloads."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from perennial.errors import PerennialError, how_to_install
from perennial.storage.atomic import write_text
from perennial.suites._mujoco import choose_gl

ASSETS = "PERENNIAL_LIBERO_ASSETS"
"""Environment variable that names the folder with LIBERO's meshes, textures and scenes."""

_KINDS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")


def package() -> Path:
    """The folder of LIBERO's files, found without importing it.

    Raises:
        PerennialError: it is not installed.
    """
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise PerennialError(f"LIBERO is not installed; run {how_to_install('libero')}.")
    return Path(next(iter(found.submodule_search_locations))) / "libero"


def assets() -> Path:
    """The folder of the assets: the one that `ASSETS` names, else the package's, else where LIBERO keeps downloads.

    Raises:
        PerennialError: no such folder is complete.
    """
    named = os.environ.get(ASSETS)
    usual = (package() / "assets", Path.home() / ".cache" / "libero" / "assets")
    places = (Path(named).expanduser().absolute(),) if named else usual
    for place in places:
        if all((place / kind).is_dir() for kind in _KINDS):
            return place
    raise PerennialError(
        f"LIBERO's assets are not in {' or '.join(map(str, places))}: set {ASSETS} to a folder that has them, or fetch "
        "them once by `python -c 'from libero.libero.utils.download_utils import *; "
        "download_assets_from_huggingface()'`."
    )


def prepare() -> None:
    """Make `import libero` ask nothing and download nothing, and choose how to draw.

    LIBERO asks on standard input where its files are unless a config.yaml says so. Where the user has none, it gets one
    in a folder of Perennial's.

    Raises:
        PerennialError: LIBERO, its assets or an OpenGL library is missing.
    """
    folder, found = package(), assets()
    choose_gl()
    chosen = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if not (chosen / "config.yaml").is_file():
        os.environ["LIBERO_CONFIG_PATH"] = str(_write_config(folder, found))
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it advises to edit its own installation
    import libero.libero

    libero.libero._assets_path_cache = str(found)


def _write_config(folder: Path, found: Path) -> Path:
    """Write our config.yaml, of which JSON is a part, if it is not as it should be; returns its folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perennial" / "libero"
    entries: dict[str, Any] = {"benchmark_root": folder, "bddl_files": folder / "bddl_files"}
    entries |= {"init_states": folder / "init_files", "datasets": folder.parent / "datasets", "assets": found}
    content = json.dumps({name: str(path) for name, path in entries.items()}, indent=2) + "\n"
    config = cache / "config.yaml"
    if not config.is_file() or config.read_text() != content:
        cache.mkdir(parents=True, exist_ok=True)
        write_text(config, content)
    return cache
