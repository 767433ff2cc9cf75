"""Tensor names of known policies fall into the groups that the papers give them."""

from __future__ import annotations

import pytest

from perennial.errors import PerennialError
from perennial.merging.groups import coefficients, group_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("vision_backbone.featurizer.blocks.0.attn.qkv.weight", "vision"),
        ("vision_backbone.fused_featurizer.blocks.0.mlp.fc1.bias", "vision"),
        ("projector.fc1.weight", "vision"),
        ("language_model.model.layers.3.self_attn.q_proj.weight", "language"),
        ("language_model.model.embed_tokens.weight", "language"),
        ("language_model.lm_head.weight", "action"),
        ("proprio_projector.fc1.weight", "action"),
        ("paligemma_with_expert.paligemma.model.vision_tower.vision_model.head.probe", "vision"),
        ("paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight", "vision"),
        ("paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.up_proj.weight", "language"),
        ("paligemma_with_expert.paligemma.lm_head.weight", "language"),
        ("paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight", "action"),
        ("paligemma_with_expert.gemma_expert.lm_head.weight", "action"),
        ("model.action_time_mlp_in.weight", "action"),
        ("time_mlp_out.bias", "action"),
        ("state_proj.weight", "action"),
        ("model.dit.layers.0.self_attn.q_proj.weight", "action"),
        ("model.embed_action_time.action_in_proj.weight", "action"),
        ("model.vlm.vision_tower.vision_model.post_layernorm.weight", "vision"),
        ("model.vlm.language_model.norm.weight", "language"),
        ("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight", "vision"),
        ("model.vlm_with_expert.vlm.model.text_model.layers.0.mlp.up_proj.weight", "language"),
        ("model.vlm_with_expert.lm_expert.layers.0.mlp.up_proj.weight", "action"),
        ("interaction.weight", "other"),
        ("audio.ditto.weight", "other"),
    ],
)
def test_group_of_a_known_name(name, group):
    assert group_of(name) == group


def test_the_groups_of_our_policy_are_found_by_name():
    pytest.importorskip("transformers")
    from perennial.policies.openvla_oft import GROUP_OF_MODULE

    for module, group in GROUP_OF_MODULE.items():
        assert group_of(f"{module}.x.weight") == group


def test_coefficients_follow_groups_and_other_prefixes_may_be_given():
    names = ["projector.fc1.weight", "lm_head.weight", "mystery"]
    assert coefficients(names, 0.5, {"vision": 1.0, "other": 0.0}) == dict(zip(names, (1.0, 0.5, 0.0), strict=True))
    mine = {"projector": "eyes", "": "rest"}
    assert coefficients(names, 0.5, {"eyes": 0.25}, mine) == dict(zip(names, (0.25, 0.5, 0.5), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, {"visoin": 1.0}), "no parameter group with tensors 'visoin'. Did you mean vision"),
        ((0.5, {"language": 1.0}), "Known: action, vision|no parameter group"),
        ((1.5, {}), "alpha is 1.5"),
        ((0.5, {"vision": 1.5}), "alpha of vision is 1.5"),
    ],
)
def test_a_group_without_tensors_or_a_wild_coefficient_is_refused(arguments, message):
    with pytest.raises(PerennialError, match=message):
        coefficients(["projector.fc1.weight", "lm_head.weight"], *arguments)
