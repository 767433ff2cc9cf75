"""Finds LIBERO on this machine without its questions and downloads."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from perennial.errors import PerennialError, how_to_install
from perennial.storage.atomic import write_text
from perennial.suites._mujoco import choose_gl
from perennial.suites.base import package_folder

ASSETS = "PERENNIAL_LIBERO_ASSETS"
"""Environment variable that names the folder with LIBERO's meshes, textures and scenes."""

ROBOSUITE = "1.4.0"
"""The release that hf-libero declares."""
LAST_MUJOCO = "3.3.2"
"""Later releases draw LIBERO darker and lower success rates (LIBERO issues 87 and 88, pull request 140)."""

_KINDS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")


def package() -> Path:
    """The folder of LIBERO's files, found without importing it.

    Raises:
        PerennialError: it is not installed.
    """
    return package_folder("libero", "LIBERO", f"run {how_to_install('libero')}") / "libero"


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
        f"them once by `{_fetch(places[-1])}`."
    )


def _fetch(folder: Path) -> str:
    """The command that puts the assets into `folder`; unlike LIBERO's own it asks no question."""
    return f"hf download lerobot/libero-assets --repo-type dataset --local-dir {folder}"


def incomplete(error: Exception) -> PerennialError:
    """The error for a scene that could not be built; `error` names the file."""
    folder = assets()
    return PerennialError(
        f"LIBERO cannot build the scene from the assets in {folder} ({error}): complete that folder, which "
        f"`{_fetch(folder)}` does, or set {ASSETS} to another one."
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
