"""OpenVLA-OFT against plain references: the published action tokens, and the network computed the long way."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from tiny_openvla_oft import ACTION, STATE_DIM, tiny_policy
from transformers import Dinov2WithRegistersModel, LlamaConfig, LlamaForCausalLM, SiglipVisionModel

from perennial.errors import PerennialError
from perennial.policies._openvla.config import HALF, IMAGENET_MEAN, IMAGENET_STD, Language, Tower
from perennial.policies._openvla.model import OpenVLAOFTModel
from perennial.policies.base import Batch, Observation
from perennial.policies.openvla_oft import NormStats, OpenVLAOFT, OpenVLAOFTConfig, Quantiles
from perennial.randomness import stream
from perennial.testing.policy_conformance import example_observation


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


def batch_of(policy, observation):
    shape = (len(observation), len(policy.token_steps))
    return Batch(observation, np.zeros(shape, np.int64), np.ones(shape, bool))


def logits_of(policy, observation):
    with torch.no_grad():
        return policy.logits(batch_of(policy, observation)).numpy()


class PublishedActionTokens:
    """What OpenVLA's action tokenizer and un-normalisation do, on single numbers."""

    def __init__(self, vocab_size, bins):
        self.vocab_size, self.edges = vocab_size, np.linspace(-1.0, 1.0, bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2.0

    def token(self, value):
        return self.vocab_size - int(np.digitize(np.clip(value, -1.0, 1.0), self.edges))

    def value(self, token):
        return self.centres[int(np.clip(self.vocab_size - token - 1, 0, len(self.centres) - 1))]


PUBLISHED = PublishedActionTokens(vocab_size=32000, bins=256)
PUBLISHED_POLICY = tiny_policy(action_bins=256, chunk=1, hold=1)


@given(arrays(np.float64, 3, elements=st.floats(-3, 3)))
def test_encode_gives_the_published_tokens(action):
    sample = PUBLISHED_POLICY.encode(action[None, None])[0]
    unit = [2 * (action[0] + 0.5) / 1.0 - 1, 2 * action[1] / 2.0 - 1, action[2]]  # q01, q99 of ACTION; gripper as it is
    assert [32000 - 256 + place for place in sample] == [PUBLISHED.token(value) for value in unit]


@given(arrays(np.int64, 3, elements=st.integers(0, 255)))
def test_decode_gives_the_published_actions(sample):
    values = [PUBLISHED.value(32000 - 256 + place) for place in sample]
    expected = [(values[0] + 1) / 2 * 1.0 - 0.5, (values[1] + 1) / 2 * 2.0, values[2]]
    np.testing.assert_allclose(PUBLISHED_POLICY.decode(sample[None])[0, 0], expected, atol=1e-6)


def test_golden_tokens_of_the_ends_and_the_middle():
    unit = Quantiles((-1.0,), (1.0,))
    config = dataclasses.replace(PUBLISHED_POLICY.config, norm_stats=NormStats(unit), use_proprio=False)
    policy = OpenVLAOFT(config, PUBLISHED_POLICY.tokenizer, PUBLISHED_POLICY.model)
    encoded = policy.encode(np.array([-1.0, -0.999, 0.0, 0.999, 1.0])[:, None, None])
    assert encoded.ravel().tolist() == [255, 255, 128, 1, 0]
    decoded = policy.decode(np.array([[255], [128], [1], [0]])).ravel()
    np.testing.assert_allclose(decoded, [-254 / 255, 0.0, 254 / 255, 254 / 255], atol=1e-7)


def test_each_action_is_held_and_encoded_by_the_mean_of_its_window(policy):
    sample = stream(0, "sample").integers(1, 16, (4, 6))
    actions = policy.decode(sample)
    assert actions.shape == (4, 6, 3)
    np.testing.assert_array_equal(actions[:, :3], np.repeat(actions[:, :1], 3, axis=1))
    np.testing.assert_array_equal(policy.token_steps, [0, 0, 0, 3, 3, 3])
    wobble = np.array([-0.4, 0.4, 0.0] * 2)[None, :, None] * np.array([1.0, 1.0, 0.0])
    np.testing.assert_array_equal(policy.encode(actions + wobble), sample)


def test_a_dimension_that_never_moved_encodes_and_acts_as_its_value():
    still = NormStats(Quantiles((0.25,), (0.25,)))
    config = dataclasses.replace(PUBLISHED_POLICY.config, norm_stats=still, use_proprio=False)
    policy = OpenVLAOFT(config, PUBLISHED_POLICY.tokenizer, PUBLISHED_POLICY.model)
    sample = policy.encode(np.full((1, 1, 1), 0.25))
    assert policy.decode(sample).item() == 0.25


def full_towers(model, config):
    """The towers as published: one block more, final norms, all of transformers' own forward passes."""
    towers = []
    for kind, short in (
        (Dinov2WithRegistersModel, model.vision_backbone.featurizer),
        (SiglipVisionModel, model.vision_backbone.fused_featurizer),
    ):
        sizes = short.config.to_dict() | {"num_hidden_layers": short.config.num_hidden_layers + 1}
        sizes |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
        tower = kind(type(short.config).from_dict(sizes)).eval()
        missing, unexpected = tower.load_state_dict(short.state_dict(), strict=False)
        assert not unexpected
        assert all("norm" in name or "layer" in name or "mask_token" in name for name in missing)
        towers.append(tower)
    return towers


def naive_logits(policy, observation, row):
    """One row the long way: no padding, whole sequence, eager attention, full vocabulary."""
    model, config = policy.model, policy.config
    image = torch.from_numpy(observation.images[row, 0]).float() / 255
    features = []
    for tower, sizes in zip(full_towers(model, config), (config.dino, config.siglip), strict=True):
        pixels = ((image - torch.tensor(sizes.mean)) / torch.tensor(sizes.std)).permute(2, 0, 1)[None]
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0]
        features.append(hidden[len(hidden) - 16 :])
    projector = model.projector
    patches = torch.cat(features, dim=1)
    for layer in (projector.fc1, projector.fc2):
        patches = torch.nn.functional.gelu(patches @ layer.weight.T + layer.bias)
    patches = patches @ projector.fc3.weight.T + projector.fc3.bias
    state = torch.from_numpy(np.clip(observation.states[row], -1, 1))
    proprio = model.proprio_projector.fc2(torch.nn.functional.gelu(model.proprio_projector.fc1(state)))[None]
    text = f"In: What action should the robot take to {observation.instructions[row].lower()}?\nOut: "
    prompt = policy.tokenizer.encode(text, add_special_tokens=False).ids
    embed = model.language_model.model.embed_tokens.weight
    slots = torch.zeros(config.tokens, embed.shape[1])
    sequence = torch.cat([embed[[config.bos_token_id]], patches, proprio, embed[prompt], slots])[None]
    sizes = model.language_model.config.to_dict() | {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    llama = LlamaForCausalLM(LlamaConfig.from_dict(sizes))
    llama.set_attn_implementation("eager")
    head = torch.zeros(config.vocab_size, embed.shape[1])
    head[-config.action_bins :] = model.language_model.lm_head.weight
    head[: -config.action_bins] = torch.randn(len(head) - config.action_bins, embed.shape[1])
    llama.load_state_dict(model.language_model.state_dict() | {"lm_head.weight": head})
    everywhere = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1])
    logits = llama.eval()(inputs_embeds=sequence, attention_mask=everywhere).logits[0]
    read = logits[-config.tokens - 1 : -1].clone()
    read[:, : -config.action_bins] = -torch.inf
    return read.log_softmax(-1)[:, -config.action_bins :]


def test_the_network_is_the_published_one_computed_the_long_way(policy):
    observation = example_observation(image_size=32, state_dim=STATE_DIM, rows=3)
    batched = torch.from_numpy(logits_of(policy, observation)).log_softmax(-1)
    with torch.no_grad():
        for row in range(3):
            expected = naive_logits(policy, observation, row)
            torch.testing.assert_close(batched[row], expected, atol=1e-4, rtol=0)
            alone = torch.from_numpy(logits_of(policy, observation.take(np.array([row])))[0]).log_softmax(-1)
            torch.testing.assert_close(alone, expected, atol=1e-4, rtol=0)


def test_attention_runs_in_both_directions(policy):
    """The hidden state that the first action is read from depends on the last slot, which comes after it."""
    observation = example_observation(image_size=32, state_dim=STATE_DIM, rows=1)
    first_layer = policy.model.language_model.model.layers[0]
    inputs = []

    def change_last_slot(module, args):
        inputs.append(args[0])
        changed = args[0].clone()
        changed[:, -1] += 1
        return (changed, *args[1:])

    before = logits_of(policy, observation)
    hook = first_layer.register_forward_pre_hook(change_last_slot)
    after = logits_of(policy, observation)
    hook.remove()
    assert (inputs[0][:, -len(policy.token_steps) :] == 0).all(), "slots are not zero"
    assert np.abs(after - before)[0, 0].max() > 1e-3


def test_sampling_follows_the_softmax_at_the_temperature(policy):
    rows = 1000
    one = example_observation(image_size=32, state_dim=STATE_DIM, rows=1)
    many = one.take(np.zeros(rows, np.int64))
    chunk = policy.act(many, 1.6, [stream(0, "draw", i) for i in range(rows)])
    expected = np.exp(logits_of(policy, one)[0] / 1.6)
    expected /= expected.sum(1, keepdims=True)
    for token in range(expected.shape[0]):
        observed = np.bincount(chunk.sample[:, token], minlength=expected.shape[1]) / rows
        error = np.sqrt(expected[token] * (1 - expected[token]) / rows)
        assert (np.abs(observed - expected[token]) < 5 * error + 1e-9).all()


def test_the_state_is_normalised_and_clipped():
    policy = tiny_policy(norm_stats=NormStats(ACTION, Quantiles((0.0,) * 3, (10.0,) * 3)))
    observation = example_observation(image_size=32, state_dim=STATE_DIM, rows=1)

    def at(value):
        return logits_of(policy, Observation(observation.images, observation.instructions, np.full((1, 3), value)))

    np.testing.assert_array_equal(at(10.0), at(99.0))
    np.testing.assert_array_equal(at(0.0), at(-5.0))
    assert np.abs(at(0.0) - at(10.0)).max() > 1e-3


def test_a_state_that_never_moved_plays_no_part():
    policy = tiny_policy(norm_stats=NormStats(ACTION, Quantiles((-1.0, -1.0, 0.3), (1.0, 1.0, 0.3))))
    observation = example_observation(image_size=32, state_dim=STATE_DIM)
    moved = observation.states + np.array([0, 0, 5], np.float32)
    other = Observation(observation.images, observation.instructions, moved)
    np.testing.assert_array_equal(logits_of(policy, observation), logits_of(policy, other))


def test_without_proprioception_the_state_plays_no_part():
    policy = tiny_policy(use_proprio=False)
    observation = example_observation(image_size=32, state_dim=STATE_DIM)
    other = Observation(observation.images, observation.instructions, observation.states + 1)
    np.testing.assert_array_equal(logits_of(policy, observation), logits_of(policy, other))
    assert not any("proprio" in name for name, _ in policy.model.named_parameters())


def test_each_view_is_seen():
    policy = tiny_policy(views=2)
    observation = example_observation(image_size=32, state_dim=STATE_DIM, views=2)
    swapped = Observation(observation.images[:, ::-1], observation.instructions, observation.states)
    assert np.abs(logits_of(policy, observation) - logits_of(policy, swapped)).max() > 1e-4
    with pytest.raises(PerennialError, match="2 cameras, but the observation has 1"):
        logits_of(policy, example_observation(image_size=32, state_dim=STATE_DIM, views=1))


def test_create_is_named_by_the_seed_alone():
    torch.manual_seed(5)
    first = tiny_policy(seed=1).acting_weights()
    torch.manual_seed(6)
    again, other = tiny_policy(seed=1).acting_weights(), tiny_policy(seed=2).acting_weights()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projector.fc1.weight"], other["projector.fc1.weight"])


def test_every_parameter_takes_part(policy):
    batch = batch_of(policy, example_observation(image_size=32, state_dim=STATE_DIM))
    policy.imitation_loss(batch).mean().backward()
    assert [name for name, p in policy.model.named_parameters() if p.grad is None or not p.grad.any()] == []
    policy.model.zero_grad()


def test_config_survives_json(policy):
    again = OpenVLAOFTConfig.from_json(json.loads(json.dumps(policy.config.to_json())))
    assert again == policy.config


def test_half_size_checkpoint_loads_as_float32(policy, tmp_path):
    policy.save(tmp_path / "full")
    policy.save(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = OpenVLAOFT.load(tmp_path / "half")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, policy.acting_weights()[name], rtol=2**-8, atol=0)


def test_bfloat16_weights_act_with_exact_positions(policy, tmp_path):
    policy.save(tmp_path)
    half = OpenVLAOFT.load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    observation = example_observation(image_size=32, state_dim=STATE_DIM)
    assert half.logits(batch_of(half, observation)).dtype == torch.float32
    np.testing.assert_allclose(logits_of(half, observation), logits_of(policy, observation), atol=0.2)


@pytest.fixture
def checkpoint(policy, tmp_path):
    policy.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_or_truncated_file_is_named(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(PerennialError, match=name):
        OpenVLAOFT.load(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(PerennialError, match=f"has no {name}"):
        OpenVLAOFT.load(checkpoint)


def test_tensors_that_do_not_fit_are_named(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    fc1 = tensors["projector.fc1.weight"]
    cases = {
        r"lacks projector\.fc1\.weight;": {n: t for n, t in tensors.items() if n != "projector.fc1.weight"},
        r"unexpected stray;": tensors | {"stray": torch.zeros(1)},
        r"projector\.fc1\.weight \[1, 56\] instead of \[48, 56\]": tensors | {"projector.fc1.weight": fc1[:1].clone()},
        r"lacks .* and \d+ more;": {"projector.fc1.weight": fc1},
    }
    for message, changed in cases.items():
        save_file(changed, path)
        with pytest.raises(PerennialError, match=message):
            OpenVLAOFT.load(checkpoint)


def test_the_same_class_has_the_published_size():
    """Llama-2 7B, DINOv2 large and SigLIP so400m without their unused parts."""
    config = OpenVLAOFTConfig(
        image_size=224,
        patch_size=14,
        dino=Tower(1024, 23, 16, 4096, IMAGENET_MEAN, IMAGENET_STD, registers=4),
        siglip=Tower(1152, 26, 16, 4304, HALF, HALF),
        projector_width=8704,
        language=Language(4096, 32, 32, 32, 11008),
        vocab_size=32000,
        embedding_rows=32064,
        action_bins=256,
        chunk=8,
        hold=1,
        norm_stats=NormStats(Quantiles((-1.0,) * 7, (1.0,) * 7, (True,) * 6 + (False,))),
        use_proprio=False,
        bos_token_id=1,
    )
    assert config.tokens == 56
    with torch.device("meta"):
        model = OpenVLAOFTModel(config)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    llama_2_7b = 6_738_415_616
    assert count(model.language_model) == llama_2_7b + 64 * 4096 - (32000 - 256) * 4096
    dino_block, siglip_block = 12 * 1024**2 + 15 * 1024, 4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304
    dino = 23 * dino_block + 1024 * (3 * 14**2 + 1 + 256 + 1 + 1 + 4)
    siglip = 26 * siglip_block + 1152 * (3 * 14**2 + 1 + 256)
    assert count(model.vision_backbone) == dino + siglip
    assert count(model.projector) == 2176 * 8704 + 8704 + 8704 * 4096 + 4096 + 4096**2 + 4096
