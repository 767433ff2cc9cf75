"""A study knows its runs again wherever it lies, and however that place is called."""

from pathlib import Path

import pytest

from perennial import config as configuration
from perennial import overrides
from perennial.studies.base import Entry, without_place
from toyhouse.study import STUDY


@pytest.mark.parametrize("name", ["study", "étude für Ω", 'with "quotes"', "back\\slash", "[1]"])
def test_a_run_is_known_again_whatever_the_folder_of_its_study_is_called(tmp_path, name):
    entry, folder = Entry(STUDY, "l2", "given", 0), tmp_path / name
    filled = {key: text.replace("{folder}", str(folder)) for key, text in entry.overrides.items()}
    config = configuration.to_json(overrides.apply(configuration.preset(STUDY.preset), filled))
    assert config["policy"]["checkpoint"] == str(folder / "base")
    assert entry.matches(without_place(config, folder))


def test_only_what_lies_in_the_study_is_called_by_its_folder():
    config = {"a": "/runs/study", "b": ["/runs/study/base", {"c": "/runs/study-base"}], "d": "see /runs/study", "e": 1}
    assert without_place(config, Path("/runs/study")) == {
        "a": "{folder}",
        "b": ["{folder}/base", {"c": "/runs/study-base"}],
        "d": "see /runs/study",
        "e": 1,
    }
