import dataclasses
import shlex
from pathlib import Path

import pytest

from perennial import config, overrides
from perennial.cli import pairs
from perennial.errors import PerennialError
from perennial.studies import base
from perennial.studies.base import Entry, Method, without_place
from toyhouse.study import STUDY


def test_the_grid_is_methods_by_their_orders_by_seeds_with_other_orders_last():
    names = [entry.name for entry in base.grid(STUDY)]
    assert names == [
        f"{row}/seed{seed}" for seed in (0, 1) for row in ("sequential", "joint", "l2", "sequential-reversed")
    ]
    assert [entry.name for entry in base.grid(STUDY, ["l2"], [1])] == ["l2/seed1"]


def test_an_entry_is_the_preset_with_the_overrides_of_study_order_and_method():
    reversed_ = Entry(STUDY, "sequential", "reversed", 1).config()
    assert (reversed_.tasks.trained, reversed_.seed, reversed_.strategies) == (("right", "left"), 1, ())
    assert reversed_.policy.checkpoint == "{folder}/base"
    (anchor,) = Entry(STUDY, "l2", "given", 0).config().strategies
    assert anchor.coefficient == 0.5


def test_the_printed_command_gives_the_same_run():
    entry = Entry(STUDY, "l2", "given", 1)
    program, command, preset, run_dir, folder, *rest = shlex.split(entry.command())
    assert (program, command, preset, run_dir, folder) == (
        "perennial", "run", "toyhouse.preset", "--run-dir", "runs/l2/seed1",
    )  # fmt: skip
    typed = overrides.apply(config.preset(preset), pairs(rest))
    assert typed == dataclasses.replace(entry.config(), policy=dataclasses.replace(typed.policy, checkpoint="base"))


def test_a_run_is_recognised_by_what_decides_its_result():
    entry = Entry(STUDY, "l2", "given", 0)
    found = config.to_json(entry.config())
    assert entry.matches(
        found | {"workers": {"backend": "process", "count": 7}, "threads": 7, "description": "another"}
    )
    elsewhere = dataclasses.replace(STUDY, overrides={"policy.checkpoint": "some/base"})
    stored = {**found, "policy": {**found["policy"], "checkpoint": str(Path("some/base").absolute())}}
    assert Entry(elsewhere, "l2", "given", 0).matches(stored)
    older = {**found, "recipe": [{k: v for k, v in found["recipe"][0].items() if k != "clip_low"}]}
    assert entry.matches(older)  # made before this setting existed
    assert not entry.matches({**found, "recipe": [found["recipe"][0] | {"iterations": 3}]})
    assert not entry.matches({**found, "recipe": [found["recipe"][0] | {"gone": 3}]})
    assert not entry.matches({**found, "recipe": found["recipe"] * 2})
    assert not Entry(STUDY, "l2", "given", 1).matches(found)
    assert not Entry(STUDY, "sequential", "given", 0).matches(found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"a-b": Method(), "a": Method(orders=("given", "b"))}, "orders": {"b": ("left",)}}, "'a-b/seed0'"),
        ({"methods": {"../x": Method()}, "reference": "../x"}, "cannot be a folder"),
        ({"methods": {"x": Method(orders=("backwards",))}, "reference": "x"}, "backwards"),
        ({"methods": {"x": Method()}}, "sequential"),
        ({"methods": {"sequential": Method({"recipe.grpo.grups": "1"})}}, "grups"),
        ({"methods": {"sequential": Method({"evaluation.decoders": "greedy"})}}, "sets evaluation.decoders"),
    ],
)
def test_a_study_that_cannot_work_is_refused(changes, said):
    with pytest.raises(PerennialError, match=said.replace("(", r"\(")):
        base.grid(dataclasses.replace(STUDY, **changes))


def test_what_is_not_in_the_study_is_refused():
    with pytest.raises(PerennialError, match=r"method of the study 'l3'.*l2"):
        base.grid(STUDY, ["l3"])
    with pytest.raises(PerennialError, match=r"Seed 7 .*0, 1"):
        base.grid(STUDY, (), [7])
    with pytest.raises(PerennialError, match=r"study 'simple_recip'.*simple_recipe"):
        base.find("simple_recip")


@pytest.mark.parametrize("name", ["demo", "simple_recipe", "strategy_strength"])
def test_every_run_of_a_built_in_study_passes_the_checks_that_need_no_files(name):
    study = base.find(name)
    for entry in base.grid(study):
        found = entry.config()
        assert set(found.tasks.trained) == set(config.preset(study.preset).tasks.trained)
        if "{folder}" not in str(entry.overrides):
            config.validate(found)
        for key, value in entry.overrides.items():
            if "{folder}" in value:
                made = [
                    Path(p.path) for p in study.preparations if entry.method in p.needed_by or p.needed_by == ("*",)
                ]
                place = Path(value.removeprefix("{folder}/"))
                assert any(path == place or path in place.parents for path in made), (entry.name, key)


@pytest.mark.parametrize("name", ["study", "étude für Ω", 'with "quotes"', "back\\slash", "[1]"])
def test_a_run_is_known_again_whatever_the_folder_of_its_study_is_called(tmp_path, name):
    entry, folder = Entry(STUDY, "l2", "given", 0), tmp_path / name
    filled = {key: text.replace("{folder}", str(folder)) for key, text in entry.overrides.items()}
    found = config.to_json(overrides.apply(config.preset(STUDY.preset), filled))
    assert found["policy"]["checkpoint"] == str(folder / "base")
    assert entry.matches(without_place(found, folder))


def test_only_what_lies_in_the_study_is_called_by_its_folder():
    written = {"a": "/runs/study", "b": ["/runs/study/base", {"c": "/runs/study-base"}], "d": "see /runs/study", "e": 1}
    assert without_place(written, Path("/runs/study")) == {
        "a": "{folder}",
        "b": ["{folder}/base", {"c": "/runs/study-base"}],
        "d": "see /runs/study",
        "e": 1,
    }
