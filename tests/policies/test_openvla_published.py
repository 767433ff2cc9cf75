"""Published OpenVLA folders: names, shapes and numbers of their tensors, reading, and writing them back."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from perennial.errors import PerennialError
from perennial.policies._openvla.config import Quantiles
from perennial.policies._openvla.keys import key_map
from perennial.policies._openvla.model import OpenVLAOFTModel
from perennial.policies._openvla.settings import Settings, read_config
from perennial.policies.base import Batch
from perennial.policies.lora import LoRA, add_adapter, base_shapes
from perennial.policies.openvla_oft import OpenVLAOFT
from perennial.randomness import stream
from perennial.testing.openvla_checkpoint import TINY_STATISTICS, TINY_TOWERS, write_openvla_checkpoint
from perennial.testing.policy_conformance import example_observation

OBSERVATION = example_observation(image_size=32, state_dim=3, rows=3)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_openvla_checkpoint(tmp_path_factory.mktemp("hub") / "openvla-tiny")


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "checkpoint"))


def tensors_of(folder):
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def settings(folder, **fields):
    path = folder / "perennial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits_of(policy):
    shape = (len(OBSERVATION), len(policy.token_steps))
    with torch.no_grad():
        return policy.logits(Batch(OBSERVATION, np.zeros(shape, np.int64), np.ones(shape, bool)))


def test_the_published_model_has_the_published_tensors(tmp_path):
    """OpenVLA 7B's own config.json leads to its 982 tensors and 7 541 237 184 numbers."""
    config = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [224, 224],
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "norm_stats": TINY_STATISTICS,
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path, Settings(), chunk=8, empty_token_id=29871)
    assert (read.vocab_size, read.prompt_end) == (32000, (29871,))
    with torch.device("meta"):
        model = OpenVLAOFTModel(read)
    tensors = key_map(read, base_shapes(model))
    counts = {part: sum(name.startswith(f"{part}.") for name in tensors) for part in ("vision_backbone", "projector")}
    assert counts == {"vision_backbone": 685, "projector": 6}
    assert len(tensors) == 982
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == 7_541_237_184
    assert tensors["vision_backbone.featurizer.blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert tensors["vision_backbone.featurizer.pos_embed"].shape == (1, 256, 1024)
    assert tensors["vision_backbone.fused_featurizer.attn_pool.kv.weight"].shape == (2304, 1152)
    assert tensors["language_model.lm_head.weight"].shape == (32064, 4096)
    assert tensors["language_model.lm_head.weight"].first_row == 31744


class TimmTower:
    """A vision transformer as timm computes it, from the published tensors."""

    def __init__(self, tensors, prefix, heads):
        self.tensors = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
        self.heads = heads

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x, name):
        return functional.layer_norm(
            x, x.shape[-1:], *(self.tensors[f"{name}.{kind}"] for kind in ("weight", "bias")), 1e-6
        )

    def attention(self, x, name):
        rows, length, width = x.shape
        qkv = self.linear(x, f"{name}.qkv").reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(rows, length, width), f"{name}.proj")

    def features(self, pixels, blocks):
        """All tokens after `blocks` blocks, [N, tokens, width]."""
        patch = self.tensors["patch_embed.proj.weight"]
        x = functional.conv2d(pixels, patch, self.tensors["patch_embed.proj.bias"], stride=patch.shape[-1])
        x = x.flatten(2).transpose(1, 2) + self.tensors["pos_embed"]
        first = [
            self.tensors[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in self.tensors
        ]
        x = torch.cat([*first, x], dim=1)
        for block in (f"blocks.{number}" for number in range(blocks)):
            one, two = (self.tensors.get(f"{block}.{name}.scale_factor", 1) for name in ("ls1", "ls2"))
            x = x + one * self.attention(self.norm(x, f"{block}.norm1"), f"{block}.attn")
            inner = functional.gelu(self.linear(self.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + two * self.linear(inner, f"{block}.mlp.fc2")
        return x


def test_the_towers_compute_what_timm_computes_from_the_published_tensors(published):
    policy, tensors = OpenVLAOFT.load(published), tensors_of(published)
    image = torch.from_numpy(stream(0, "pixels").random((2, 3, 32, 32), dtype=np.float32))
    expected = []
    for prefix, tower, skipped in (("featurizer", TINY_TOWERS.dino, 4), ("fused_featurizer", TINY_TOWERS.siglip, 0)):
        mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
        timm = TimmTower(tensors, f"vision_backbone.{prefix}.", tower.heads)
        expected.append(timm.features((image - mean) / std, tower.layers)[:, skipped:])
    with torch.no_grad():
        found = policy.model.vision_backbone(image[:, None])
    torch.testing.assert_close(found, torch.cat(expected, dim=-1), atol=1e-4, rtol=1e-4)


def test_the_action_rows_of_the_head_are_the_last_of_the_unpadded_vocabulary(published):
    policy, tensors = OpenVLAOFT.load(published), tensors_of(published)
    head = tensors["language_model.lm_head.weight"].float()
    end = len(head) - 64
    assert torch.equal(policy.model.language_model.lm_head.weight, head[end - 16 : end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_gives_the_same_bytes(published, tmp_path, dtype):
    OpenVLAOFT.load(published, dtype).save(tmp_path, torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in published.iterdir()}
    for path in published.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_one_file_without_index_is_read_and_written_too(published, tmp_path):
    one = write_openvla_checkpoint(tmp_path / "one", files=1)
    assert torch.equal(logits_of(OpenVLAOFT.load(one)), logits_of(OpenVLAOFT.load(published)))
    OpenVLAOFT.load(one, torch.bfloat16).save(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert not list((tmp_path / "again").glob("*.index.json"))


def test_what_was_learned_is_written_in_the_published_layout(published, tmp_path):
    policy = OpenVLAOFT.load(published)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            parameter += torch.from_numpy(stream(1, "learned", name).normal(0, 0.05, parameter.shape)).float()
    policy.save(tmp_path)
    before, after = tensors_of(published), tensors_of(tmp_path)
    unused = re.compile(r"featurizer\.(blocks\.2|norm|attn_pool)")
    for name in before:
        assert torch.equal(before[name].float(), after[name]) == bool(unused.search(name)), name
    head = "language_model.lm_head.weight"
    changed = (before[head].float() != after[head]).any(1).nonzero().flatten().tolist()
    assert changed == list(range(len(before[head]) - 80, len(before[head]) - 64))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    again = OpenVLAOFT.load(tmp_path)
    torch.testing.assert_close(logits_of(again), logits_of(policy), atol=1e-5, rtol=0)


def test_an_adapter_is_merged_into_the_written_checkpoint(published, tmp_path):
    policy = OpenVLAOFT.load(published)
    add_adapter(policy, LoRA(rank=2), 0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05
    policy.save(tmp_path)
    written = dict(OpenVLAOFT.load(tmp_path).model.named_parameters())
    for name, weight in policy.acting_weights().items():
        if not name.endswith("position_embeddings"):
            assert torch.equal(written[name], weight), name
    assert (written["projector.fc1.weight"] - policy.model.base_model.model.projector.fc1.base_layer.weight).any()


def test_weights_stay_in_the_file_until_they_are_written_to(folder):
    before = {file: file.read_bytes() for file in folder.glob("model*.safetensors")}
    policy = OpenVLAOFT.load(folder, torch.bfloat16)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(edge, 16) for edge in columns[0].split("-")) for columns in maps]
    assert len({columns[-1] for columns in maps}) == 2
    in_memory = {
        name
        for name, parameter in policy.model.named_parameters()
        if not any(low <= parameter.data_ptr() < high for low, high in ranges)
    }
    assert in_memory == {"vision_backbone.featurizer.embeddings.position_embeddings"}
    with torch.no_grad():
        policy.model.projector.fc1.weight.zero_()
    assert {file: file.read_bytes() for file in before} == before


def test_the_asked_type_counts_and_buffers_stay_exact(folder):
    settings(folder, dtype="bfloat16")
    policy = OpenVLAOFT.load(folder)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in OpenVLAOFT.load(folder, torch.float32).model.parameters()} == {torch.float32}
    assert policy.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(buffer.is_meta for buffer in policy.model.buffers())
    expected = logits_of(OpenVLAOFT.load(folder, torch.float32))
    torch.testing.assert_close(logits_of(policy), expected, atol=0.3, rtol=0.05)


def test_missing_unexpected_and_misshaped_tensors_are_all_named_in_one_sentence(folder):
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    del tensors["vision_backbone.featurizer.blocks.0.attn.qkv.weight"]
    tensors["vision_backbone.featurizer.blocks.0.attn.q.weight"] = torch.zeros(1)
    tensors["vision_backbone.featurizer.reg_token"] = torch.zeros(1, 4, 24)
    save_file(tensors, path)
    with pytest.raises(PerennialError, match=r"index .*blocks\.0\.attn\.q(kv)?\.weight"):
        OpenVLAOFT.load(folder)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {n: p.name for p in sorted(folder.glob("model-*")) if p != index for n in load_file(p)}
    index.write_text(json.dumps(values))
    message = (
        r"lacks vision_backbone\.featurizer\.blocks\.0\.attn\.qkv\.weight "
        r"and has unexpected vision_backbone\.featurizer\.blocks\.0\.attn\.q\.weight "
        r"and has tensors .*: vision_backbone\.featurizer\.reg_token \[1, 4, 24\] instead of \[1, 3, 24\];"
    )
    with pytest.raises(PerennialError, match=message):
        OpenVLAOFT.load(folder)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_missing_or_truncated_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(PerennialError, match=re.escape(name)):
        OpenVLAOFT.load(folder)
    (folder / name).unlink()
    with pytest.raises(PerennialError, match=re.escape(name)):
        OpenVLAOFT.load(folder)


def test_the_statistics_of_fine_tuning_take_the_place_of_the_models_own(folder):
    one = {"q01": [-2.0], "q99": [2.0]}
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": one}}))
    assert OpenVLAOFT.load(folder).config.norm_stats.action == Quantiles((-2.0,), (2.0,))
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": one}, "other": {"action": one}}))
    with pytest.raises(PerennialError, match=r'statistics of 2 data sets; .*"unnorm_key": "mine".*mine, other'):
        OpenVLAOFT.load(folder)
    settings(folder, unnorm_key="others")
    with pytest.raises(PerennialError, match=r"no data set .* 'others'\. Did you mean other"):
        OpenVLAOFT.load(folder)
    settings(folder, unnorm_key="other")
    assert OpenVLAOFT.load(folder).config.action_dim == 1


def test_statistics_of_libero_bring_its_gripper_and_its_camera(folder):
    def with_statistics(name):
        statistics = {name: {"action": {"q01": [-2.0], "q99": [2.0]}}}
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
        config = OpenVLAOFT.load(folder).config
        return config.gripper, config.camera_size

    assert with_statistics("bridge_orig") == ("unchanged", None)
    assert with_statistics("libero_spatial_no_noops") == ("libero", 256)
    settings(folder, gripper="unchanged", camera_size=64)
    assert with_statistics("libero_spatial_no_noops") == ("unchanged", 64)


def test_a_checkpoint_without_statistics_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_stats": None}))
    with pytest.raises(PerennialError, match=r"no statistics of actions, .*copy the latter"):
        OpenVLAOFT.load(folder)


def test_a_tokenizer_with_other_action_tokens_is_refused(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    entries = content["model"]["vocab"]
    size = len(entries)
    content["added_tokens"].append({**content["added_tokens"][0], "id": size, "content": "<PAD>"})
    path.write_text(json.dumps(content))
    OpenVLAOFT.load(folder)  # what was added after the vocabulary's end, such as padding, does not count
    entries["another"] = size
    content["added_tokens"].pop()
    path.write_text(json.dumps(content))
    ranges = f"{size - 15} to {size}, but those of its config.json are {size - 16} to {size - 1};"
    with pytest.raises(PerennialError, match=f"action tokens of the tokenizer in .* are {ranges}"):
        OpenVLAOFT.load(folder)


def test_states_of_another_robot_are_refused(folder):
    tensors = {"fc1.weight": (32, 3), "fc1.bias": (32,), "fc2.weight": (32, 32), "fc2.bias": (32,)}
    weights = {name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(weights, folder / "proprio_projector--7_checkpoint.safetensors")
    settings(folder, use_proprio=True)
    other = example_observation(image_size=32, state_dim=4, rows=1)
    with pytest.raises(PerennialError, match="reads 3 state numbers, but the observation has 4;"):
        OpenVLAOFT.load(folder).act(other, 0.0, [None])


def test_the_image_normalisation_is_the_processors(folder):
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text())
    values["tvf_normalize_params"][0]["mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(values))
    assert OpenVLAOFT.load(folder).config.dino.mean == (0.1, 0.2, 0.3)
    path.write_text(json.dumps(values | {"image_resize_strategy": "letterbox"}))
    with pytest.raises(PerennialError, match="'letterbox' images"):
        OpenVLAOFT.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layuot": "rl"}, "no setting in .* 'layuot'. Did you mean layout"),
        ({"layout": "left"}, "layout is 'left' .* rl, official"),
        ({"towers": {"patch_size": 8}}, "towers in .* cannot be read"),
        ({"chunk": "two"}, "chunk cannot be 'two' in "),
        ({"hold": 0}, "hold cannot be 0 in "),
        ({"views": True}, "views cannot be True in "),
        ({"use_proprio": 1}, "use_proprio cannot be 1 in "),
        ({"unnorm_key": 3}, "unnorm_key cannot be 3 in "),
        ({"dtype": "float16"}, "dtype is 'float16' .* float32, bfloat16"),
        ({"use_proprio": True}, r"0 files proprio_projector--\*\.safetensors.*copy the published one"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder, fields, message):
    settings(folder, **fields)
    with pytest.raises(PerennialError, match=message):
        OpenVLAOFT.load(folder)


def test_other_architectures_and_other_heads_are_refused(folder):
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"a pickle")
    with pytest.raises(PerennialError, match=r"head action_head--150000_checkpoint\.pt, which gives no log-prob"):
        OpenVLAOFT.load(folder)
    (folder / "action_head--150000_checkpoint.pt").unlink()
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["model_type"] = "mistral"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(PerennialError, match="but OpenVLA here is"):
        OpenVLAOFT.load(folder)


def test_the_proprioception_projector_comes_from_its_own_file(folder, tmp_path):
    plain = logits_of(OpenVLAOFT.load(folder))
    shapes = {"fc1.weight": (32, 3), "fc1.bias": (32,), "fc2.weight": (32, 32), "fc2.bias": (32,)}
    weights = {f"module.{n}": torch.from_numpy(stream(0, n).standard_normal(s)).float() for n, s in shapes.items()}
    save_file(weights, folder / "proprio_projector--7_checkpoint.safetensors")
    settings(folder, use_proprio=True)
    policy = OpenVLAOFT.load(folder)
    assert torch.equal(policy.model.proprio_projector.fc2.weight, weights["module.fc2.weight"])
    assert (logits_of(policy) - plain).abs().max() > 1e-3
    policy.save(tmp_path / "again")
    assert torch.equal(logits_of(OpenVLAOFT.load(tmp_path / "again")), logits_of(policy))


def test_a_learned_position_of_the_class_token_is_not_lost(published, tmp_path):
    policy = OpenVLAOFT.load(published)
    with torch.no_grad():
        positions = policy.model.vision_backbone.featurizer.embeddings.position_embeddings
        positions[:, 0] = torch.from_numpy(stream(0, "position").standard_normal(24))
    changed = (logits_of(policy) - logits_of(OpenVLAOFT.load(published))).abs().max()
    assert changed > 1e-3
    policy.save(tmp_path)
    torch.testing.assert_close(logits_of(OpenVLAOFT.load(tmp_path)), logits_of(policy), atol=1e-5, rtol=0)


def test_prompts_end_in_the_empty_token_or_do_not(folder):
    policy = OpenVLAOFT.load(folder)
    pieces = policy.tokenizer
    seen = []
    policy.model.language_model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(policy)
    text = f"In: What action should the robot take to {OBSERVATION.instructions[1]}?\nOut:"
    expected = [*pieces.encode(text, add_special_tokens=False).ids, pieces.token_to_id("▁")]
    assert seen[0][1, -len(expected) :].tolist() == expected
    assert seen[0][:, 0].tolist() == [1, 1, 1]
    settings(folder, empty_token=False)
    bare = OpenVLAOFT.load(folder)
    bare.model.language_model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(bare)
    assert seen[1][1, -len(expected) + 1 :].tolist() == expected[:-1]
