"""Merging on disk: whole or not at all, in little memory, and a sentence about what cannot be merged."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merging.models import assert_same, read, weights, write
from perennial.errors import PerennialError
from perennial.merging.checkpoints import merge_checkpoints
from perennial.merging.linear import linear


def bad(change):
    """Apply `change` to the fine-tuned state and write it."""
    return lambda base, tuned: (shutil.rmtree(tuned), write(tuned, change(weights(2))))


def truncate(base, tuned):
    file = tuned / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def two_files(base, tuned):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tuned / "model.safetensors", tuned / name)
    (tuned / "model.safetensors").unlink()


NOTHING = "There is no safetensors checkpoint in"
BAD = {
    "shape": (bad(lambda s: s | {"mask": torch.zeros(9)}), {}, r"mask is \[9\] instead of \[2, 2\]"),
    "missing": (bad(lambda s: {n: t for n, t in s.items() if n != "mask"}), {}, "1 tensors differ: mask is missing"),
    "extra": (bad(lambda s: s | {"value": torch.zeros(1)}), {}, "value is not in the base"),
    "quantised": (bad(lambda s: s | {"position_ids": torch.ones(6).long()}), {}, "position_ids is of type I64"),
    "other type": (bad(lambda s: s | {"position_ids": torch.ones(6)}), {}, "of type F32 and I64"),
    "nan": (bad(lambda s: s | {"mask": torch.full((2, 2), math.nan)}), {}, "mask is infinite or NaN after merging"),
    "truncated": (truncate, {}, "is truncated or has bytes to spare, copy it again"),
    "too long": (
        lambda b, t: (t / "model.safetensors").open("ab").write(b"more"),
        {},
        "is truncated or has bytes to spare",
    ),
    "no tensors": (lambda b, t: (t / "model.safetensors").write_bytes(b"PK" * 100), {}, "truncated or no safetensors"),
    "no file": (lambda b, t: (t / "model.safetensors").unlink(), {}, NOTHING),
    "no folder": (lambda b, t: shutil.rmtree(t), {}, NOTHING),
    "two files": (two_files, {}, "2 safetensors files and no index"),
    "alpha": (None, {"alpha": 1.2}, "alpha is 1.2"),
    "group": (None, {"alpha_by_group": {"gripper": 1.0}}, "'gripper'"),
    "method": (None, {"method": "tie"}, "no merge method 'tie'. Did you mean ties"),
    "density": (None, {"method": "ties", "density": 1.5}, "density is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(pair, tmp_path, case):
    break_it, arguments, message = BAD[case]
    if break_it:
        break_it(*pair)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PerennialError, match=message):
        merge_checkpoints(*pair, tmp_path / "out", **arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    base, tuned = write(tmp_path / "base", weights(1), sharded=True), write(tmp_path / "tuned", weights(2))
    index = base / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(record))
    with pytest.raises(PerennialError, match="does not name the tensors of its files"):
        merge_checkpoints(base, tuned, tmp_path / "out")
    index.write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}')
    with pytest.raises(PerennialError, match="does not name the tensors of its files"):
        merge_checkpoints(base, tuned, tmp_path / "out")


def test_linear_and_slerp_take_one_model(pair, tmp_path):
    for method in ("linear", "slerp"):
        with pytest.raises(PerennialError, match="merges one fine-tuned model, not 2"):
            merge_checkpoints(pair[0], [pair[1], pair[1]], tmp_path / "out", method=method)


def test_an_existing_output_is_never_touched(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(PerennialError, match="out exists already"):
        merge_checkpoints(*pair, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_disk_too_small_is_told_before_anything_is_written(pair, tmp_path, monkeypatch):
    size = (pair[0] / "model.safetensors").stat().st_size + (pair[0] / "config.json").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(PerennialError, match=r"needs 0.01 GB, but .* has only 0.01 GB free"):
        merge_checkpoints(*pair, tmp_path / "deep/er/out")
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    merge_checkpoints(*pair, tmp_path / "deep/er/out")


def test_overflow_is_an_error_and_a_failed_merge_leaves_nothing(tmp_path):
    base = write(tmp_path / "base", {"w": torch.full((4,), -6e4).half()})
    tuned = write(tmp_path / "tuned", {"w": torch.full((4,), 6e4).half()})
    with pytest.raises(PerennialError, match="w is infinite or NaN after merging"):
        merge_checkpoints(base, tuned, tmp_path / "out", alpha=2.0, extrapolate=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_disk_that_fills_up_all_the_same_is_told_and_cleaned(pair, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(PerennialError, match=r"out cannot be written \(.*No space left on device\)"):
        merge_checkpoints(*pair, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


SCRIPT = """
import sys
from pathlib import Path
from perennial.merging.checkpoints import merge_checkpoints
base, tuned, out = map(Path, sys.argv[1:])
merge_checkpoints(base, tuned, out, alpha=0.3)
"""


@pytest.mark.parametrize("point", ["merge_block:5", "merge_rename:1"])
def test_a_killed_merge_leaves_no_checkpoint_and_the_next_one_succeeds(pair, tmp_path, point):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, *map(str, pair), str(out)]
    killed = subprocess.run(command, env={**os.environ, "PERENNIAL_KILL_AT": point}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    subprocess.run(command, check=True)
    assert_same(read(out), linear(weights(1), weights(2), 0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


MEMORY = """
import sys
from pathlib import Path
from perennial.merging.checkpoints import merge_checkpoints

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

folder = Path(sys.argv[1])
merge_checkpoints(folder / "small", folder / "small", folder / "warm", alpha=0.3)
before = peak()
merge_checkpoints(folder / "base", folder / "tuned", folder / "out", alpha=0.3, method=sys.argv[2])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large_models(tmp_path_factory):
    """Models of 300 MB, one tensor of 200 MB and fifty of 2 MB, and one of 2 MB to warm up with."""
    folder = tmp_path_factory.mktemp("large")
    values = torch.randn(1 << 20).bfloat16()
    for name, scale in (("base", 1.0), ("tuned", 1.5)):
        small = {f"small.{i}": values * (scale + i) for i in range(50)}
        write(folder / name, {"large": (values * scale).repeat(100), **small})
    write(folder / "small", {"w": values})
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_memory_does_not_grow_with_the_model(large_models, method):
    command = [sys.executable, "-c", MEMORY, str(large_models), method]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 160, f"the peak grew by {grown:.0f} MB"
    shutil.rmtree(large_models / "out")
    shutil.rmtree(large_models / "warm")
