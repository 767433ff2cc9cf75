import json
import re
from pathlib import Path

import numpy as np
import pytest
from example_run import HELD_OUT, TRAINED, write_example
from rich.console import Console

from perennial.errors import PerennialError
from perennial.reports import compare, summary, words


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    strategies = [{"name": "ewc", "coefficient": 1000.0}]
    return [
        write_example(root / "plain", videos=False, iterations=3),
        write_example(root / "ewc", videos=False, iterations=3, seed=1, boost=0.2, strategies=strategies),
    ]


def test_each_run_is_its_own_report(folders):
    assert compare.compare_json(folders)["runs"] == [summary.report_json(folder) for folder in folders]


def test_differences_are_the_second_run_minus_the_first(folders):
    figures = compare.compare_json(folders)
    first, second = figures["runs"]
    (found,) = figures["differences"]
    assert (found["run"], found["against"]) == ("ewc", "plain")
    assert (found["trained"], found["held_out"]) == (TRAINED, HELD_OUT)
    for decoder, values in found["decoders"].items():
        one, two = first["decoders"][decoder], second["decoders"][decoder]
        for metric in words.METRICS:
            difference = two[metric.key]["value"] - one[metric.key]["value"]
            assert values[metric.key]["value"] == pytest.approx(difference)
            assert values[metric.key]["low"] <= difference + 1e-6 <= values[metric.key]["high"] + 2e-6
        last = [two["matrix"]["rates"][-1][i] - one["matrix"]["rates"][-1][i] for i in range(8)]
        assert [value["value"] for value in values["tasks"].values()] == pytest.approx(last)


def test_only_common_tasks_are_compared(tmp_path, folders):
    other = write_example(tmp_path / "other", trained=[TRAINED[1], "new-v3"], held_out=HELD_OUT[:1], videos=False)
    figures = compare.compare_json([folders[0], other])
    (found,) = figures["differences"]
    assert (found["trained"], found["held_out"]) == (TRAINED[1:2], HELD_OUT[:1])
    values, (one, two) = found["decoders"]["sampled"], figures["runs"]
    assert values["avg"]["value"] == pytest.approx(two["matrix"]["rates"][-1][0] - one["matrix"]["rates"][-1][1])
    assert values["nbt"] is None


def test_a_run_that_has_not_begun_has_no_differences(tmp_path, folders):
    new = write_example(tmp_path / "new", rows=0, videos=False)
    compare.command([folders[0], new], tmp_path / "c.html", as_json=False, console=Console(quiet=True))
    (found,) = compare.compare_json([folders[0], new])["differences"]
    assert found["decoders"]["greedy"] == dict.fromkeys(m.key for m in words.METRICS) | {"tasks": {}}
    assert "Not every run is finished" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_settings_that_differ_are_listed(folders):
    settings = compare.compare_json(folders)["settings"]
    assert settings == {
        "seed": ["0", "1"],
        "strategies": ["[]", words.DASH],
        "strategies.0.name": [words.DASH, '"ewc"'],
        "strategies.0.coefficient": [words.DASH, "1000.0"],
    }


def test_the_command_writes_the_page_and_prints_tables_or_json(folders, capsys):
    compare.command(folders, None, as_json=True, console=Console())
    assert json.loads(capsys.readouterr().out) == compare.compare_json(folders)
    text = (folders[0] / "report" / "compare.html").read_text(encoding="utf-8")
    figures = compare.compare_json(folders)
    compare.command(folders, None, as_json=False, console=Console(width=120))
    shown = capsys.readouterr().out
    for metric in words.METRICS:
        value = figures["differences"][0]["decoders"]["sampled"][metric.key]
        assert words.estimate(value, level=False) in shown
        assert f'<data value="{value["value"]}">' in text
    assert text.count('<table class="heat"') == 2
    assert text.count('class="plot"') == len(TRAINED)


def test_runs_of_the_same_name_are_told_apart_by_their_path(tmp_path):
    folders = [
        write_example(tmp_path / place / "demo", trained=["a<b>"], held_out=[], episodes=4, videos=False, iterations=1)
        for place in "xy"
    ]
    figures = compare.compare_json(folders)
    assert [run["run"] for run in figures["runs"]] == [str(folder) for folder in folders]
    compare.command(folders, tmp_path / "c.html", as_json=False, console=Console(quiet=True))
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "a<b>" not in text
    assert "a&lt;b&gt;" in text


def test_paired_intervals_are_narrower_where_outcomes_go_together(tmp_path):
    """A run compared with its own copy differs by nothing in every resample."""
    same = [write_example(tmp_path / name, trained=TRAINED[:2], videos=False) for name in ("a", "b")]
    values = compare.compare_json(same)["differences"][0]["decoders"]["sampled"]
    alone = summary.report_json(same[0])["avg"]
    assert values["avg"]["value"] == 0
    assert values["avg"]["high"] - values["avg"]["low"] < (alone["high"] - alone["low"])


def test_what_cannot_be_compared_is_refused(tmp_path, folders):
    with pytest.raises(PerennialError, match="two or more runs"):
        compare.compare_json(folders[:1])
    other = write_example(tmp_path / "other", trained=["a"], held_out=[], videos=False)
    described = json.loads((other / "run.json").read_text())
    described["config"]["suite"] = "kitchen"
    (other / "run.json").write_text(json.dumps(described))
    with pytest.raises(PerennialError, match=r"different suites \(metaworld, kitchen\)"):
        compare.compare_json([folders[0], other])


@pytest.mark.parametrize("out", ["taken", ".", "/", "page.json", "run.txt/page.html"])
def test_a_place_where_no_page_can_be_is_refused_before_the_work(tmp_path, folders, monkeypatch, out):
    (tmp_path / "taken").mkdir()
    (tmp_path / "run.txt").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "comparison", lambda _: pytest.fail("the work was done"))
    with pytest.raises(PerennialError, match=f"^(--out is )?{re.escape(out)}"):
        compare.command(folders, Path(out), as_json=False, console=Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.txt", "taken"]


def test_unrelated_runs_have_no_differences_but_a_page(tmp_path, folders):
    other = write_example(tmp_path / "other", trained=["a"], held_out=["b"], videos=False, iterations=1)
    compare.command([folders[0], other], tmp_path / "c.html", as_json=False, console=Console(quiet=True))
    (found,) = compare.compare_json([folders[0], other])["differences"]
    assert found["decoders"]["sampled"]["avg"] is None
    assert np.size(found["trained"] + found["held_out"]) == 0
    assert "no task in common" in (tmp_path / "c.html").read_text(encoding="utf-8")
