"""LoRA adapters are merged on their products; PEFT itself reads the result and is the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from perennial.errors import PerennialError
from perennial.merging.adapter_export import merge_adapters
from perennial.merging.adapters import delta_weights
from perennial.merging.checkpoints import merge_checkpoints
from perennial.merging.linear import linear
from perennial.merging.ties import ties
from perennial.policies.lora import LoRA, add_adapter, load_adapter, merged_weights, save_adapter
from perennial.testing.toy import ToyPolicy

peft = pytest.importorskip("peft")

TARGETS = ["first", "second", "words", "image"]


class Net(nn.Module):
    """A linear layer, one inside a block, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.block = nn.ModuleDict({"second": nn.Linear(8, 5, bias=False)})
        self.words = nn.Embedding(11, 6)
        self.image = nn.Conv2d(3, 6, 2)

    def forward(self, tokens: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.image(pixels).mean((2, 3))
        return self.block["second"](self.first(self.words(tokens) + seen).tanh())


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(11, (4,), generator=generator), torch.randn(4, 3, 4, 4, generator=generator)


def adapter(folder: Path, seed: int, base: str = "some/base", **options: object) -> Path:
    """Write an adapter with factors that are all different from zero."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS} | options
    model = peft.get_peft_model(Net(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(Net(), folder).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def change_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    base = Net().state_dict()
    return {name: tensor - base[name] for name, tensor in merged_by_peft(folder).items() if name.endswith("weight")}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"second": 4}, "alpha_pattern": {"second": 7, "words": 1}}],
    ids=["plain", "rslora", "patterns"],
)
def test_the_deltas_are_those_of_peft(tmp_path, options):
    folder = adapter(tmp_path / "a", 1, **options)
    expected, found = change_by_peft(folder), delta_weights(folder)
    assert set(found) == set(expected) == {"first.weight", "block.second.weight", "words.weight", "image.weight"}
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.3, 0.9, -0.5]])
def test_adapters_side_by_side_are_the_exact_weighted_sum(tmp_path, weights):
    folders = [
        adapter(tmp_path / "a", 1),
        adapter(tmp_path / "b", 2, r=3, use_rslora=True),
        adapter(tmp_path / "c", 3, rank_pattern={"second": 1}, alpha_pattern={"first": 11}),
    ]
    report = merge_adapters(folders, tmp_path / "out", weights=weights)
    assert (report.rank, report.residual) == (7, 0.0)
    changes = [change_by_peft(folder) for folder in folders]
    merged = change_by_peft(tmp_path / "out")
    for name in merged:
        expected = sum(w * change[name] for w, change in zip(weights or [1 / 3] * 3, changes, strict=True))
        torch.testing.assert_close(merged[name], expected, atol=5e-6, rtol=1e-5)


def test_peft_runs_the_merged_adapter_without_merging_it(tmp_path):
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    merge_adapters(folders, tmp_path / "out")
    dense = Net()
    dense.load_state_dict(merged_by_peft(tmp_path / "out"))
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(Net(), tmp_path / "out").eval()(*inputs())
        torch.testing.assert_close(found, dense(*inputs()), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, Net()(*inputs()), atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_export_is_the_best_of_its_rank_and_says_what_it_lost(tmp_path, rank):
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    report = merge_adapters(folders, tmp_path / "out", weights=[0.5, 0.5], rank=rank)
    full = {n: sum(0.5 * delta_weights(f)[n] for f in folders) for n in delta_weights(folders[0])}
    found = delta_weights(tmp_path / "out")
    lost = whole = 0.0
    for name, matrix in full.items():
        # The convolution and the embedding are matrices [outputs, inputs] for PEFT.
        values = torch.linalg.svdvals(matrix.flatten(1).double())
        error = torch.linalg.norm((found[name] - matrix).flatten().double()) ** 2
        assert error.item() == pytest.approx(values[rank:].square().sum().item(), rel=1e-4, abs=1e-8)
        ratio = (error / values.square().sum()).sqrt().item()
        assert report.residual_by_layer[name.removesuffix(".weight")] == pytest.approx(ratio, rel=1e-4, abs=1e-6)
        lost, whole = lost + error.item(), whole + values.square().sum().item()
    assert report.residual == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report.residual > 0.05


def test_a_truncation_to_the_full_rank_loses_nothing(tmp_path):
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    assert merge_adapters(folders, tmp_path / "svd", rank=4).residual < 1e-7
    merge_adapters(folders, tmp_path / "cat")
    svd, cat = delta_weights(tmp_path / "svd"), delta_weights(tmp_path / "cat")
    for name in cat:
        torch.testing.assert_close(svd[name], cat[name], atol=1e-5, rtol=1e-4)


def test_the_result_does_not_depend_on_how_the_products_are_factored(tmp_path):
    folder = adapter(tmp_path / "a", 1)
    other = adapter(tmp_path / "b", 2)
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    tensors = load_file(folder / "adapter_model.safetensors")
    turn = torch.tensor([[2.0, 1.0], [0.5, -3.0]])
    key = "base_model.model.first.lora_{}.weight"
    tensors[key.format("B")] = tensors[key.format("B")] @ turn
    tensors[key.format("A")] = (torch.linalg.inv(turn) @ tensors[key.format("A")]).contiguous()
    save_file(tensors, twin / "adapter_model.safetensors")
    for method in ("linear", "ties", "dare"):
        for name, source in (("plain", folder), ("turned", twin)):
            merge_adapters([source, other], tmp_path / f"{name}-{method}", method=method)
        plain, turned = delta_weights(tmp_path / f"plain-{method}"), delta_weights(tmp_path / f"turned-{method}")
        torch.testing.assert_close(plain["first.weight"], turned["first.weight"], atol=1e-4, rtol=1e-4)


def test_ties_works_on_the_products_of_the_whole_adapter(tmp_path):
    folders = [adapter(tmp_path / name, seed, target_modules=["first", "second"]) for seed, name in enumerate("ab")]
    merge_adapters(folders, tmp_path / "out", method="ties", density=0.5, rank=8)
    deltas = [dict(delta_weights(folder)) for folder in folders]
    zero = {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}
    expected = ties(zero, deltas, density=0.5)
    for name, delta in delta_weights(tmp_path / "out").items():
        torch.testing.assert_close(delta, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "options"), [("ties", {"density": 1.0}), ("dare", {"drop": 0.0})])
def test_with_nothing_dropped_one_adapter_comes_back(tmp_path, method, options):
    folder = adapter(tmp_path / "a", 1)
    report = merge_adapters([folder], tmp_path / "out", weights=[0.4], method=method, **options)
    assert report.residual < 1e-5
    found, expected = delta_weights(tmp_path / "out"), delta_weights(folder)
    for name in expected:
        torch.testing.assert_close(found[name], 0.4 * expected[name], atol=1e-5, rtol=1e-4)


def test_a_base_with_an_adapter_is_merged_on_disk_like_the_dense_models(tmp_path):
    folder, base = adapter(tmp_path / "a", 1), tmp_path / "base"
    base.mkdir()
    save_file(Net().state_dict(), base / "model.safetensors")
    merge_checkpoints(base, folder, tmp_path / "out", alpha=0.3)
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in linear(Net().state_dict(), merged_by_peft(folder), 0.3).items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
    scaled = tmp_path / "scaled"
    merge_adapters([folder], scaled, weights=[0.3])
    for name, tensor in merged_by_peft(scaled).items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


def test_an_adapted_tensor_of_several_blocks_is_whole(tmp_path, monkeypatch):
    from perennial.merging import adapters, block_methods, tensor_files  # noqa: F401

    for module in (adapters, tensor_files):
        monkeypatch.setattr(module, "BLOCK", 7)  # neither a divisor nor a multiple of any row
    test_a_base_with_an_adapter_is_merged_on_disk_like_the_dense_models(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_tensor(folder: Path, name: str) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {name: torch.zeros(2)}, folder / "adapter_model.safetensors")


BAD = {
    "name": (lambda f: edit(f, base_model_name_or_path="other/base"), {}, "trained on other/base"),
    "revision": (lambda f: edit(f, revision="v2"), {}, "only adapters of one base"),
    "dora": (lambda f: edit(f, use_dora=True), {}, "only LoRA can be merged"),
    "method": (lambda f: edit(f, peft_type="IA3"), {}, "is a IA3 adapter"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), {}, "started from pissa"),
    "full tensor": (lambda f: add_tensor(f, "base_model.model.head.weight"), {}, "which is no LoRA factor"),
    "half a layer": (lambda f: add_tensor(f, "base_model.model.new.lora_A.weight"), {}, "lacks a factor"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), {}, "no readable adapter folder"),
    "weights": (None, {"weights": [1.0]}, "2 adapters cannot be merged with 1 weights"),
    "rank": (None, {"rank": 0}, "rank is 0"),
    "merge method": (None, {"method": "tie"}, "Did you mean ties"),
    "drop": (None, {"method": "dare", "drop": 1.0}, "drop rate is 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, case):
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    break_it, options, message = BAD[case]
    if break_it:
        break_it(folders[1])
    with pytest.raises(PerennialError, match=message):
        merge_adapters(folders, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_other_layers_are_refused(tmp_path):
    folders = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, target_modules=["first"])]
    with pytest.raises(PerennialError, match=r"block\.second is missing"):
        merge_adapters(folders, tmp_path / "out")


def test_an_adapter_of_another_base_is_not_merged_into_a_checkpoint(tmp_path):
    folder, base = adapter(tmp_path / "a", 1), tmp_path / "base"
    base.mkdir()
    save_file({"first.weight": torch.zeros(8, 6)}, base / "model.safetensors")
    with pytest.raises(
        PerennialError, match=r"updates block.second.weight of shape \[5, 8\], but in the base .* missing"
    ):
        merge_checkpoints(base, folder, tmp_path / "out")
    with pytest.raises(PerennialError, match="is an adapter, not a model"):
        merge_checkpoints(folder, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def our_own(folder: Path, seed: int, base: int = 0, name: str = "toy") -> Path:
    """An adapter of a toy policy, saved as a run saves it."""
    learner = ToyPolicy(base)
    add_adapter(learner, LoRA(rank=2, alpha=4), seed)
    for parameter_name, parameter in learner.model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    save_adapter(learner, folder, name)
    return folder


@pytest.mark.parametrize(
    ("one", "other", "refused"),
    [
        ({"revision": "sampled:1"}, {"revision": "sampled:2"}, True),
        ({"revision": "sha256:1"}, {"revision": "sha256:2"}, True),
        ({"revision": "sampled:1"}, {"revision": "sampled:1", "base_model_name_or_path": "moved"}, False),
        ({"revision": "sampled:1"}, {"revision": "sha256:1"}, False),
        ({"revision": "sampled:1"}, {"revision": None}, False),
        ({"revision": "sampled:1"}, {"revision": None, "base_model_name_or_path": "moved"}, True),
        ({"revision": "v1"}, {"revision": "v1", "base_model_name_or_path": "moved"}, True),
    ],
)
def test_records_of_the_base_decide_and_names_where_one_is_missing(tmp_path, one, other, refused):
    folders = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for folder, changes in zip(folders, (one, other), strict=True):
        edit(folder, **changes)
    if refused:
        with pytest.raises(PerennialError, match=r"b was trained on .*, but .*a on some/base.*; only adapters"):
            merge_adapters(folders, tmp_path / "out")
    else:
        assert merge_adapters(folders, tmp_path / "out").residual == 0.0


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(tmp_path):
    ToyPolicy(0).save(tmp_path / "base")
    ToyPolicy(1).save(tmp_path / "other")
    own, strange = our_own(tmp_path / "own", 1), our_own(tmp_path / "strange", 2, base=1, name="their/base")
    with pytest.raises(PerennialError, match=r"strange was trained on other weights \(their/base\) than"):
        merge_checkpoints(tmp_path / "base", [own, strange], tmp_path / "out", method="task_arithmetic")
    with pytest.raises(PerennialError, match=r"strange was trained on their/base \(weights sampled:\w+\), but"):
        merge_adapters([own, strange], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoints(tmp_path / "other", strange, tmp_path / "out")
    edit(own, revision=None)
    merge_checkpoints(tmp_path / "other", own, tmp_path / "unrecorded")


def test_a_merged_adapter_stays_one_of_its_base(tmp_path):
    ToyPolicy(1).save(tmp_path / "other")
    merge_adapters([our_own(tmp_path / name, seed) for seed, name in enumerate("ab")], tmp_path / "merged")
    with pytest.raises(PerennialError, match="merged was trained on other weights"):
        merge_checkpoints(tmp_path / "other", tmp_path / "merged", tmp_path / "out")


def test_our_own_adapters_of_one_base_merge_and_load_again(tmp_path):
    for name in ("a", "b"):
        our_own(tmp_path / name, ord(name))
    merge_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    found = []
    for name in ("a", "b", "out"):
        learner = ToyPolicy(seed=0)
        load_adapter(learner, tmp_path / name)
        found.append(merged_weights(learner.model))
    for name, tensor in found[2].items():
        torch.testing.assert_close(tensor, (found[0][name] + found[1][name]) / 2, atol=1e-6, rtol=1e-5)
