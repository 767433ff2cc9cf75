"""Finds the Vulkan driver that ManiSkill needs, even where nothing is drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path

from perennial.errors import PerennialError

INSTALL = "apt-get install -t bookworm-backports mesa-vulkan-drivers libvulkan1"
"""Debian 12; Debian 13 has it without backports."""

_DRIVERS = "VK_ICD_FILENAMES"
_FOLDER = Path("/usr/share/vulkan/icd.d")
_LOCAL = Path("/etc/vulkan/icd.d")
_GPU = Path("/dev/nvidia0")
_OLDEST = (1, 4)
"""Vulkan of Mesa 25. That of Mesa 22 (1.3) was seen to fail: it lacks extensions that SAPIEN asks for."""


def renderer() -> str:
    """ManiSkill's name of where pictures are drawn: an NVIDIA GPU with its Vulkan driver, else the processor.

    Containers often have the GPU without that driver. Who names a driver in VK_ICD_FILENAMES has chosen.
    """
    named = os.environ.get(_DRIVERS)
    drivers = [named] if named else [path.name for folder in (_FOLDER, _LOCAL) for path in folder.glob("*.json")]
    return "gpu" if _GPU.exists() and any("nvidia" in driver for driver in drivers) else "cpu"


def no_vulkan(reason: object) -> PerennialError:
    """The error for a machine without a Vulkan driver that ManiSkill can use."""
    return PerennialError(
        f"ManiSkill finds no Vulkan driver that it can use ({reason}): install Mesa 25 or newer, on Debian 12 "
        f"`{INSTALL}`, or name the driver's file in {_DRIVERS}."
    )


def software_driver() -> str:
    """The software Vulkan driver of Mesa (lavapipe): its file and version, as in "lvp_icd.json, Vulkan 1.4.305".

    Raises:
        PerennialError: there is none, or it is too old.
    """
    named = os.environ.get(_DRIVERS)
    files = [Path(name) for name in named.split(os.pathsep)] if named else sorted(_FOLDER.glob("lvp_icd*.json"))
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise no_vulkan(f"{_DRIVERS}={named}" if named else f"no lvp_icd*.json in {_FOLDER}")
    version = str(json.loads(found.read_text())["ICD"]["api_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise no_vulkan(f"{found} is of Vulkan {version}")
    return f"{found.name}, Vulkan {version}"


def prepare() -> None:
    """Keep software drawing to one thread of each worker and to Mesa's driver, unless the user chose otherwise."""
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if renderer() == "cpu" and _DRIVERS not in os.environ:
        files = sorted(map(str, _FOLDER.glob("lvp_icd*.json")))
        if files:
            os.environ[_DRIVERS] = os.pathsep.join(files)
