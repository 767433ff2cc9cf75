import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial import discovery, overrides
from perennial.config import Config, preset, to_json
from perennial.errors import PerennialError
from perennial.learning.grpo import GRPO
from perennial.policies.lora import LoRA
from perennial.strategies.ewc import EWC
from perennial.strategies.replay import Replay
from toyhouse.needy import Needy
from toyhouse.runs import CONFIG

BASE = replace(CONFIG, recipe=(GRPO(),), strategies=(EWC(), Replay()))


def round_trip(config):
    return overrides.from_json(Config, json.loads(json.dumps(to_json(config), allow_nan=False)))


NEW_VALUES = {
    int: st.integers(-(10**9), 10**9),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
}
# Strategies check their coefficients when they are made; every other range is checked by `validate`.
NUMBERS = {
    key: NEW_VALUES[type(value)]
    for key, value in overrides.keys(BASE).items()
    if type(value) in NEW_VALUES and not key.startswith("strategies.")
}


def test_the_keys_reach_every_depth():
    assert {"seed", "workers.timeout", "policy.adapter.rank", "recipe.grpo.optimizer.learning_rate"} <= set(NUMBERS)
    assert overrides.keys(BASE)["strategies.ewc.coefficient"] == EWC().coefficient


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({key: NUMBERS[key] for key in chosen})
    )
)
def test_overrides_change_what_they_name_and_nothing_else_and_survive_json(changes):
    config = overrides.apply(BASE, {key.replace("_", "-"): repr(value) for key, value in changes.items()})
    assert overrides.keys(config) == overrides.keys(BASE) | changes
    assert round_trip(config) == config


@pytest.mark.parametrize("name", discovery.names("presets"))
def test_every_preset_survives_json(name):
    config = preset(name)
    assert round_trip(config) == config


def test_parts_of_every_kind_survive_json():
    config = overrides.apply(
        BASE,
        {
            "strategies": ",".join(discovery.names("strategies")),
            "recipe": "grpo,sft",
            "recipe.sft.batch_size": "7",
            "policy.adapter.rank_by_group": "vision=2,language=8",
        },
    )
    again = round_trip(config)
    assert again == config
    assert [part.name for part in again.strategies] == list(discovery.names("strategies"))
    assert again.recipe[1].batch_size == 7
    assert again.policy.adapter.rank_by_group == {"vision": 2, "language": 8}
    assert round_trip(overrides.apply(BASE, {"policy.adapter": "none"})).policy.adapter is None


def test_a_part_that_no_room_lists_survives_json_by_its_module():
    config = overrides.apply(CONFIG, {"strategies": "toyhouse.needy", "strategies.needy.strength": "3"})
    assert config.strategies == (Needy(3.0),)
    assert to_json(config)["strategies"] == [{"name": "toyhouse.needy", "strength": 3.0}]
    assert round_trip(config) == config


def test_choices_by_name_come_before_their_settings_and_keep_what_was_set():
    config = overrides.apply(BASE, {"strategies.replay.capacity": "5"})
    config = overrides.apply(
        config, {"strategies.l2.coefficient": "0.5", "strategies.ewc.episodes": "3", "strategies": "replay, l2,ewc"}
    )
    assert [part.name for part in config.strategies] == ["replay", "l2", "ewc"]
    assert config.strategies[0].capacity == 5
    assert config.strategies[1].coefficient == 0.5
    assert config.strategies[2].episodes == 3
    assert overrides.apply(config, {"strategies": "none"}).strategies == ()


def test_stages_of_the_same_name_are_told_apart_by_their_number():
    changes = {
        "recipe.2.optimizer.learning_rate": "0.5",
        "recipe.2.iterations": "7",
        "recipe.grpo.iterations": "3",
        "recipe": "grpo,sft,grpo",
        "recipe.3.learns": "action",
        "recipe.3.iterations": "4",
    }
    first, second, third = overrides.apply(BASE, changes).recipe
    assert [stage.iterations for stage in (first, second, third)] == [3, 7, 4]
    assert second.optimizer.learning_rate == 0.5 != first.optimizer.learning_rate
    assert (first.learns, third.learns) == (GRPO().learns, ("action",))
    assert round_trip(overrides.apply(BASE, changes)).recipe == (first, second, third)


def test_stages_of_the_same_name_that_are_chosen_again_stay_in_order():
    two = overrides.apply(BASE, {"recipe": "grpo,grpo", "recipe.1.iterations": "12", "recipe.2.iterations": "4"})
    for chosen, iterations in (("grpo,grpo,sft", [12, 4]), ("sft,grpo", [12]), ("grpo,sft,grpo,grpo", [12, 4, 4])):
        recipe = overrides.apply(two, {"recipe": chosen}).recipe
        assert ",".join(stage.name for stage in recipe) == chosen
        assert [stage.iterations for stage in recipe if stage.name == "grpo"] == iterations


def test_tuples_and_choices_are_parsed():
    config = overrides.apply(
        BASE,
        {
            "tasks.trained": "up, left",
            "tasks.held-out": "",
            "evaluation.decoders": "greedy",
            "schedule": "joint",
            "recipe.grpo.optimizer.betas": "0.5,0.75",
        },
    )
    assert config.tasks.trained == ("up", "left")
    assert config.tasks.held_out == ()
    assert config.evaluation.decoders == ("greedy",)
    assert config.schedule == "joint"
    assert config.recipe[0].optimizer.betas == (0.5, 0.75)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("seeed", "1", r"no setting '--seeed'\. Did you mean --seed"),
        ("device", "cuda", r"no setting '--device'\. Did you mean --policy\.device\?"),
        ("grpo.iterations", "2", r"no setting '--grpo\.iterations'\. Did you mean --recipe\.grpo\.iterations\?"),
        ("recipe.grpo.gruops", "1", r"no setting '--recipe\.grpo\.gruops'\. Did you mean --recipe\.grpo\.groups"),
        ("policy.adapter.ranc", "1", r"Did you mean --policy\.adapter\.rank"),
        ("strategies.ewc.coeff", "1", r"Did you mean --strategies\.ewc\.coefficient"),
        ("strategies", "ewcc", r"no strategy 'ewcc'\. Did you mean ewc"),
        ("recipe", "gpro", r"no recipe 'gpro'\. Did you mean grpo"),
        ("recipe.2.groups", "1", r"'2' is not chosen; count from 1 to 1 in --recipe, which is grpo"),
        ("recipe.ppo.groups", "1", r"'ppo' is not chosen; add it to --recipe, which is grpo"),
        (
            "recipe.grpo",
            "1",
            r"--recipe\.grpo has settings of its own; set one, for example --recipe\.grpo\.iterations",
        ),
        ("policy", "x", r"--policy has settings of its own; set one, for example --policy\.name"),
        ("seed.more", "1", r"'seed' is 0 and has no settings"),
        ("seed", "1.5", r'--seed is "1.5", but it must be a whole number'),
        ("recipe.grpo.clip_low", "much", r'is "much", but it must be a number'),
        ("recipe.grpo.clip_low", "nan", r'is "nan", but it must be a number'),
        ("workers.timeout", "inf", r'is "inf", but it must be a number'),
        ("schedule", "joined", r"'joined'\. Did you mean joint"),
        ("evaluation.decoders", "greedy,beam", r"'beam'\. Known: greedy, sampled"),
        ("recipe.grpo.optimizer.betas", "0.9", r"is '0.9', but it needs 2 values"),
        ("policy.adapter.rank_by_group", "vision", r"is 'vision', but it should look like vision=4"),
        ("policy.adapter.rank_by_group", "vision=x", r'is "x", but it must be a whole number'),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(key, text, message):
    with pytest.raises(PerennialError, match=message):
        overrides.apply(BASE, {key: text})


def test_an_adapter_is_either_left_out_or_set():
    with pytest.raises(PerennialError, match=r"--policy\.adapter is none, so --policy\.adapter\.rank sets nothing"):
        overrides.apply(BASE, {"policy.adapter.rank": "3", "policy.adapter": "none"})


def test_a_setting_of_an_absent_adapter_puts_it_in():
    without = overrides.apply(BASE, {"policy.adapter": "none"})
    assert overrides.apply(without, {"policy.adapter.rank": "3"}).policy.adapter == LoRA(rank=3)
    assert overrides.apply(without, {"seed": "3"}).policy.adapter is None


def changed(path, value):
    stored = to_json(BASE)
    *parents, last = path
    place = stored
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return stored


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "0", r"config\.seed is '0', but it must be a whole number"),
        (("seed",), True, r"config\.seed is True, but it must be a whole number"),
        (("tasks", "trained"), "left", r"config\.tasks\.trained is 'left', but it must be a list"),
        (("tasks", "trained"), [1], r"config\.tasks\.trained\[0\] is 1, but it must be text"),
        (("tasks", "trained"), ..., r"config\.tasks has no 'trained'"),
        (("policy", "adapter"), 4, r"config\.policy\.adapter is 4, but it must be an object"),
        (("policy", "adapter", "rank_by_group"), [], r"rank_by_group is \[\], but it must be an object"),
        (("recipe", 0, "gruops"), 3, r"no setting in config\.recipe\[0\] 'gruops'\. Did you mean groups"),
        (("recipe", 0, "name"), "gpro", r"no recipe 'gpro'\. Did you mean grpo"),
        (("recipe", 0, "name"), ..., r"no recipe ''"),
        (("schedule",), "joined", r"'joined'\. Did you mean joint"),
    ],
)
def test_json_that_was_not_written_by_to_json_is_refused(path, value, message):
    with pytest.raises(PerennialError, match=message):
        overrides.from_json(Config, changed(path, value))


def test_a_whole_number_is_a_fine_float_in_json():
    stored = changed(("recipe", 0, "temperature"), 2)
    temperature = overrides.from_json(Config, stored).recipe[0].temperature
    assert (temperature, type(temperature)) == (2.0, float)
