"""Merging on disk: the same numbers as in memory, for every layout."""

from __future__ import annotations

import hashlib
import json
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.models import assert_same, read, weights, write
from perennial.merging import tensor_files
from perennial.merging.checkpoints import merge_checkpoints
from perennial.merging.dare import dare
from perennial.merging.linear import linear
from perennial.merging.slerp import slerp
from perennial.merging.task_arithmetic import task_arithmetic
from perennial.merging.ties import ties
from perennial.policies._learned import save_learned
from perennial.policies.lora import LoRA, add_adapter
from perennial.storage.tensors import save_tensors
from perennial.testing.toy import ToyPolicy
from strategies.worlds import shake


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
    seen = set()
    torch.set_num_threads(2)
    merge_checkpoints(*pair, tmp_path / "out", on_progress=lambda *_: seen.add(torch.get_num_threads()))
    assert seen == {1}
    assert torch.get_num_threads() == 2


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


def test_the_folder_that_a_run_keeps_of_a_task_stands_for_the_adapter_in_it(tmp_path):
    policy = ToyPolicy(0)
    policy.save(tmp_path / "base")
    add_adapter(policy, LoRA(3, 6), seed=0)
    shake(policy, 1)
    task = tmp_path / "01-left"
    task.mkdir()
    save_learned(policy, task, "base")
    save_tensors({"anchor": torch.zeros(3)}, task / "strategy.safetensors")
    for name, finetuned in (("one", task), ("two", task / "adapter")):
        merge_checkpoints(tmp_path / "base", finetuned, tmp_path / name)
    one, two, base = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "base"))
    assert one == two != base
