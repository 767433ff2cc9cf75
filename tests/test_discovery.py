import re
import subprocess
import sys
import textwrap

import pytest

from perennial import discovery
from perennial.config import preset
from perennial.errors import PerennialError
from perennial.strategies.base import Strategy
from perennial.studies.base import find as study
from perennial.suites.base import Suite


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package `greenhouse` that offers two strategies, one of which cannot be imported."""
    (tmp_path / "greenhouse.py").write_text(
        textwrap.dedent(
            '''
            """Waters every task a little.

            The second paragraph is not part of the description.
            """
            from dataclasses import dataclass
            from perennial.strategies.base import Strategy

            @dataclass
            class Greenhouse(Strategy):
                name = "greenhouse"
            '''
        )
    )
    (tmp_path / "greenhouse_broken.py").write_text("raise ImportError('no water')\n")
    info = tmp_path / "greenhouse-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greenhouse\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[perennial.strategies]\ngreenhouse = greenhouse\nwilted = greenhouse_broken\nsequential = greenhouse\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("greenhouse", None)


def test_names_are_listed_without_importing_their_modules():
    code = (
        "import sys; from perennial import discovery; found = discovery.names('strategies');"
        "assert 'sequential' in found;"
        "print([m for m in sys.modules if m in found.values() or m.split('.')[0] in ('torch', 'transformers')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_names_are_sorted_and_leave_out_the_shared_words():
    for room in discovery.ROOMS:
        found = discovery.names(room)
        assert list(found) == sorted(found)
        assert not {"base", *discovery.HELPERS.get(room, ())} & found.keys()
        assert not any(name.startswith("_") for name in found)


def test_a_file_is_the_thing_called_like_it():
    assert discovery.names("strategies")["sequential"] == "perennial.strategies.sequential"
    assert discovery.load("strategies", "sequential").__name__ == "perennial.strategies.sequential"


@pytest.mark.usefixtures("third_party")
def test_a_third_party_strategy_is_found_by_its_entry_point():
    assert discovery.names("strategies")["greenhouse"] == "greenhouse"
    found = discovery.find("strategies", "greenhouse", Strategy)
    assert found.__name__ == "Greenhouse"
    assert issubclass(found, Strategy)


@pytest.mark.usefixtures("third_party")
def test_a_third_party_cannot_replace_an_own_file():
    assert discovery.names("strategies")["sequential"] == "perennial.strategies.sequential"


@pytest.mark.usefixtures("third_party")
def test_a_broken_third_party_is_listed_and_fails_only_when_loaded():
    assert "wilted" in discovery.names("strategies")
    with pytest.raises(ImportError, match="no water"):
        discovery.load("strategies", "wilted")


@pytest.mark.usefixtures("third_party")
def test_a_description_is_the_first_line_and_is_read_without_importing():
    assert discovery.describe("greenhouse") == "Waters every task a little."
    assert "greenhouse" not in sys.modules
    assert discovery.describe("greenhouse_broken") == ""
    assert discovery.describe("no_such_module_anywhere") == ""


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(PerennialError, match=r"There is no strategy 'sequentail'\. Did you mean sequential\b"):
        discovery.load("strategies", "sequentail")


def test_a_name_near_nothing_is_answered_with_all_names():
    with pytest.raises(PerennialError, match=r"There is no strategy 'zzz'\. Known: .*\bsequential\b"):
        discovery.load("strategies", "zzz")


def test_the_class_must_be_defined_in_the_module_itself():
    """Importing a base class into a module does not make it a plug-in."""
    assert discovery.find("strategies", "sequential", Strategy).__module__ == "perennial.strategies.sequential"
    with pytest.raises(PerennialError, match="'sequential' is no strategy, as it defines no class derived from int"):
        discovery.find("strategies", "sequential", int)


@pytest.mark.parametrize("name", ["perennial.suites.base", "perennial.errors"])
def test_a_module_without_a_class_to_use_is_refused(name):
    with pytest.raises(PerennialError, match=f"'{name}' is no suite, as it defines no class derived from Suite"):
        discovery.find("suites", name, Suite)


@pytest.mark.parametrize("name", [".", "..", ".x", "./mine.py", "a..b", "../presets/mine"])
def test_what_is_no_dotted_name_is_an_unknown_name(name):
    with pytest.raises(PerennialError, match=rf"There is no preset '{re.escape(name)}'\."):
        discovery.load("presets", name)


def test_a_strategy_without_a_name_is_refused_when_it_is_written():
    with pytest.raises(
        PerennialError, match=r'^The strategy .*Nameless has no name; add name: ClassVar\[str\] = "\.\.\."'
    ):

        class Nameless(Strategy):
            pass


def test_a_preset_and_a_study_are_values_of_their_modules():
    with pytest.raises(PerennialError, match=r"'perennial\.errors' is no preset, as it has no CONFIG of type Config"):
        preset("perennial.errors")
    with pytest.raises(PerennialError, match=r"'perennial\.errors' is no study, as it has no STUDY of type Study"):
        study("perennial.errors")
