"""Merging on disk: the same numbers as in memory, for every layout, in little memory, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perennial.errors import PerennialError
from perennial.merging import tensor_files
from perennial.merging.checkpoints import merge_checkpoints
from perennial.merging.dare import dare
from perennial.merging.linear import linear
from perennial.merging.slerp import slerp
from perennial.merging.task_arithmetic import task_arithmetic
from perennial.merging.ties import ties

SHAPES = {
    "vision_backbone.featurizer.weight": (33, 5),
    "projector.fc1.bias": (17,),
    "language_model.model.layers.0.weight": (1500, 1400),  # two blocks
    "language_model.lm_head.weight": (8, 4),
}
SHARDS = {"model-00001-of-00002.safetensors": 2, "model-00002-of-00002.safetensors": 4}


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return state | {"position_ids": torch.arange(6), "mask": torch.full((2, 2), -math.inf).to(dtype)}


def write(folder: Path, state: dict[str, torch.Tensor], sharded: bool = False) -> Path:
    folder.mkdir()
    if not sharded:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: state[name] for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def pair(tmp_path):
    base, tuned = write(tmp_path / "base", weights(1)), write(tmp_path / "tuned", weights(2))
    (base / "config.json").write_text('{"who": "base"}')
    (tuned / "config.json").write_text('{"who": "tuned"}')
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("base_sharded", "tuned_sharded"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_any_layout_and_type_gives_the_merge_in_memory_in_the_base_s_layout(
    tmp_path, dtype, base_sharded, tuned_sharded
):
    base = write(tmp_path / "base", weights(1, dtype), base_sharded)
    tuned = write(tmp_path / "tuned", weights(2, dtype), tuned_sharded)
    report = merge_checkpoints(base, tuned, tmp_path / "out", alpha=0.3)
    assert_same(read(tmp_path / "out"), linear(weights(1, dtype), weights(2, dtype), 0.3))
    layout = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == layout | {"merge_provenance.json"}
    assert (report.tensors, report.changed) == (6, 4)


@pytest.mark.parametrize("number", [1, 3])
def test_every_method_on_disk_is_the_method_in_memory(tmp_path, number):
    base = write(tmp_path / "base", weights(0), sharded=True)
    states = [weights(seed) for seed in range(1, number + 1)]
    tuned = [write(tmp_path / f"tuned{i}", state) for i, state in enumerate(states)]
    expected = {
        "task_arithmetic": task_arithmetic(weights(0), states, [0.4] * number),
        "ties": ties(weights(0), states, 0.4, density=0.3),
        "dare": dare(weights(0), states, 0.4, drop=0.7, seed=5),
    }
    if number == 1:
        expected["linear"] = linear(weights(0), states[0], 0.4)
        expected["slerp"] = slerp(weights(0), states[0], 0.4)
    for method, state in expected.items():
        out = tmp_path / method
        merge_checkpoints(base, tuned, out, method=method, alpha=0.4, density=0.3, drop=0.7, seed=5)
        merged = read(out)
        assert merged.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=f"{method} {name}")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_blocks_smaller_than_any_tensor_give_the_same_merge(tmp_path, monkeypatch, alpha):
    """Blocks wait for the disk in memory that the readers must not use again: integers, unchanged and merged ones."""
    monkeypatch.setattr(tensor_files, "BLOCK", 64)
    fill = {"frozen": torch.arange(5000.0)}
    base = {"w": torch.randn(3000), "ids": torch.arange(4000)} | fill
    tuned = {"w": torch.randn(3000), "ids": torch.arange(4000) if alpha == 0.3 else torch.arange(4000).flip(0)} | fill
    merge_checkpoints(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned), tmp_path / "out", alpha=alpha)
    assert_same(read(tmp_path / "out"), linear(base, tuned, alpha))


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
@pytest.mark.parametrize(("alpha", "which"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_the_input_files_byte_for_byte(pair, tmp_path, method, alpha, which):
    merge_checkpoints(*pair, tmp_path / "out", method=method, alpha=alpha)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (pair[which] / "model.safetensors").read_bytes()


def test_groups_have_their_own_coefficients(pair, tmp_path):
    report = merge_checkpoints(*pair, tmp_path / "out", alpha=0.5, alpha_by_group={"vision": 1.0, "action": 0.0})
    merged, base, tuned = read(tmp_path / "out"), weights(1), weights(2)
    half = linear(base, tuned, 0.5)
    assert torch.equal(merged["projector.fc1.bias"], tuned["projector.fc1.bias"])
    assert torch.equal(merged["language_model.lm_head.weight"], base["language_model.lm_head.weight"])
    assert torch.equal(merged["language_model.model.layers.0.weight"], half["language_model.model.layers.0.weight"])
    assert report.alpha_by_group == {"vision": 1.0, "language": 0.5, "action": 0.0, "other": 0.5}
    assert report.tensors_by_group == {"vision": 2, "language": 1, "action": 1, "other": 2}
    eyes = merge_checkpoints(
        *pair, tmp_path / "own", alpha=0.5, alpha_by_group={"eyes": 0.0}, groups={"projector": "eyes"}
    )
    assert eyes.tensors_by_group == {"eyes": 1, "other": 5}
    assert torch.equal(read(tmp_path / "own")["projector.fc1.bias"], base["projector.fc1.bias"])


def test_what_lies_beside_the_weights_comes_from_the_base_and_foreign_weights_do_not(pair, tmp_path):
    base, tuned = pair
    (base / "norm_stats").mkdir()
    (base / "norm_stats/libero.json").write_text("{}")
    (base / "tokenizer.json").write_text("words")
    save_file({"mean": torch.ones(3)}, base / "policy_preprocessor_normalizer.safetensors")
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (base / ".cache").mkdir()
    report = merge_checkpoints(base, tuned, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "config.json").read_text() == '{"who": "base"}'
    assert (out / "norm_stats/libero.json").is_file()
    assert (out / "tokenizer.json").read_text() == "words"
    assert torch.equal(load_file(out / "policy_preprocessor_normalizer.safetensors")["mean"], torch.ones(3))
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / ".cache").exists()
    assert report.left_out == ("pytorch_model.bin",)


def test_provenance_names_every_file_by_its_hash_and_keeps_the_merges_before(pair, tmp_path):
    base, tuned = pair
    merge_checkpoints(base, tuned, tmp_path / "first", alpha=0.5)
    merge_checkpoints(tmp_path / "first", tuned, tmp_path / "second", method="dare", alpha=0.25, seed=3)

    def sha256(folder):
        return {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}

    record = json.loads((tmp_path / "second/merge_provenance.json").read_text())
    assert record["method"] == "dare"
    assert (record["drop"], record["seed"]) == (0.9, 3)
    assert set(record["alpha_by_group"].values()) == {0.25}
    assert record["base"]["sha256"] == sha256(tmp_path / "first")
    assert record["finetuned"][0]["sha256"] == sha256(tuned)
    assert record["base"]["provenance"] == json.loads((tmp_path / "first/merge_provenance.json").read_text())


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_inputs_are_hashed_whole_in_whatever_order_they_are_read(tmp_path, monkeypatch, method):
    monkeypatch.setattr(tensor_files, "BLOCK", 100_000)
    base, tuned = write(tmp_path / "base", weights(1)), write(tmp_path / "tuned", weights(2), sharded=True)
    merge_checkpoints(base, tuned, tmp_path / "out", method=method)
    record = json.loads((tmp_path / "out/merge_provenance.json").read_text())
    for folder, found in ((base, record["base"]), (tuned, record["finetuned"][0])):
        files = sorted(folder.glob("*.safetensors"))
        assert found["sha256"] == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


class SlowHash:
    """SHA-256 that takes its time, so that the reader runs ahead of it."""

    def __init__(self, start: bytes) -> None:
        self._digest = hashlib.sha256(start)

    def update(self, data: memoryview) -> None:
        time.sleep(0.002)
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def test_a_reader_keeps_its_memory_until_it_is_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 64)
    base = write(tmp_path / "base", {"w": torch.randn(4000)})
    monkeypatch.setattr(tensor_files, "hashlib", types.SimpleNamespace(sha256=SlowHash))
    checkpoint = tensor_files.open_checkpoint(base)
    reader = checkpoint.reader()
    for number in range(checkpoint.entries["w"].blocks):
        reader.block("w", number)
    file = base / "model.safetensors"
    assert reader.hashes() == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    reader.close()


def test_a_file_in_another_order_is_hashed_whole_and_merged_by_name(tmp_path):
    """Files are ordered by type first, so exchanging the types exchanges the order."""
    base = {"a": torch.randn(9), "b": torch.randn(9).half()}
    tuned = {"a": torch.randn(9).half(), "b": torch.randn(9)}
    folders = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    assert [list(tensor_files.open_checkpoint(folder).entries) for folder in folders] == [["a", "b"], ["b", "a"]]
    merge_checkpoints(*folders, tmp_path / "out", alpha=0.3)
    assert_same(read(tmp_path / "out"), linear(base, tuned, 0.3))
    record = json.loads((tmp_path / "out/merge_provenance.json").read_text())
    expected = hashlib.sha256((folders[1] / "model.safetensors").read_bytes()).hexdigest()
    assert record["finetuned"][0]["sha256"] == {"model.safetensors": expected}


def test_progress_counts_the_bytes_of_the_weights(pair, tmp_path):
    seen = []
    report = merge_checkpoints(*pair, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.size, report.size) == ((tmp_path / "out/model.safetensors").stat().st_size,) * 2


def test_one_thread_averages_while_others_hash_and_read(pair, tmp_path):
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        merge_checkpoints(*pair, tmp_path / "out", on_progress=lambda *_: seen.add(torch.get_num_threads()))
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_single_file_is_merged_into_a_folder_with_that_file(pair, tmp_path):
    merge_checkpoints(pair[0] / "model.safetensors", pair[1] / "model.safetensors", tmp_path / "out", alpha=0.5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merge_provenance.json", "model.safetensors"]


def test_empty_tensors_and_other_types_pass(tmp_path):
    extra = {
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
    }
    base = write(tmp_path / "base", weights(1) | extra)
    tuned = write(tmp_path / "tuned", weights(2) | extra)
    for method in ("linear", "slerp", "ties", "dare", "task_arithmetic"):
        merge_checkpoints(base, tuned, tmp_path / method, method=method, alpha=0.3)
        merged = read(tmp_path / method)
        assert merged["empty"].shape == (0, 4)
        assert torch.equal(merged["flags"], extra["flags"])
        assert torch.equal(merged["eighth"].float(), torch.ones(3))


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
import time
import types
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
import time
import types
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
