"""What every test may rely on: one thread, deterministic torch, a clean environment, and honest skips."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

from perennial import doctor, experiment
from perennial.config import Config
from perennial.testing.toy import ToyPolicy
from toyhouse.runs import toy_config

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@functools.cache
def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@functools.cache
def missing_for_simulator() -> str:
    for distribution in ("mujoco", "metaworld"):
        if doctor.installed_version(distribution) is None:
            return f"{distribution} is not installed"
    drawn = doctor.probe(doctor.DRAW)
    return "" if drawn.succeeded else f"MuJoCo cannot draw here: {drawn.said}"


def missing_for_browser() -> str:
    return "" if chromium_path() else "Chromium is not installed"


@pytest.hookimpl(trylast=True)  # after deselection, so that nothing is probed for tests that do not run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, missing in (("simulator", missing_for_simulator), ("browser", missing_for_browser)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else ""
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the caller, or of a `make` above, reaches a test; torch starts anew, on one thread."""
    for name in os.environ:
        if name.startswith(("PERENNIAL_", "MAKE", "MFLAGS")):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # learning in an earlier test took every core


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes most of the time of a toy run."""
    monkeypatch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")


@pytest.fixture
def chromium() -> str:
    """Path of a Chromium that can run headless; mark the test `browser`."""
    path = chromium_path()
    assert path is not None
    return path


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base checkpoint of the toy policy."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    ToyPolicy(0).save(folder)
    return folder


@pytest.fixture(scope="module")
def config(toy_checkpoint: Path) -> Config:
    """Two toy tasks and one held out, played in this process."""
    return toy_config(toy_checkpoint)


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of `config`, which tests leave as it is."""
    return experiment.start(config, "toy", tmp_path_factory.mktemp("runs") / "toy")
