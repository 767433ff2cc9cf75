"""Where the tests find LIBERO's meshes and textures, and why they are skipped otherwise."""

import functools
import importlib.util
import os
import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).parents[3] / "shared" / "libero" / "assets.tar.xz"
NAMED = os.environ.get("PERENNIAL_LIBERO_ASSETS")

WITH_ASSETS = ("bbq_sauce", "black_book", "butter", "glazed_rim_porcelain_ramekin", "moka_pot", "plate", "wine_bottle")
"""Distractors among those that the shared assets have."""


@functools.cache
def missing():
    if importlib.util.find_spec("libero") is None:
        return "hf-libero is not installed"
    if not NAMED and not ARCHIVE.is_file():
        return "LIBERO's assets are not here: set PERENNIAL_LIBERO_ASSETS"
    return ""


needs_libero = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """The folder of the assets."""
    if NAMED:
        return Path(NAMED)
    folder = tmp_path_factory.mktemp("libero")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "assets"


@pytest.fixture
def libero(unpacked, tmp_path_factory, monkeypatch):
    """LIBERO can be imported without a question, and writes nothing into the user's home."""
    monkeypatch.setenv("PERENNIAL_LIBERO_ASSETS", str(unpacked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
