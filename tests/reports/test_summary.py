import json

import numpy as np
import pytest
from example_run import HELD_OUT, TRAINED, write_example
from rich.console import Console

from perennial.reports import summary, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("runs") / "demo", videos=False)


def rates_on_disk(folder, decoder):
    """S[i, j] in percent, straight from the files."""
    columns = [*TRAINED, *HELD_OUT]
    paths = [[folder / f"evaluations/{row:02d}/{decoder}/id/{task}.json" for task in columns] for row in range(6)]
    return 100 * np.array([[np.mean(json.loads(path.read_text())["successes"]) for path in row] for row in paths])


@pytest.mark.parametrize("decoder", ["sampled", "greedy"])
def test_metrics_follow_their_definitions_in_percentage_points(folder, decoder):
    figures, s = summary.report_json(folder)["decoders"][decoder], rates_on_disk(folder, decoder)
    expected = {
        "avg": s[5, :5].mean(),
        "gain": (s[5, :5] - s[0, :5]).mean(),
        "nbt": np.mean([s[j + 1, j] - s[5, j] for j in range(4)]),
        "fwt": np.mean([s[j, j] - s[0, j] for j in range(1, 5)]),
        "zs": s[5, 5:].mean(),
        "zs_gain": (s[5, 5:] - s[0, 5:]).mean(),
    }
    assert {name: figures[name]["value"] for name in expected} == pytest.approx(expected)
    assert all(figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"] for name in expected)
    assert figures["avg"]["n"] == 5 * 40
    np.testing.assert_allclose(figures["matrix"]["rates"], s)


def test_the_top_level_is_the_main_decoder(folder):
    figures = summary.report_json(folder)
    assert list(figures) == [
        "run", "seed", "preset", "finished", "avg", "gain", "nbt", "fwt", "zs", "zs_gain", "matrix", "decoders",
        "gates", "accounts",
    ]  # fmt: skip
    assert {key: figures[key] for key in figures["decoders"]["sampled"]} == figures["decoders"]["sampled"]
    assert (figures["run"], figures["seed"], figures["preset"], figures["finished"]) == ("demo", 0, "demo", True)
    matrix = figures["matrix"]
    assert (matrix["rows"], matrix["columns"]) == (["base", *TRAINED], [*TRAINED, *HELD_OUT])
    assert (matrix["trained"], matrix["n"]) == (5, 40)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_an_unfinished_run_is_measured_on_what_it_was_taught_so_far(tmp_path):
    whole = write_example(tmp_path / "whole", trained=TRAINED[:2], videos=False)
    # The same cells, but three more tasks are still to come.
    part = write_example(tmp_path / "part", trained=TRAINED[:2], videos=False)
    described = json.loads((part / "run.json").read_text())
    described["config"]["tasks"]["trained"] = TRAINED
    (part / "run.json").write_text(json.dumps(described))
    for task in TRAINED[2:]:
        for row in range(3):
            for decoder in ("sampled", "greedy"):
                copy_cell(part, row, decoder, HELD_OUT[0], task)
    first, second = summary.report_json(whole), summary.report_json(part)
    assert (first["finished"], second["finished"]) == (True, False)
    assert {m.key: first[m.key] for m in words.METRICS} == {m.key: second[m.key] for m in words.METRICS}
    assert second["matrix"]["rates"][3:] == [[None] * 8] * 3


def copy_cell(folder, row, decoder, source, target):
    from perennial.storage.cells import Cell
    from perennial.storage.run_folder import RunFolder

    with RunFolder.open_locked(folder) as run:
        outcome = run.cell(Cell(row, decoder, "id", source))
        run.write_cell(Cell(row, decoder, "id", target), outcome.successes, outcome.env_steps)


def test_the_console_shows_the_same_numbers(folder, capsys):
    summary.print_summary(folder, Console(width=120))
    shown, figures = capsys.readouterr().out, summary.report_json(folder)
    for decoder in figures["decoders"].values():
        for metric in words.METRICS:
            assert words.estimate(decoder[metric.key], metric.level) in shown
    line = next(line for line in shown.splitlines() if "handle-press-v3 " in line)
    column = [words.rate(row[0]) for row in figures["matrix"]["rates"]]
    assert [cell.strip() for cell in line.split("│")][2:-1] == column


def test_hostile_names_reach_the_console_as_they_are(tmp_path, capsys):
    folder = write_example(tmp_path / "[red]run", trained=["[bold]a[/]", "x"], held_out=[], episodes=4, videos=False)
    summary.print_summary(folder, Console(width=120))
    shown = capsys.readouterr().out
    assert "[red]run" in shown
    assert "1 [bold]a[/]" in shown


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(0.04, True, "0.0"), (-0.04, True, "0.0"), (3.25, True, "+3.2"), (-12.0, False, "\u221212.0"), (7, False, "7.0")],
)
def test_points(value, signed, text):
    assert words.points(value, signed) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (48.4, "48 s"), (59.9, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")],
)
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def test_sentences_admit_chance_and_never_praise_remembering_nothing():
    def estimate(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 40}

    nothing = {"gain": estimate(1.0, -4.0, 6.0), "avg": estimate(41.0, 36.0, 46.0), "nbt": estimate(0.0, -3.0, 3.0)}
    assert "40.0\u00a0% to 41.0\u00a0%" in words.learned(nothing, 5)
    assert words.learned(nothing, 5).endswith("this could be chance.")
    assert words.forgotten(nothing).endswith("Little was learned, so there was little to forget.")
    much = {"gain": estimate(30.0, 24.0, 36.0), "nbt": estimate(-4.0, -6.0, -2.0)}
    assert "rose by 4.0 points" in words.forgotten(much)
    assert "chance" not in words.forgotten(much)
    for still in (0.0, 0.04, -0.04):
        same = words.forgotten({"gain": estimate(30.0, 24.0, 36.0), "nbt": estimate(still, -3.0, 3.0)})
        assert "success on it stayed the same on average by the end." in same
