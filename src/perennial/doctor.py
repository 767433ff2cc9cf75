"""Looks at this machine before a run does: what is installed, what works, and what to do about the rest.

Facts are gathered in `diagnose`; every judgement is a small function of facts, so the rules can be read and tested one
by one. A missing extra is a warning, because another suite or policy may not need it; a broken one is a problem.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perennial import discovery, machine
from perennial.errors import how_to_install
from perennial.suites.base import Suite

Status = Literal["ok", "warning", "problem"]
GIGABYTE = 10**9
PROBE_SECONDS = 120
LIBRARIES = (
    "perennial",
    "torch",
    "numpy",
    "transformers",
    "peft",
    "gymnasium",
    "mujoco",
    "metaworld",
    "gymnasium-robotics",
    "hf-libero",
    "robosuite",
    "robocasa",
    "mani_skill",
    "sapien",
)
"""What a run's numbers depend on, as far as it is installed."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: "ok"; "warning", it limits or slows runs; "problem", runs will fail.
        finding: what was found, with its value.
        fix: what to do, empty when there is nothing to do.
    """

    name: str
    status: Status
    finding: str
    fix: str = ""


@dataclass(frozen=True)
class Probe:
    """What came of running code in another process: whether it succeeded, and its last line."""

    succeeded: bool
    said: str


def python_check(version: str) -> Check:
    """Python 3.11 to 3.13, the versions that Meta-World and torch both support."""
    if Version("3.11") <= Version(version) < Version("3.14"):
        return Check("Python", "ok", version)
    return Check("Python", "problem", version, "Make the environment with Python 3.11, 3.12 or 3.13.")


def library_check(name: str, installed: str | None, required: Requirement, extra: str = "") -> Check:
    """A library against the range that this package declares."""
    fix = how_to_install(extra)
    if installed is None:
        return Check(name, "warning" if extra else "problem", "not installed", fix)
    if not required.specifier.contains(installed, prereleases=True):
        return Check(name, "problem", f"{installed}, outside {required.specifier}", fix)
    return Check(name, "ok", installed)


def compute_check(threads: int, gpu: str | None, nvidia: bool) -> Check:
    """What torch computes on; `nvidia` says that the machine has an NVIDIA driver."""
    if gpu:
        return Check("compute", "ok", gpu)
    if nvidia:
        fix = "Install a CUDA build of torch that fits the driver."
        return Check("compute", "warning", f"{threads} CPU threads; torch does not see the NVIDIA GPU", fix)
    return Check("compute", "ok", f"{threads} CPU threads, no GPU")


def mujoco_check(installed: str | None, metaworld: bool) -> Check:
    """MuJoCo against the releases whose pictures and physics published numbers belong to.

    LIBERO's numbers belong to 3.2.7-3.3.2 (LIBERO issues 87 and 88, pull request 140): later releases draw darker
    floors, and from 3.4 on libero_spatial's task 5 breaks at reset (RLinf issue 1460, LeRobot issue 4390). Meta-World
    3.1.1 pins 3.3.0.
    """
    fix = "In a fresh environment: pip install 'mujoco==3.3.0'"
    if installed is None:
        return Check("MuJoCo", "warning", "not installed", how_to_install("metaworld"))
    version = Version(installed)
    if version >= Version("4"):
        return Check("MuJoCo", "problem", f"{installed}; suites written for MuJoCo 3 stop with errors", fix)
    if version >= Version("3.4"):
        return Check("MuJoCo", "problem", f"{installed}; LIBERO breaks at reset from 3.4 on", fix)
    if version > Version("3.3.2"):
        return Check("MuJoCo", "warning", f"{installed} draws darker than 3.3.2 and lowers success rates", fix)
    if version < Version("3.2.7"):
        return Check("MuJoCo", "warning", f"{installed} is older than any release that numbers are known for", fix)
    if metaworld and version != Version("3.3.0"):
        return Check("MuJoCo", "warning", f"{installed}, but Meta-World's numbers belong to 3.3.0", fix)
    return Check("MuJoCo", "ok", installed)


def render_check(probe: Probe) -> Check:
    """A frame that was really drawn in another process."""
    if probe.succeeded:
        return Check("rendering", "ok", probe.said)
    fix = "On Debian and Ubuntu: apt-get install libosmesa6; then MUJOCO_GL=osmesa perennial doctor"
    return Check("rendering", "problem", probe.said, fix)


def memory_check(free: int) -> Check:
    """At least 4 GB of memory free, given in bytes."""
    if free < 4 * GIGABYTE:
        fix = "Close other programs, or run with fewer workers."
        return Check("memory", "warning", f"{free / GIGABYTE:.1f} GB free; a run wants 4 GB", fix)
    return Check("memory", "ok", f"{free / GIGABYTE:.1f} GB free")


def disk_check(free: int, folder: Path) -> Check:
    """At least 2 GB of disk free where runs are written, given in bytes."""
    finding = f"{free / GIGABYTE:.1f} GB free at {folder}"
    if free < 2 * GIGABYTE:
        return Check("disk", "warning", f"{finding}; a run wants 2 GB", "Make room, or write runs to another disk.")
    return Check("disk", "ok", finding)


def processor_check(cores: int, load: float) -> Check:
    """Cores that nobody else is using; `load` is the mean number of runnable processes over a minute."""
    finding = f"{cores} cores, load {load:.1f}"
    if load > cores:
        return Check("processor", "warning", f"{finding}: other programs compete", "Expect timings to be longer.")
    return Check("processor", "ok", finding)


def runs_check(folder: Path) -> Check:
    """Run folders can be written: a file is made in `folder`, or in its nearest parent that exists, and removed."""
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check("runs folder", "ok", f"{folder.resolve()} can be written")
    except OSError as error:
        fix = "Change to a folder that you may write, or name one for the run."
        return Check("runs folder", "problem", f"{existing.resolve()} cannot be written ({error.strerror})", fix)


def suite_checks() -> list[Check]:
    """What each suite says about its own simulator; a suite that cannot be imported is a problem of its own."""
    checks: list[Check] = []
    for name in discovery.names("suites"):
        try:
            checks += discovery.find("suites", name, Suite)().doctor()
        except Exception as error:
            fix = "Update or remove the package that provides it."
            checks.append(Check(f"suite {name}", "problem", f"{type(error).__name__}: {error}", fix))
    return checks


def nearest_existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, read without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared(distribution: str) -> Requirement:
    """The range of `distribution` that this package declares, extras included."""
    declarations = map(Requirement, importlib.metadata.requires("perennial") or [])
    return next(requirement for requirement in declarations if requirement.name == distribution)


def gpu_name() -> str | None:
    """Name and memory of the GPU that torch would use, if any."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / GIGABYTE:.0f} GB"


def probe(code: str, seconds: float = PROBE_SECONDS) -> Probe:
    """Run Python code in another process, because a crash inside a graphics library kills the process it is in."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(False, f"no answer within {seconds:.0f} s")
    if done.returncode < 0:
        return Probe(False, f"crashed with {signal.Signals(-done.returncode).name}")
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return Probe(done.returncode == 0, lines[-1] if lines else "nothing was said")


DRAW = """
import os
import numpy as np
from perennial.errors import PerennialError
from perennial.suites._mujoco import render_check
try:
    picture = render_check()
except PerennialError as error:
    raise SystemExit(str(error))
backend = os.environ.get("MUJOCO_GL", "the default back end")
if len(np.unique(picture.reshape(-1, 3), axis=0)) < 2:
    raise SystemExit(f"{backend} draws an empty picture")
print(f"{backend} draws")
"""


def diagnose(runs: Path = Path("runs")) -> list[Check]:
    """Look at everything; takes some ten seconds.

    Args:
        runs: the folder that runs would be written to.
    """
    import torch

    metaworld, mujoco = installed_version("metaworld"), installed_version("mujoco")
    checks = [
        python_check(platform.python_version()),
        library_check("torch", torch.__version__, declared("torch")),
        compute_check(torch.get_num_threads(), gpu_name(), shutil.which("nvidia-smi") is not None),
        *(library_check(name, installed_version(name), declared(name), "vla") for name in ("transformers", "peft")),
        mujoco_check(mujoco, metaworld is not None),
    ]
    if mujoco:
        checks.append(render_check(probe(DRAW)))
    checks += [
        *suite_checks(),
        memory_check(machine.free_memory()),
        disk_check(shutil.disk_usage(nearest_existing(runs)).free, nearest_existing(runs)),
        processor_check(os.cpu_count() or 1, os.getloadavg()[0]),
        runs_check(runs),
    ]
    return checks


def describe_machine() -> dict[str, str | int | None]:
    """Versions and hardware that a run's numbers were made with; nothing that changes by the hour."""
    import psutil
    import torch

    return {
        "python": platform.python_version(),
        **{name: version for name in LIBRARIES if (version := installed_version(name)) is not None},
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / GIGABYTE),
        "gpu": gpu_name(),
        "torch_threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The processor's name as sold, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def print_report(checks: list[Check], console: Console) -> None:
    """Print one line a check, what to do under it where something is to be done, and a sentence at the end."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(Text(check.status, styles[check.status]), Text(check.name), Text(check.finding))
        if check.fix:
            table.add_row("", "", Text(f"-> {check.fix}", "dim"))
    console.print(table)
    count = {status: sum(check.status == status for check in checks) for status in styles}
    verdict = "Not ready" if count["problem"] else "Ready"
    console.print(f"{verdict}: {count['ok']} ok, {count['warning']} warnings, {count['problem']} problems.")
