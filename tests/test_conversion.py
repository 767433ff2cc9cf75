"""Pickled weights become safetensors; pickled code does not run."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from perennial import cli
from perennial.conversion import convert, convert_index
from perennial.errors import PerennialError
from perennial.merging.tensor_files import open_checkpoint


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_every_pickle_of_a_folder_becomes_safetensors(tmp_path, capsys):
    base = torch.arange(12.0).reshape(3, 4)
    first = {"module.a": base.T, "module.b": base[1:]}  # not contiguous, and sharing memory
    second = {"c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(first, tmp_path / "head--1.pt")
    torch.save(second, tmp_path / "weights.bin")
    cli.main(["convert", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "head--1.safetensors"),
        str(tmp_path / "weights.safetensors"),
    ]
    for name, tensors in (("head--1", first), ("weights", second)):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor)
    with pytest.raises(PerennialError, match="exists already"):
        convert(tmp_path / "weights.bin")


def test_a_folder_is_converted_again_and_past_what_is_no_weights(tmp_path, capsys):
    torch.save({"state": {0: {"step": 1}}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    cli.main(["convert", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'optimizer.pt'} is left as it is",
        str(tmp_path / "model.safetensors"),
        str(tmp_path / "model.safetensors.index.json"),
    ]
    cli.main(["convert", str(tmp_path)])
    assert f"{tmp_path / 'model.safetensors'} exists already" in capsys.readouterr().out.splitlines()


def test_weights_that_the_index_names_cannot_be_left(tmp_path, capsys):
    torch.save({"b": torch.ones(2)}, tmp_path / "other.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path)])
    assert "pytorch_model.bin holds more than weights or is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_split_weights_get_the_names_and_the_index_of_safetensors(tmp_path):
    whole = {"a": torch.ones(2), "b": torch.zeros(3)}
    places = {name: f"pytorch_model-0000{number}-of-00002.bin" for number, name in enumerate(whole, 1)}
    for name, file in places.items():
        torch.save({name: whole[name]}, tmp_path / file)
    index = {"metadata": {"total_size": 20}, "weight_map": places}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(PerennialError, match=r"pickled \(pytorch_model-00001.*; convert them by `perennial convert"):
        open_checkpoint(tmp_path)
    cli.main(["convert", str(tmp_path)])
    found = open_checkpoint(tmp_path)
    assert {name: entry.file.name for name, entry in found.entries.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(PerennialError, match=r"pytorch_model\.bin\.index\.json is no index"):
        convert_index(tmp_path)


def test_an_index_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PerennialError, match="disk is full"):
            convert_index(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin.index.json"]
    found = json.loads(convert_index(tmp_path).read_text())
    assert found == {"weight_map": {"a": "model.safetensors"}}


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, tmp_path / "evil.pt")
    with pytest.raises(PerennialError, match="holds more than weights or is damaged") as refused:
        convert(tmp_path / "evil.pt")
    assert "weights_only" not in str(refused.value), "torch's advice to run the code is not passed on"
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_what_holds_no_weights_is_refused(tmp_path):
    torch.save({"step": 3, "a": torch.ones(1)}, tmp_path / "state.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:100])
    (tmp_path / "nothing.pt").write_bytes(b"")
    for name, message in (
        ("state.pt", "no dictionary of named tensors"),
        ("cut.pt", "is damaged"),
        ("nothing.pt", "is damaged"),
    ):
        with pytest.raises(PerennialError, match=message):
            convert(tmp_path / name)
    for name in ("missing.pt", "notes.txt", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "notes.txt").write_text("a")
        with pytest.raises(SystemExit):
            cli.main(["convert", str(tmp_path / name)])
