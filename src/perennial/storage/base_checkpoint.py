"""Where a base checkpoint lies: in a folder, among those that come with Perennial, or downloaded from the hub."""

from __future__ import annotations

import re
from pathlib import Path

import perennial
from perennial.errors import PerennialError, not_installed, unknown
from perennial.storage.atomic import MANIFEST, verify

SCHEMES = ("bundled:", "hub:")
"""What a checkpoint begins with that is named rather than found at a path."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What the Hugging Face hub calls a repository."""
BUNDLED = Path(perennial.__file__).parent / "checkpoints"
"""What comes with Perennial."""


def checkpoint_folder(checkpoint: str) -> Path:
    """The folder that `checkpoint` names; a manifest in it is checked. Nothing is downloaded.

    Raises:
        PerennialError: there is no such folder on this disk, or a file in it does not match its manifest.
    """
    folder = _named_folder(checkpoint)
    if (folder / MANIFEST).is_file():
        verify(folder)
    return folder


def absolute(checkpoint: str) -> str:
    """What names the same checkpoint from every folder."""
    named = _with_scheme(checkpoint)
    return named if named.startswith(SCHEMES) else str(Path(named).absolute())


def _named_folder(checkpoint: str) -> Path:
    scheme, _, name = _with_scheme(checkpoint).partition(":")
    if scheme == "bundled":
        bundled = {path.name: path for path in BUNDLED.iterdir() if path.is_dir()}
        if name not in bundled:
            raise unknown("bundled checkpoint", name, bundled)
        return bundled[name]
    if scheme == "hub":
        return _downloaded_folder(name)
    if not checkpoint or not Path(checkpoint).is_dir():
        hint = "give a folder or `bundled:metaworld-small`"
        if REPOSITORY.fullmatch(checkpoint):
            hint = f"correct the path, or run `hf download {checkpoint}` first if that is on the Hugging Face hub"
        raise PerennialError(f"The checkpoint folder {checkpoint!r} does not exist; {hint}.")
    return Path(checkpoint)


def _with_scheme(checkpoint: str) -> str:
    """`checkpoint`, with `hub:` before the name of a repository that is on this disk where no folder has that name."""
    if not REPOSITORY.fullmatch(checkpoint) or Path(checkpoint).is_dir():
        return checkpoint
    try:
        _downloaded_folder(checkpoint)
    except PerennialError:
        return checkpoint
    return f"hub:{checkpoint}"


def _downloaded_folder(repository: str) -> Path:
    """The newest snapshot of a hub repository that lies on this disk."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise not_installed("huggingface_hub, which finds hub: checkpoints,", "vla", error) from error
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise PerennialError(
            f"hub:{repository} is not on this disk; download it with `hf download {repository}` first."
        ) from None
