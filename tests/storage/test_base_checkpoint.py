from pathlib import Path

import huggingface_hub.constants
import pytest

from perennial.errors import PerennialError
from perennial.storage import base_checkpoint
from perennial.storage.base_checkpoint import checkpoint_folder


def test_checkpoints_are_folders_or_come_with_perennial(tmp_path, monkeypatch):
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    (tmp_path / "checkpoints" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(base_checkpoint, "BUNDLED", tmp_path / "checkpoints")
    assert checkpoint_folder("bundled:tiny") == tmp_path / "checkpoints" / "tiny"
    with pytest.raises(PerennialError, match=r"no bundled checkpoint 'tinny'\. Did you mean tiny"):
        checkpoint_folder("bundled:tinny")


def test_hub_checkpoints_are_those_that_were_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PerennialError, match=r"hub:openvla/openvla-7b is not on this disk; .*`hf download openvla/op"):
        checkpoint_folder("hub:openvla/openvla-7b")
    with pytest.raises(PerennialError, match=r"hub:not a name is not on this disk"):
        checkpoint_folder("hub:not a name")
    cached = tmp_path / "models--openvla--openvla-7b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots" / "abc123").mkdir(parents=True)
    assert checkpoint_folder("hub:openvla/openvla-7b") == cached / "snapshots" / "abc123"
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("openvla/openvla-7b") == cached / "snapshots" / "abc123"
    (tmp_path / "openvla" / "openvla-7b").mkdir(parents=True)  # a folder comes first
    assert checkpoint_folder("openvla/openvla-7b") == Path("openvla/openvla-7b")


@pytest.mark.parametrize("checkpoint", ["", "bundled:", "bundled:.."])
def test_a_checkpoint_without_a_name_is_not_the_present_folder(checkpoint):
    with pytest.raises(PerennialError, match=r"folder '' does not exist|no bundled checkpoint '(\.\.)?'"):
        checkpoint_folder(checkpoint)


def test_a_bare_repository_name_is_answered_with_how_to_download_it():
    with pytest.raises(
        PerennialError, match=r"'openvla/openvla-7b' does not exist; .*`hf download openvla/openvla-7b` first "
    ):
        checkpoint_folder("openvla/openvla-7b")
    with pytest.raises(PerennialError, match=r"'/no/where' does not exist; give a folder or `bundled:"):
        checkpoint_folder("/no/where")
