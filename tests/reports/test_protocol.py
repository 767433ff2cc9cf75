"""The protocol table against hand-computed means."""

from dataclasses import replace

import numpy as np
import pytest

from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.reports import protocol, study
from perennial.studies import base
from perennial.studies._results import Result
from perennial.studies.base import Method, Study

ORDERS = {"door": ("a",), "plate": ("b",), "long": ("a", "b")}
STUDY = Study(
    description="",
    preset="demo",
    methods={
        "plain": Method(orders=("door", "plate", "long"), published={"ood": 71.0}),
        "merged": Method({"strategies": "retain"}, section="ours", orders=("door", "plate")),
        "begun": Method(orders=("door", "plate")),
    },
    reference="plain",
    orders=ORDERS,
    pooled=("door", "plate"),
)


def result(row, seed, task, before, after, shifted):
    """10 episodes a cell; two held-out tasks in the first variant only."""

    def cell(successes):
        return np.arange(10) < successes

    first = (
        {task: cell(before[0]), "x": cell(before[1]), "y": cell(8)},
        {task: cell(after[0]), "x": cell(after[1]), "y": cell(8)},
    )
    second = ({task: cell(0)}, {task: cell(shifted)})
    matrices = {
        ("id", "sampled"): SuccessMatrix((task,), ("x", "y"), first),
        ("ood", "sampled"): SuccessMatrix((task,), (), second),
    }
    return Result(row, seed, matrices, (), {}, {})


@pytest.fixture
def results():
    return {
        "plain-door": {
            0: result("plain-door", 0, "a", (1, 6), (9, 2), 5),
            1: result("plain-door", 1, "a", (1, 6), (7, 4), 3),
        },
        "plain-plate": {
            0: result("plain-plate", 0, "b", (3, 6), (5, 6), 1),
            1: result("plain-plate", 1, "b", (3, 6), (5, 4), 1),
        },
        "plain-long": {0: result("plain-long", 0, "b", (0, 0), (0, 0), 0)},
        "merged-door": {0: result("merged-door", 0, "a", (1, 6), (8, 6), 7)},
        "merged-plate": {0: result("merged-plate", 0, "b", (3, 6), (4, 6), 4)},
        "begun-door": {0: result("begun-door", 0, "a", (1, 6), (8, 6), 7)},
    }


def values(figures):
    return {column: figure["value"] for column, figure in figures.items()}


def test_a_row_is_the_mean_over_tasks_of_the_mean_over_seeds(results):
    found = protocol.figures(STUDY, results)
    rows = {row["method"]: row for row in found["rows"]}
    assert found["columns"] == ["id", "ood", "generalist"]
    assert list(rows) == ["base", "plain", "merged"], "a method waits until every task has a run"
    assert values(rows["plain"]["figures"]) == pytest.approx({"id": 65, "ood": 25, "generalist": 60})
    assert values(rows["merged"]["figures"]) == pytest.approx({"id": 60, "ood": 55, "generalist": 70})
    assert values(rows["base"]["figures"]) == pytest.approx({"id": 20, "ood": 0, "generalist": 70})
    assert [rows[name]["before"]["value"] for name in rows] == pytest.approx([70, 70, 70])
    assert [rows[name]["runs"] for name in rows] == [4, 4, 2]
    assert rows["plain"]["published"] == {"ood": 71.0}
    for row in rows.values():
        for figure in row["figures"].values():
            assert figure["low"] < figure["value"] < figure["high"] or figure["value"] == 0


def test_differences_are_taken_on_common_seeds(results):
    rows = {row["method"]: row for row in protocol.figures(STUDY, results)["rows"]}
    assert rows["plain"]["versus"] is None
    # seed 0 alone: id (8 - 9 + 4 - 5) / 2, ood (7 - 5 + 4 - 1) / 2, old tasks (6 - 2 + 6 - 6) / 2 / 2 of 10
    assert values(rows["merged"]["versus"]) == pytest.approx({"id": -10, "ood": 25, "generalist": 10})
    assert values(rows["base"]["versus"]) == pytest.approx({"id": -45, "ood": -25, "generalist": 10})


def test_the_markdown_shows_rates_and_signed_differences(results):
    lines = protocol.markdown(protocol.figures(STUDY, results), "plain")
    assert lines[0] == "| method | runs | id | ood | generalist |"
    assert lines[3].startswith("| plain | 4 | 65.0 (")
    assert "| minus plain | runs | id | ood | generalist |" in lines
    (merged,) = [line for line in lines if line.startswith("| merged | 2 | \u221210.0 (")]
    assert "| +25.0 (" in merged


def test_a_study_of_one_order_has_no_protocol(results):
    assert protocol.figures(Study("", "demo", {"plain": Method()}, reference="plain"), results) is None


def test_a_row_of_another_task_is_compared_with_the_reference_on_that_task(results, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "study_name", lambda folder: "invented")
    monkeypatch.setattr(study.base, "find", lambda name: STUDY)
    content = {"command": "", "environment": {}}
    known = {
        row: {seed: replace(r, cost={"s": 1.0}, content=content) for seed, r in runs.items()}
        for row, runs in results.items()
    }
    monkeypatch.setattr(
        study, "read_results", lambda folder, found: {row: known[row] for row in ("merged-door", "plain-door")}
    )
    monkeypatch.setattr(
        study.base, "grid", lambda found: [base.Entry(STUDY, m, "door", s) for m in ("merged", "plain") for s in (0, 1)]
    )
    merged, plain = study.figures(tmp_path)["rows"]
    assert merged["section"] == "ours"
    assert merged["decoders"]["sampled"]["versus"]["avg"]["value"] == pytest.approx(-10)
    assert plain["decoders"]["sampled"]["versus"] is None
