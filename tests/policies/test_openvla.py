"""OpenVLA against plain references: decoding without a cache over the full vocabulary, bins, statistics and gripper."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_openvla_oft import tiny_policy
from transformers import LlamaConfig, LlamaForCausalLM

from perennial import experiment
from perennial.config import PolicyChoice
from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.learning.optimizer import AdamWConfig
from perennial.policies._openvla.decoding import causal_states
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA
from perennial.policies.openvla import OpenVLA
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.randomness import stream
from perennial.testing.openvla_checkpoint import write_openvla_checkpoint
from perennial.testing.policy_conformance import example_observation
from toyhouse.runs import toy_config

OBSERVATION = example_observation(image_size=32, state_dim=0, rows=4)
SEVEN = {
    "action": {"q01": [-0.9, -0.8, -0.7, -0.3, -0.2, -0.1, 0.0], "q99": [0.9, 0.8, 0.7, 0.3, 0.2, 0.1, 1.0]},
}
SEVEN["action"]["mask"] = [True] * 6 + [False]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_openvla_checkpoint(tmp_path_factory.mktemp("hub") / "openvla", statistics={"bridge_orig": SEVEN})


@pytest.fixture(scope="module")
def policy(published):
    return OpenVLA.load(published)


def streams(purpose="act"):
    return [stream(0, purpose, row) for row in range(len(OBSERVATION))]


def batch_of(chunk, temperature=1.0):
    return Batch(OBSERVATION, chunk.sample, np.ones(chunk.sample.shape, bool), temperature, chunk.log_prob)


class PlainDecoder:
    """One row at a time: transformers' own causal Llama with the full published head, no cache and no padding."""

    def __init__(self, policy, folder):
        model, self.config = policy.model, policy.config
        sizes = model.language_model.config.to_dict() | {"rms_norm_eps": 1e-6}
        self.llama = LlamaForCausalLM(LlamaConfig.from_dict(sizes)).eval()
        tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        prefix = "language_model."
        self.llama.load_state_dict(
            {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
        )
        self.policy = policy

    def prompt(self, row):
        pieces, image = self.policy.tokenizer, torch.from_numpy(OBSERVATION.images[row]).float() / 255
        text = f"In: What action should the robot take to {OBSERVATION.instructions[row].lower()}?\nOut:"
        ids = [*pieces.encode(text, add_special_tokens=False).ids, pieces.token_to_id("▁")]
        model, embed = self.policy.model, self.llama.model.embed_tokens
        patches = model.projector(model.vision_backbone(image.permute(0, 3, 1, 2)[None]))[0]
        return torch.cat([embed(torch.tensor([1])), patches, embed(torch.tensor(ids))])

    def log_probs(self, row, tokens):
        """Of the action tokens after `tokens`, -inf for all others: [vocabulary]."""
        embedded = torch.cat([self.prompt(row), self.llama.model.embed_tokens(torch.tensor(tokens, dtype=torch.long))])
        logits = self.llama(inputs_embeds=embedded[None]).logits[0, -1]
        end, bins = self.config.vocab_size, self.config.action_bins
        masked = torch.full_like(logits, -torch.inf)
        masked[end - bins : end] = logits[end - bins : end]
        return masked.log_softmax(-1)


def test_greedy_decoding_is_that_of_the_plain_model(policy, published):
    plain, chunk = PlainDecoder(policy, published), policy.act(OBSERVATION, 0.0, streams())
    first = policy.config.vocab_size - policy.config.action_bins
    with torch.no_grad():
        for row in range(len(OBSERVATION)):
            tokens = []
            for _ in range(7):
                tokens.append(int(plain.log_probs(row, tokens).argmax()))
            assert tokens == (first + chunk.sample[row]).tolist()


def test_teacher_forcing_gives_the_log_probabilities_of_the_plain_model(policy, published):
    plain, chunk = PlainDecoder(policy, published), policy.act(OBSERVATION, 1.0, streams())
    first = policy.config.vocab_size - policy.config.action_bins
    with torch.no_grad():
        found = policy.log_prob(batch_of(chunk))
        for row in range(len(OBSERVATION)):
            tokens = (first + chunk.sample[row]).tolist()
            expected = [float(plain.log_probs(row, tokens[:k])[tokens[k]]) for k in range(7)]
            np.testing.assert_allclose(found[row], expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_acting_and_learning_agree(published, dtype, tolerance):
    policy = OpenVLA.load(published, dtype)
    chunk = policy.act(OBSERVATION, 1.6, streams())
    with torch.no_grad():
        found = policy.log_prob(batch_of(chunk, 1.6)).numpy()
    np.testing.assert_allclose(found, chunk.log_prob, atol=tolerance)
    assert found.std() > 2 * tolerance


def test_a_token_depends_on_those_before_it_and_on_no_other(policy):
    chunk = policy.act(OBSERVATION, 1.0, streams())
    with torch.no_grad():
        before = policy.logits(batch_of(chunk))
        changed = chunk.sample.copy()
        changed[:, 3] = (changed[:, 3] + 5) % 16
        after = policy.logits(dataclasses.replace(batch_of(chunk), sample=changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(dim=(0, 2)) > 1e-4).all()


def test_padding_is_not_seen(policy):
    network = policy.model
    with torch.no_grad():
        added, mask = network.prefix(*policy._inputs(OBSERVATION))
        assert not mask.all()
        expected = causal_states(network, added, mask, 1)
        found = causal_states(network, torch.where(mask[..., None], added, 100.0), mask, 1)
    assert torch.equal(found, expected)


def test_sampling_follows_the_softmax_of_each_token_given_the_tokens_before(policy):
    rows = 1000
    one = OBSERVATION.take(np.zeros(1, np.int64))
    many = one.take(np.zeros(rows, np.int64))
    chunk = policy.act(many, 1.6, [stream(0, "draw", i) for i in range(rows)])
    batch = Batch(many, chunk.sample, np.ones(chunk.sample.shape, bool), 1.6)
    with torch.no_grad():
        expected = (policy.logits(batch) / 1.6).softmax(-1).numpy()
    for token in range(7):  # over prefixes, the mean of the conditional distributions is the marginal one
        observed = np.bincount(chunk.sample[:, token], minlength=16) / rows
        error = np.sqrt(observed.clip(1 / rows) / rows)
        assert (np.abs(observed - expected[:, token].mean(0)) < 5 * error).all()


def published_action(token, stats, vocabulary, bins=256):
    """`predict_action` of the published code, on single numbers."""
    edges = np.linspace(-1, 1, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    unit = centres[np.clip(vocabulary - token - 1, 0, len(centres) - 1)]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    return np.where(stats["mask"], 0.5 * (unit + 1) * (high - low) + low, unit)


def test_tokens_stand_for_the_published_actions(policy):
    sample = stream(0, "tokens").integers(0, 256, (20, 7))
    wide = OpenVLA(dataclasses.replace(policy.config, action_bins=256), policy.tokenizer, policy.model)
    actions = wide.decode(sample)
    assert actions.shape == (20, 1, 7)
    for row in range(20):
        expected = published_action(32000 - 256 + sample[row], SEVEN["action"], 32000)
        np.testing.assert_allclose(actions[row, 0], expected, atol=1e-6)


def test_liberos_gripper_is_a_command(policy):
    """Opening 1 becomes -1 (open), 0 becomes 1 (closed): LIBERO's own convention."""
    libero = OpenVLA(dataclasses.replace(policy.config, gripper="libero"), policy.tokenizer, policy.model)
    sample = np.tile(np.arange(16)[:, None], 7)
    plain, commands = policy.decode(sample), libero.decode(sample)
    np.testing.assert_array_equal(commands[..., :6], plain[..., :6])
    np.testing.assert_array_equal(commands[..., 6], np.where(plain[..., 6] > 0.5, -1, 1))
    opened, closed = libero.encode(np.array([-1.0, 1.0])[:, None, None] * np.ones((1, 1, 7)))[:, 6]
    assert libero.decode(np.full((1, 7), opened))[0, 0, 6] == -1
    assert libero.decode(np.full((1, 7), closed))[0, 0, 6] == 1


def test_the_official_layout_has_a_stop_token_after_the_slots(published, tmp_path):
    """Every slot sees it, and what is read stays one position before each slot."""
    folder = Path(shutil.copytree(published, tmp_path / "oft"))
    path = folder / "perennial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": "official", "chunk": 2}))
    official, inputs = OpenVLAOFT.load(folder), []
    network, one = official.model, OBSERVATION.take(np.zeros(1, np.int64))
    hook = network.language_model.model.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = Batch(one, np.zeros((1, 14), np.int64), np.ones((1, 14), bool))
    with torch.no_grad():
        logits = official.logits(batch)
        hook.remove()
        (sequence,) = inputs
        assert torch.equal(sequence[0, -1], network.language_model.model.embed_tokens.weight[2])
        assert (sequence[:, -15:-1] == 0).all()
        everywhere = torch.zeros(1, 1, sequence.shape[1], sequence.shape[1])
        states = network.language_model.model(inputs_embeds=sequence, attention_mask=everywhere).last_hidden_state
        torch.testing.assert_close(logits, network.language_model.lm_head(states[:, -16:-2]), atol=1e-4, rtol=1e-4)
        network.stop_token_id = None
        assert (official.logits(batch) - logits).abs().amax(dim=(0, 2)).min() > 1e-5


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    tiny_policy(kind=OpenVLA).save(tmp_path)
    with pytest.raises(PerennialError, match=r"of 'openvla', which .*; set --policy\.name openvla\."):
        OpenVLAOFT.load(tmp_path)


@pytest.mark.parametrize(("backend", "dtype"), [("inline", "float32"), ("process", "bfloat16"), ("shared", "bfloat16")])
def test_a_run_learns_from_a_published_checkpoint(tmp_path, monkeypatch, backend, dtype):
    monkeypatch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")
    two = {"action": {"q01": [-1.0, -0.2], "q99": [0.3, 0.2]}}  # so that some episodes succeed by chance
    settings = {"hold": 5, "dtype": dtype}
    folder = write_openvla_checkpoint(tmp_path / "base", statistics={"toy": two}, settings=settings)
    config = toy_config(folder)
    config = dataclasses.replace(
        config,
        tasks=dataclasses.replace(config.tasks, trained=("left",), held_out=()),
        policy=PolicyChoice("openvla", str(folder), LoRA(2, 2)),
        recipe=(GRPO(iterations=1, groups=2, group_size=8, optimizer=AdamWConfig(learning_rate=1e-4)),),
        evaluation=dataclasses.replace(config.evaluation, episodes=2),
        workers=dataclasses.replace(config.workers, backend=backend),
    )
    run = experiment.start(config, "openvla", tmp_path / "run")
    (line,) = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())
    assert line["kept"] > 0
    assert line["grad_norm"] > 0
    assert line["kl"] < 0.02, "what acted is not what learned"
    learned = load_file(next((run / "tasks").rglob("adapter_model.safetensors")))
    assert any(tensor.any() for name, tensor in learned.items() if "lora_B" in name)
