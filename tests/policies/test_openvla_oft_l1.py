"""The regression head of official OpenVLA-OFT checkpoints: against NumPy, from pickles, imitating, refusing RL."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_openvla_oft
import torch
from safetensors.torch import load_file, save_file

from perennial import config as configuration
from perennial.config import PolicyChoice, preset
from perennial.conversion import convert
from perennial.errors import PerennialError
from perennial.learning.ppo import PPO
from perennial.learning.sft import SFT
from perennial.policies import _anatomy
from perennial.policies._anatomy import Learning
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.policies.openvla_oft_l1 import OpenVLAOFTL1
from perennial.randomness import stream
from perennial.strategies.ewc import EWC
from perennial.testing import policy_conformance
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import Subject, example_observation

WIDTH, CHUNK, DIM = 32, 2, 3
OBSERVATION = example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM, views=2)
HEAD = {
    "layer_norm1": (DIM * WIDTH,),
    "fc1": (WIDTH, DIM * WIDTH),
    "mlp_resnet_blocks.0.ffn.0": (WIDTH,),
    "mlp_resnet_blocks.0.ffn.1": (WIDTH, WIDTH),
    "mlp_resnet_blocks.1.ffn.0": (WIDTH,),
    "mlp_resnet_blocks.1.ffn.1": (WIDTH, WIDTH),
    "layer_norm2": (WIDTH,),
    "fc2": (DIM, WIDTH),
}
PROPRIO = {"fc1": (WIDTH, 3), "fc2": (WIDTH, WIDTH)}


def random_tensors(layers, prefix):
    found = {}
    for name, shape in layers.items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            values = stream(0, name, kind).standard_normal(size).astype(np.float32) * 0.3
            found[f"{prefix}{name}.{kind}"] = torch.from_numpy(values)
    return found


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """As published: two views, proprioception, the stop token after the slots, and two pickles."""
    settings = {"chunk": CHUNK, "views": 2, "use_proprio": True, "layout": "official"}
    folder = write_openvla_checkpoint(tmp_path_factory.mktemp("hub") / "official", settings=settings)
    torch.save(random_tensors(HEAD, "module.model."), folder / "action_head--150000_checkpoint.pt")
    torch.save(random_tensors(PROPRIO, "module."), folder / "proprio_projector--150000_checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def official(pickled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "converted"
    folder.mkdir()
    for path in pickled.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.pt"):
        convert(path)
    return folder


def reference(states, weights):
    """The published head in NumPy, float64."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"module.model.{name}.weight"] + weights[f"module.model.{name}.bias"]

    def linear(x, name):
        return x @ weights[f"module.model.{name}.weight"].T + weights[f"module.model.{name}.bias"]

    x = states.reshape(len(states), CHUNK, DIM * WIDTH)
    x = np.maximum(linear(norm(x, "layer_norm1"), "fc1"), 0)
    for block in (0, 1):
        inner = f"mlp_resnet_blocks.{block}.ffn"
        x = x + np.maximum(linear(norm(x, f"{inner}.0"), f"{inner}.1"), 0)
    return linear(norm(x, "layer_norm2"), "fc2")


def test_the_head_is_the_published_one(official):
    policy = OpenVLAOFTL1.load(official)
    seen = []
    policy.model.action_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().numpy()))
    chunk = policy.act(OBSERVATION, 0.0, [None] * len(OBSERVATION))
    weights = {name: t.double().numpy() for name, t in random_tensors(HEAD, "module.model.").items()}
    unit = reference(seen[0], weights)
    np.testing.assert_allclose(chunk.sample.reshape(unit.shape), unit, atol=1e-5)
    low, high = np.array([-0.5, 0.0]), np.array([0.5, 2.0])
    moved = (unit[..., :2] + 1) / 2 * (high - low) + low
    np.testing.assert_allclose(chunk.actions, np.concatenate([moved, unit[..., 2:]], -1), atol=1e-5)
    assert chunk.log_prob.shape == (len(OBSERVATION), CHUNK * DIM)


def test_the_state_and_both_views_count(official):
    policy = OpenVLAOFTL1.load(official)
    said = policy.act(OBSERVATION, 0.0, [None] * len(OBSERVATION)).actions
    images = OBSERVATION.images.copy()
    images[:, 1] = 0
    for other in (replace(OBSERVATION, images=images), replace(OBSERVATION, states=-OBSERVATION.states)):
        changed = np.abs(policy.act(other, 0.0, [None] * len(other)).actions - said)
        assert (changed.max(axis=(1, 2)) > 1e-4).all()


def test_pickles_are_refused_with_the_command_that_converts_them(pickled):
    with pytest.raises(PerennialError, match=r"is a pickle.*`perennial convert .*proprio_projector--15\d+_\w+\.pt`"):
        OpenVLAOFTL1.load(pickled)
    with pytest.raises(PerennialError, match=r"imitate with --policy\.name openvla_oft_l1"):
        OpenVLAOFT.load(pickled)


def test_a_head_that_is_missing_or_of_another_size_is_named(official, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in official.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (head,) = folder.glob("action_head--*.safetensors")
    tensors = load_file(head)
    save_file(tensors | {"module.model.fc2.bias": torch.zeros(7)}, head)
    with pytest.raises(PerennialError, match=r"action_head\.model\.fc2\.bias.*\[7\]"):
        OpenVLAOFTL1.load(folder)
    head.unlink()
    (folder / "action_head--150000_checkpoint.pt").unlink()
    with pytest.raises(PerennialError, match=r"has 0 files action_head--\*\.safetensors, .* copy the published one"):
        OpenVLAOFTL1.load(folder)


def test_a_round_trip_keeps_head_and_projector(official, tmp_path):
    policy = OpenVLAOFTL1.load(official)
    policy.save(tmp_path / "again")
    for module in ("action_head", "proprio_projector"):
        (before,), (after,) = (list(f.glob(f"{module}--*.safetensors")) for f in (official, tmp_path / "again"))
        one, two = load_file(before), load_file(after)
        assert {name.removeprefix("module.") for name in one} == two.keys()
        assert all(torch.equal(tensor, two[name.removeprefix("module.")]) for name, tensor in one.items())
    again = OpenVLAOFTL1.load(tmp_path / "again")
    streams = [None] * len(OBSERVATION)
    np.testing.assert_array_equal(again.act(OBSERVATION, 0, streams).sample, policy.act(OBSERVATION, 0, streams).sample)


def test_encoding_is_the_inverse_of_decoding_without_bins(official):
    policy = OpenVLAOFTL1.load(official)
    sample = stream(0, "sample").uniform(-1.5, 1.5, (4, CHUNK * DIM)).astype(np.float32)
    np.testing.assert_allclose(policy.encode(policy.decode(sample)), sample, atol=1e-6)


def test_imitation_is_the_absolute_error_of_unmasked_numbers(official):
    policy = OpenVLAOFTL1.load(official)
    rows, count = len(OBSERVATION), CHUNK * DIM
    said = policy.act(OBSERVATION, 0.0, [None] * rows).sample
    target = stream(0, "target").uniform(-1, 1, said.shape).astype(np.float32)
    mask = np.ones((rows, count), bool)
    mask[0, 2:] = False
    loss = policy.imitation_loss(Batch(OBSERVATION, target, mask)).detach().numpy()
    error = np.abs(said - target)
    np.testing.assert_allclose(loss, [error[0, :2].mean(), *error[1:].mean(1)], atol=1e-5)


def tiny():
    return tiny_openvla_oft.tiny_policy(kind=OpenVLAOFTL1, regression=True)


@pytest.mark.parametrize(
    "check",
    [policy_conformance.every_parameter_is_in_one_group, policy_conformance.the_adapter_covers_all_linear_layers],
)
def test_what_conformance_asks_of_its_parameters(check):
    check(Subject(tiny, example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM)))


@pytest.mark.parametrize("adapter", [False, True])
def test_imitation_learns_and_what_was_learned_acts(adapter, tmp_path):
    policy = tiny()
    observation = example_observation(image_size=32, state_dim=tiny_openvla_oft.STATE_DIM)
    sample = stream(0, "wanted").uniform(-1, 1, (len(observation), len(policy.token_steps))).astype(np.float32)
    batch = Batch(observation, sample, np.ones(sample.shape, bool))
    before = policy.imitation_loss(batch).mean().item()
    if adapter:
        add_adapter(policy, LoRA(rank=8, alpha=16), 0)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        policy.imitation_loss(batch).mean().backward()
        optimizer.step()
    after = policy.imitation_loss(batch).mean().item()
    assert after < 0.8 * before
    policy.save(tmp_path)
    acted = OpenVLAOFTL1.load(tmp_path).act(observation, 0.0, [None] * len(observation))
    assert np.abs(acted.sample - sample).mean() == pytest.approx(after, rel=1e-3)


def choice(folder):
    return PolicyChoice(name="openvla_oft_l1", checkpoint=str(folder))


@pytest.mark.parametrize("stage", [preset("demo").recipe[0], PPO()], ids=lambda stage: stage.name)
def test_reinforcement_learning_is_refused_before_a_run_starts(official, stage):
    config = replace(preset("demo"), policy=choice(official), recipe=(stage,))
    with pytest.raises(PerennialError, match=f"'{stage.name}' needs `log_prob`.* as its regression head"):
        configuration.validate(config)


def test_ewc_is_refused_and_imitation_is_not(official, tmp_path):
    imitating = replace(preset("demo"), policy=choice(official), recipe=(SFT(demonstrations=str(tmp_path)),))
    with pytest.raises(PerennialError, match="'ewc' needs `log_prob`"):
        configuration.validate(replace(imitating, strategies=(EWC(),)))
    with pytest.raises(PerennialError, match="demonstrations"):  # the next thing that is checked
        configuration.validate(imitating)
    policy = OpenVLAOFTL1.load(official)
    batch = Batch(OBSERVATION, np.zeros((len(OBSERVATION), CHUNK * DIM), np.float32), np.ones((1, 1), bool))
    for method in (policy.log_prob, policy.logits):
        with pytest.raises(PerennialError, match="imitate, or choose another policy"):
            method(batch)


def test_the_plan_counts_the_head(official):
    policy = OpenVLAOFTL1.load(official)
    anatomy = OpenVLAOFTL1.anatomy(official, "push the red block")
    assert _anatomy.parameters(anatomy) == sum(p.numel() for p in policy.model.parameters())
    add_adapter(policy, LoRA(rank=2), 0)
    unused = 2 * (WIDTH + policy.config.action_bins)  # the language model's head
    learned = sum(p.numel() for name, p in policy.model.named_parameters() if ".lora_" in name)
    assert _anatomy.adapter_parameters(anatomy, Learning(2)) == learned - unused
    with_head, without = (_anatomy.parameters(kind.anatomy(None, "push")) for kind in (OpenVLAOFTL1, OpenVLAOFT))
    assert (
        with_head - without
        == 7 * 4096 * 2 + 7 * 4096**2 + 4096 + 2 * (2 * 4096 + 4096**2 + 4096) + 2 * 4096 + 7 * 4096 + 7
    )
