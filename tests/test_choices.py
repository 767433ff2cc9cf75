"""`perennial list KIND NAME`: what is told of a choice is true and can be typed."""

from __future__ import annotations

import json
import typing

import pytest
from rich.console import Console

from perennial import choices, cli, config, discovery, overrides
from perennial.errors import PerennialError
from perennial.learning.base import Objective
from perennial.strategies.base import Strategy
from perennial.strategies.retain import Retain


def told(capsys, *arguments):
    cli.main(["list", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", discovery.names("presets"))
def test_a_preset_typed_with_every_option_listed_is_itself(preset):
    listed = choices.about("presets", preset)["settings"]
    typed = {option.removeprefix("--"): value for option, value in listed.items()}
    assert overrides.apply(config.preset(preset), typed) == config.preset(preset)


@pytest.mark.parametrize(("kind", "base"), [("strategies", Strategy), ("recipes", Objective)])
def test_settings_are_those_of_the_class_and_can_be_typed(kind, base):
    room = {"recipes": "learning"}.get(kind, kind)
    field = {"recipes": "recipe"}.get(kind, kind)
    for name in discovery.names(room):
        settings = {option.removeprefix("--"): v for option, v in choices.about(kind, name)["settings"].items()}
        changed = overrides.apply(config.preset("demo"), {field: name} | settings)
        assert getattr(changed, field) == (discovery.find(room, name, base)(),)


def test_several_values_and_shares_are_told_as_they_are_typed():
    settings = choices.about("strategies", "retain")["settings"]
    assert settings["--strategies.retain.alpha"] == ",".join(map(str, Retain().alpha))
    assert choices._typed({"vision": 4, "language": 8}) == "vision=4,language=8"
    assert [choices._typed(value) for value in (None, True, 1e-8, (0.9, 0.98))] == ["none", "true", "1e-08", "0.9,0.98"]


def test_a_suite_tells_variants_sequences_and_tasks(capsys):
    found = told(capsys, "suites", "kitchen")
    assert list(found["variants"]) == ["id", "ood_val", "ood_test"]
    assert found["sequences"]["ire_vla"].startswith("slide-cabinet-red,hinge-cabinet; held out: bottom-burner,")
    assert found["tasks"]["kettle"] == "push the kettle to the back burner"
    assert found["description"].startswith("Franka Kitchen: ")


def test_a_study_tells_how_its_methods_are_made(capsys):
    found = told(capsys, "studies", "simple_recipe")
    assert found["methods"]["sequential"] == ""
    assert found["methods"]["slca"] == "--strategies slca"
    assert found["grid"]["runs"] == "96"


@pytest.mark.parametrize("kind", typing.get_args(choices.Kind))
def test_everything_is_shown_whole_on_a_narrow_terminal(kind, tmp_path):
    for name in discovery.names(choices.ROOMS[kind]):
        if name == "envhub":  # has no tasks without environments
            continue
        found = choices.about(kind, name)
        with (tmp_path / "shown").open("w+") as file:
            choices.show(found, Console(file=file, width=60))
            file.seek(0)
            shown = "".join(file.read().split())
        assert "".join(found["description"].split()) in shown
        for rows in found.values():
            for entry in rows if isinstance(rows, dict) else ():
                assert entry.replace(" ", "") in shown


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(PerennialError, match="ewc"):
        choices.about("strategies", "ewcc")


def test_paragraphs_are_unwrapped_and_entries_are_not():
    text = "One\ntwo.\n\nAttributes:\n    a: first\n        and more.\n    b: second.\n\n- one\n- two"
    assert choices.unwrapped(text) == (
        "One two.\n\nAttributes:\n    a: first and more.\n    b: second.\n\n- one\n- two"
    )
