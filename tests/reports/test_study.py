import dataclasses
import json
import shutil

import numpy as np
import pytest
from example_run import write_example
from rich.console import Console

from perennial import config
from perennial.errors import PerennialError
from perennial.reports import study, words
from perennial.storage import atomic
from perennial.studies import _results, base
from toyhouse.study import STUDY

TRAINED, HELD_OUT = ["a", "b", "c"], ["d", "e"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Invented runs: two seeds of every row but the last, which has one."""
    folder = tmp_path_factory.mktemp("studies") / "toy"
    atomic.write_json(folder / "study.json", {"study": "toyhouse.study", "perennial": "0", "environment": {}})
    for entry in base.grid(STUDY)[:-1]:
        boost = {"sequential": 0.5, "joint": 0.4, "l2": 0.1}[entry.method]
        run = folder / "runs" / entry.name
        write_example(run, TRAINED, HELD_OUT, iterations=3, seed=entry.seed, boost=boost, videos=False)
        (run / "tasks" / "03-c").mkdir(parents=True)
        (run / "tasks" / "03-c" / "a.safetensors").write_bytes(bytes(1000 + entry.seed))
        for line in range({"joint": 6, "l2": 1}.get(entry.method, 0)):  # all of them, some, none
            with (run / "timings.jsonl").open("a") as log:
                cost = {"hook": f"hook {line % 2}", "seconds": 2.0, "episodes": line, "env_steps": 100 + entry.seed}
                log.write(json.dumps({"event": "strategy", **cost}) + "\n")
        _results.write(folder, entry, "toyhouse.study", peak_bytes=5 * 10**8)
        place = _results.path(folder, entry)  # the example's configuration is no toy run's
        atomic.write_json(place, json.loads(place.read_text()) | {"config": config.to_json(entry.config())})
    return folder


def rates(folder, row, seed, decoder="sampled"):
    return _results.load(folder / "results" / row / f"seed{seed}.json").matrices["id", decoder].rates()


def test_metrics_are_means_over_seeds(folder):
    rows = {row["row"]: row for row in study.figures(folder)["rows"]}
    for name, seeds in (("sequential", (0, 1)), ("l2", (0, 1)), ("sequential-reversed", (0,))):
        both = [rates(folder, name, seed) for seed in seeds]
        gain = np.mean([s[3, :3].mean() - s[0, :3].mean() for s in both])
        nbt = np.mean([(s[1, 0] - s[3, 0] + s[2, 1] - s[3, 1]) / 2 for s in both])
        figures = rows[name]["decoders"]["sampled"]
        assert rows[name]["seeds"] == list(seeds)
        assert figures["gain"]["value"] == pytest.approx(100 * gain)
        assert figures["nbt"]["value"] == pytest.approx(100 * nbt)
        assert figures["gain"]["low"] < 100 * gain < figures["gain"]["high"]


def test_comparison_is_with_the_reference_on_common_seeds(folder):
    rows = {row["row"]: row for row in study.figures(folder)["rows"]}
    assert rows["sequential"]["decoders"]["sampled"]["versus"] is None
    ours, theirs = rates(folder, "sequential-reversed", 0), rates(folder, "sequential", 0)
    assert rows["sequential-reversed"]["decoders"]["sampled"]["versus"]["avg"]["value"] == pytest.approx(
        100 * (ours[3, :3].mean() - theirs[3, :3].mean())
    )


def test_forgetting_after_each_task_ends_with_nbt(folder):
    rows = {row["row"]: row for row in study.figures(folder)["rows"]}
    lost = rows["sequential"]["decoders"]["greedy"]["forgetting"]
    s = [rates(folder, "sequential", seed, "greedy") for seed in (0, 1)]
    assert lost[0] == pytest.approx(100 * np.mean([x[1, 0] - x[2, 0] for x in s]), abs=0.01)
    assert lost[-1] == pytest.approx(rows["sequential"]["decoders"]["greedy"]["nbt"]["value"], abs=0.01)


def test_a_result_of_other_settings_is_not_reported(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "results", copy / "results")
    shutil.copy(folder / "study.json", copy)
    place = copy / "results" / "l2" / "seed0.json"
    content = json.loads(place.read_text())
    content["config"]["strategies"][0]["coefficient"] = 7.0
    place.write_text(json.dumps(content))
    with pytest.raises(PerennialError, match="made with other settings"):
        study.figures(copy)


def test_cost_is_the_median_over_seeds(folder):
    (row,) = [row for row in study.figures(folder)["rows"] if row["row"] == "joint"]
    assert row["cost"]["kept_bytes"] == 1000.5
    assert row["cost"]["peak_bytes"] == 5e8
    assert row["cost"]["update_seconds"] == pytest.approx(4.25 * 9, abs=0.1)


def test_what_strategies_cost_is_known_where_all_of_it_was_logged(folder):
    costs = {row["row"]: row["cost"] for row in study.figures(folder)["rows"]}
    kinds = ("strategy_seconds", "strategy_episodes", "strategy_env_steps")
    assert [costs["joint"][kind] for kind in kinds] == [12.0, 15.0, 603.0]
    for row in ("l2", "sequential"):
        assert [costs[row][kind] for kind in kinds] == [None] * 3
    study.command(folder, False, Console(quiet=True))
    page = (folder / "report" / "index.html").read_text()
    cells = {row: page.split(f'data-cost="{row}"')[1].split("</tr>")[0] for row in costs}
    assert "<td>12 s</td>" in cells["joint"]
    assert "<td>603</td>" in cells["joint"]
    assert cells["l2"].count(f"<td>{words.DASH}</td>") == 2


@pytest.mark.parametrize("old", [0, 1])
def test_a_cost_that_was_not_measured_counts_as_unknown_and_not_as_zero(folder, tmp_path, old):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "results", copy / "results")
    shutil.copy(folder / "study.json", copy)

    def cost(seed, **changes):
        place = copy / "results" / "joint" / f"seed{seed}.json"
        content = json.loads(place.read_text())
        content["cost"] |= changes
        place.write_text(json.dumps(content))
        return place, content

    place, content = cost(old, peak_bytes=0)
    del content["cost"]["gate_seconds"]
    place.write_text(json.dumps(content))
    cost(1 - old, peak_bytes=2 * 10**9, gate_seconds=7.0)

    def joint():
        return next(row["cost"] for row in study.figures(copy)["rows"] if row["row"] == "joint")

    assert (joint()["peak_bytes"], joint()["gate_seconds"]) == (2e9, 7.0)
    cost(1 - old, peak_bytes=0)
    assert joint()["peak_bytes"] is None


def test_a_peak_that_is_not_known_is_left_out(folder, tmp_path):
    shutil.copytree(folder / "runs" / "joint", tmp_path / "runs" / "joint")
    entry = next(entry for entry in base.grid(STUDY) if entry.method == "joint")
    _results.write(tmp_path, entry, "toyhouse.study", peak_bytes=None)
    assert "peak_bytes" not in _results.load(_results.path(tmp_path, entry)).cost


def test_published_numbers_of_another_form_are_marked(folder, monkeypatch):
    other = dataclasses.replace(STUDY.methods["sequential"], published_form="it is <theirs>")
    monkeypatch.setitem(STUDY.methods, "sequential", other)
    assert study.figures(folder)["rows"][0]["published_form"] == "it is <theirs>"
    study.command(folder, False, Console(quiet=True))
    page = (folder / "report" / "index.html").read_text()
    assert page.count("published 81.2*") == 4
    assert page.count("* sequential: their form differs: it is &lt;theirs&gt;.") == 2  # a decoder each


def test_the_page_shows_every_row_with_published_numbers_and_says_what_is_missing(folder, capsys):
    study.command(folder, False, Console(width=200))
    page = (folder / "report" / "index.html").read_text()
    assert "<b>Runs still missing: 1.</b>" in page
    for row in ("sequential", "sequential-reversed", "joint", "l2"):
        assert f'<tr data-row="{row}">' in page
    for published in ("published 81.2", "published +0.3"):
        assert page.count(published) == 4  # two orders, two decoders
    assert json.loads((folder / "report" / "report.json").read_text()) == study.figures(folder)
    said = capsys.readouterr().out
    assert "sequential-reversed" in said
    figures = study.figures(folder)["rows"][0]["decoders"]["sampled"]["gain"]
    assert f"{figures['value']:+.1f}" in said


def test_no_number_is_cut_on_a_narrow_terminal(folder, tmp_path):
    with (tmp_path / "shown").open("w+") as file:
        study.command(folder, False, Console(file=file, width=80))
        file.seek(0)
        shown = file.read()
    assert "…" not in shown
    for row in study.figures(folder)["rows"]:
        assert f"{row['row']} " in shown
        gain = row["decoders"]["greedy"]["gain"]
        for number in (gain["low"], gain["high"]):
            assert words.points(number, signed=True) in shown


def test_the_markdown_has_a_table_for_each_decoder(folder, capsys):
    study.command(folder, False, Console(width=200))
    sampled, greedy = (folder / "report" / "table.md").read_text().split("Greedy decoding:")
    for text, decoder in ((sampled, "sampled"), (greedy, "greedy")):
        cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| l2 ")]
        (row,) = [row for row in study.figures(folder)["rows"] if row["row"] == "l2"]
        gain, versus = row["decoders"][decoder]["gain"], row["decoders"][decoder]["versus"]["avg"]
        assert len(cells) == 1
        assert len(cells[0]) == 9
        assert cells[0][3].strip().startswith(f"{gain['value']:+.1f} (")
        assert cells[0][8].strip().replace("\u2212", "-").startswith(f"{versus['value']:+.1f} (")


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(PerennialError, match=r"holds no study"):
        study.figures(tmp_path)
    atomic.write_json(tmp_path / "study.json", {"study": "toyhouse.study"})
    with pytest.raises(PerennialError, match=r"no result yet; run it by `perennial study toyhouse.study`"):
        study.figures(tmp_path)
