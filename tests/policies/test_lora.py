import json
import math

import numpy as np
import peft
import pytest
import torch
from tiny_openvla_oft import STATE_DIM, tiny_policy

from perennial.errors import PerennialError
from perennial.policies import lora
from perennial.policies.base import Batch
from perennial.policies.lora import (
    LoRA,
    add_adapter,
    base_name,
    bind,
    fingerprint,
    flatten,
    load_adapter,
    merged_weights,
    save_adapter,
    set_trainable,
)
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation
from perennial.testing.toy import ToyPolicy

OBSERVATION = example_observation(image_size=32, state_dim=STATE_DIM)


def adapted(seed=0, **settings):
    """A policy whose adapter has an effect."""
    policy = tiny_policy()
    add_adapter(policy, LoRA(**({"rank": 4, "alpha": 8} | settings)), seed)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if ".lora_B." in name:
                parameter.copy_(torch.from_numpy(stream(seed, name).normal(0, 0.1, parameter.shape)))
    return policy


def logits(policy):
    sample = np.zeros((len(OBSERVATION), len(policy.token_steps)), np.int64)
    with torch.no_grad():
        return policy.logits(Batch(OBSERVATION, sample, sample == 0)).numpy()


def test_merging_adds_the_scaled_product():
    policy = adapted()
    merged = merged_weights(policy.model)
    before = tiny_policy().acting_weights()
    raw = {name: parameter.detach().numpy() for name, parameter in policy.model.named_parameters()}
    assert merged.keys() == before.keys()
    for name in before:
        a = raw.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight")
        b = raw.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.default.weight")
        expected = before[name].numpy() if a is None else before[name].numpy() + 8 / 4 * (b @ a)
        np.testing.assert_allclose(merged[name].numpy(), expected, atol=1e-6)


def test_merged_weights_are_copies():
    policy = tiny_policy()
    weights = merged_weights(policy.model)
    untouched = logits(policy)
    for tensor in weights.values():
        tensor.zero_()
    np.testing.assert_array_equal(logits(policy), untouched)


def test_the_seed_alone_names_the_initial_adapter():
    def factors(seed):
        torch.manual_seed(np.random.default_rng().integers(1000))
        policy = tiny_policy()
        add_adapter(policy, LoRA(rank=8), seed)
        return {name: parameter.detach().numpy().copy() for name, parameter in policy.trainable().items()}

    first, again, other = factors(1), factors(1), factors(2)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        if ".lora_B." in name:
            np.testing.assert_array_equal(values, 0)
    downs = [name for name in first if ".lora_A." in name]
    assert all((first[name] != other[name]).any() for name in downs)
    assert np.concatenate([first[name].ravel() for name in downs]).std() == pytest.approx(1 / 8, rel=0.05)


def test_adding_an_adapter_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    add_adapter(tiny_policy(), LoRA(), 0)
    assert torch.rand(1) == expected


def test_groups_may_have_their_own_rank():
    policy = adapted(rank_by_group={"vision": 2, "action": 1})
    ranks = {"vision": 2, "language": 4, "action": 1}
    group_of = {name: group for group, names in policy.groups.items() for name in names}
    for name, parameter in policy.trainable().items():
        rank = parameter.shape[0] if ".lora_A." in name else parameter.shape[1]
        assert rank == ranks[group_of[base_name(name)]], name


def test_unknown_groups_and_second_adapters_are_refused():
    with pytest.raises(PerennialError, match=r"no parameter group 'visoin'\. Did you mean vision"):
        add_adapter(tiny_policy(), LoRA(rank_by_group={"visoin": 2}), 0)
    with pytest.raises(PerennialError, match="no parameter group 'head'"):
        set_trainable(tiny_policy(), ["head"])
    with pytest.raises(PerennialError, match="has an adapter already"):
        add_adapter(adapted(), LoRA(), 0)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("groups", [["action"], ["vision", "language"], []])
def test_only_the_chosen_groups_learn(adapter, groups):
    policy = adapted() if adapter else tiny_policy()
    set_trainable(policy, groups)
    chosen = {name for group in groups for name in policy.groups[group]}
    learning = {base_name(name) for name in policy.trainable()}
    assert all((".lora_" in name) == adapter for name in policy.trainable())
    if adapter:
        linear = {base_name(name) for name, _ in policy.model.named_parameters() if ".lora_" in name}
        assert learning == chosen & linear
    else:
        assert learning == chosen


def test_a_bound_model_acts_with_whatever_the_buffer_holds():
    policy, other = tiny_policy(), tiny_policy(seed=1)
    flat, layout = flatten(other.acting_weights())
    bind(policy.model, flat, layout)
    np.testing.assert_array_equal(logits(policy), logits(other))
    begin, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    assert all(begin <= parameter.data_ptr() < end for parameter in policy.model.parameters())
    assert all(offset * 4 % 64 == 0 for _, offset, _ in layout)
    third = adapted()
    assert flatten(third.acting_weights(), out=flat)[0] is flat
    np.testing.assert_allclose(logits(policy), logits(third), atol=1e-4)


def test_the_layout_has_room_for_every_weight_once():
    weights = {"a": torch.ones(3, 5), "b": torch.tensor(2.0), "c": torch.full((16,), 3.0)}
    flat, layout = flatten(weights)
    assert [(name, offset, shape) for name, offset, shape in layout] == [
        ("a", 0, (3, 5)),
        ("b", 16, ()),
        ("c", 32, (16,)),
    ]
    assert flat.sum() == 15 + 2 + 48
    assert all(math.prod(shape) == weights[name].numel() for name, _, shape in layout)


def test_adapter_folders_load_with_peft_itself(tmp_path):
    policy, plain = adapted(), tiny_policy()
    save_adapter(policy, tmp_path, base="metaworld-small")
    plain.model = peft.PeftModel.from_pretrained(plain.model, tmp_path)
    np.testing.assert_array_equal(logits(plain), logits(policy))
    assert plain.model.peft_config["default"].base_model_name_or_path == "metaworld-small"


def test_loading_replaces_an_adapter_and_lets_it_learn(tmp_path):
    policy, other = adapted(), adapted(seed=1, rank=2)
    save_adapter(policy, tmp_path, base="base")
    load_adapter(other, tmp_path)
    np.testing.assert_array_equal(logits(other), logits(policy))
    assert list(other.trainable()) == list(policy.trainable())


def test_adapter_folders_are_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        save_adapter(adapted(), tmp_path / name, base="base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def adapted_names(policy):
    return {base_name(name) for name, _ in policy.model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("record", [None, "main", "sha256:" + "0" * 64])
def test_an_adapter_without_our_record_of_its_base_loads_and_gets_one(tmp_path, record):
    policy = adapted()
    save_adapter(policy, tmp_path / "one", base="base")
    config = tmp_path / "one" / "adapter_config.json"
    written = config.read_bytes()
    config.write_text(json.dumps(json.loads(written) | {"revision": record}))
    other = tiny_policy()
    load_adapter(other, tmp_path / "one")
    np.testing.assert_array_equal(logits(other), logits(policy))
    save_adapter(other, tmp_path / "two", base="base")
    assert (tmp_path / "two" / "adapter_config.json").read_bytes() == written


def test_the_base_is_hashed_once_however_often_its_adapter_is_saved(tmp_path, monkeypatch):
    hashed, policy, other = [], adapted(), tiny_policy()
    monkeypatch.setattr(lora, "fingerprint", lambda *asked: hashed.append(asked) or fingerprint(*asked))
    for name in ("one", "two"):
        save_adapter(policy, tmp_path / name, base="base")
    assert len(hashed) == 1
    load_adapter(other, tmp_path / "two")
    save_adapter(other, tmp_path / "three", base="base")
    assert len(hashed) == 2, "what was compared with the base on loading is known"
    contents = {(tmp_path / name / "adapter_config.json").read_bytes() for name in ("one", "two", "three")}
    assert len(contents) == 1
    assert json.loads(contents.pop())["revision"] == fingerprint(tiny_policy().model, adapted_names(policy))


def test_an_adapter_of_another_base_is_refused_and_the_policy_kept(tmp_path):
    save_adapter(adapted(), tmp_path, base="metaworld-small")
    other = tiny_policy(seed=9)
    before = logits(other)
    with pytest.raises(PerennialError, match=r"trained on other weights \(metaworld-small\)"):
        load_adapter(other, tmp_path)
    np.testing.assert_array_equal(logits(other), before)


def test_broken_adapter_folders_are_named(tmp_path):
    policy = adapted()
    save_adapter(policy, tmp_path, base="base")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PerennialError, match="cannot be read"):
        load_adapter(tiny_policy(), tmp_path)
    with pytest.raises(PerennialError, match="is not an adapter folder"):
        load_adapter(tiny_policy(), tmp_path / "nowhere")


def test_the_fingerprint_sees_what_is_adapted_and_not_the_adapter():
    policy = tiny_policy()
    weights = {name: p for name, p in policy.model.named_parameters() if name.endswith("weight") and p.dim() == 2}
    before = fingerprint(policy.model, weights)
    add_adapter(policy, LoRA(), 0)
    assert fingerprint(policy.model, weights) == before
    for parameter in weights.values():
        with torch.no_grad():
            old = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] += 1
            assert fingerprint(policy.model, weights) != before
            parameter.view(-1)[-1] = old
    assert fingerprint(policy.model, weights) == before
    assert fingerprint(policy.model.to(torch.bfloat16), weights) == before


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("projector.fc1.weight", "projector.fc1.weight"),
        ("base_model.model.projector.fc1.base_layer.bias", "projector.fc1.bias"),
        ("base_model.model.projector.fc1.lora_A.default.weight", "projector.fc1.weight"),
        (
            "base_model.model.vision_backbone.featurizer.embeddings.cls_token",
            "vision_backbone.featurizer.embeddings.cls_token",
        ),
    ],
)
def test_base_names(name, base):
    assert base_name(name) == base


def test_adapters_fit_any_policy():
    policy = ToyPolicy()
    add_adapter(policy, LoRA(rank=2), 0)
    assert merged_weights(policy.model).keys() == dict(ToyPolicy().model.named_parameters()).keys()


def test_weights_of_one_type_are_shared_in_it():
    """What acts in another process must round as what learns does."""
    policy = tiny_policy()
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = logits(policy)
    flat, layout = flatten(policy.acting_weights())
    assert flat.dtype == torch.bfloat16
    other = tiny_policy(seed=1)
    bind(other.model, flat, layout)
    np.testing.assert_array_equal(logits(other), expected)
    assert flatten({"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(1)})[0].dtype == torch.float32
