import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from perennial.alpha import sweep
from perennial.alpha.sweep import Pair, front, likeliest, open_pair
from perennial.errors import PerennialError
from perennial.merging.groups import grid
from perennial.policies._learned import save_learned
from perennial.policies.lora import LoRA, add_adapter
from perennial.testing.toy import ToyPolicy
from strategies.worlds import batch, shake

TOY = "perennial.testing.toy"


@pytest.fixture
def base(tmp_path):
    ToyPolicy(0).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "adapter of a run", "weights of a run"])
def test_whatever_was_fine_tuned_is_met_halfway(base, tmp_path, kind):
    policy = ToyPolicy.load(base)
    before = policy.acting_weights()
    if kind.startswith("adapter"):
        add_adapter(policy, LoRA(3, 6), seed=0)
    shake(policy, 1)
    after, target = policy.acting_weights(), tmp_path / "learned"
    if kind == "checkpoint":
        policy.save(target)
    else:
        target.mkdir()
        save_learned(policy, target, "base")
    pair = open_pair(TOY, base, target / "adapter" if kind == "adapter" else target)
    for coefficients, wanted in (((0.0,) * 3, before), ((1.0,) * 3, after)):
        merged = pair.merged(coefficients)
        assert merged.keys() == wanted.keys()
        for name, weights in merged.items():
            torch.testing.assert_close(weights, wanted[name], rtol=1e-5, atol=1e-6)
    half = pair.merged((0.5, 0.0, 1.0))
    middle = (before["vision.weight"] + after["vision.weight"]) / 2
    torch.testing.assert_close(half["vision.weight"], middle, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(half["language.weight"], before["language.weight"], rtol=0, atol=0)
    torch.testing.assert_close(half["head.weight"], after["head.weight"], rtol=1e-5, atol=1e-6)


def test_a_folder_without_weights_and_another_architecture_are_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PerennialError, match="holds no weights"):
        open_pair(TOY, base, tmp_path / "empty")
    torch_free = tmp_path / "other"
    torch_free.mkdir()
    save_file({"vision.weight": torch.zeros(2, 2)}, torch_free / "model.safetensors")
    with pytest.raises(PerennialError, match="does not fit the base"):
        open_pair(TOY, base, torch_free)


def adapted(base, folder):
    policy = ToyPolicy.load(base)
    add_adapter(policy, LoRA(3, 6), seed=0)
    shake(policy, 1)
    folder.mkdir()
    save_learned(policy, folder, "trained/on")
    return folder


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(base, tmp_path):
    folder = adapted(base, tmp_path / "learned")
    ToyPolicy(1).save(tmp_path / "other")
    with pytest.raises(PerennialError, match=r"was trained on other weights \(trained/on\) than those in .*other"):
        open_pair(TOY, tmp_path / "other", folder)
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": None}))
    assert open_pair(TOY, tmp_path / "other", folder).finetuned  # one that others made says nothing


def test_an_adapter_of_other_shapes_is_refused_by_the_name_of_its_layer(base, tmp_path):
    folder = adapted(base, tmp_path / "learned")
    weights = folder / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.head.lora_A.weight"
    save_file({n: t[:, 1:].contiguous() if n == key else t for n, t in load_file(weights).items()}, weights)
    with pytest.raises(PerennialError, match=r"updates head\.weight of shape .*, which the base .* does not have"):
        open_pair(TOY, base, folder)


def test_the_grid_is_sorted_and_groups_share_what_they_do_not_set():
    assert grid([1.0, 0.5], {}) == [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)]
    assert grid([1.0], {"language": [0.8, 0.2]}) == [(1.0, 0.2, 1.0), (1.0, 0.8, 1.0)]
    assert len(grid([0.0, 1.0], {"vision": [0.1, 0.2], "language": [0.3]})) == 4


POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points):
    flags = front(points)
    assert any(flags)
    for point, on_front in zip(points, flags, strict=True):
        better = [o for o in points if (o[0] > point[0] and o[1] >= point[1]) or (o[0] >= point[0] and o[1] > point[1])]
        assert on_front == (not better)


def test_the_rule_of_thumb_takes_the_least_sum_of_losses():
    assert likeliest([4.8, 2.9, 1.7, 1.4, 1.3, 1.27], [1.39, 1.4, 1.45, 1.54, 1.68, 1.86]) == 3
    assert likeliest([4.8, 2.9, 1.7, 1.4, 1.3, 1.27], [1.39, 1.39, 1.4, 1.4, 1.41, 1.42]) == 5
    assert likeliest([1.0, 1.0], [0.0, 1.0]) == 0
    assert likeliest([3.0, 3.0], [7.0, 7.0]) == 0


def test_losses_are_those_of_the_merged_policies(base):
    """Interpolated weights give another loss than interpolated losses; the policy itself comes back unharmed."""
    policy = ToyPolicy.load(base)
    before = policy.acting_weights()
    shake(policy, 1, size=0.5)
    pair = Pair(ToyPolicy.load(base), before, policy.acting_weights())
    rows = batch(16, seed=3)
    found = sweep._loss(pair, pair.merged((0.5,) * 3), rows)
    other = ToyPolicy()
    other.model.load_state_dict({n: (before[n] + policy.acting_weights()[n]) / 2 for n in before})
    assert found == pytest.approx(float(other.imitation_loss(rows).detach().mean()), rel=1e-5)
    assert all(torch.equal(weights, before[name]) for name, weights in pair.policy.acting_weights().items())
