"""Initial states of a suite that has few: what is played, what is kept, and what is made of it."""

import json
from dataclasses import replace

import pytest

from perennial import config as configuration
from perennial import experiment
from perennial.errors import PerennialError
from perennial.evaluation.evaluate import evaluation_episodes
from perennial.evaluation.gate import Gate
from perennial.evaluation.statistics import wilson
from perennial.evaluation.success_matrix import SuccessMatrix
from perennial.planning.work import work_of
from perennial.reports import page, summary
from perennial.session import total_episodes
from perennial.storage.cells import Cell
from perennial.storage.run_folder import RunFolder
from perennial.studies import _results
from perennial.testing.suite_conformance import finite_states_come_round
from perennial.testing.toy import ToySuite
from toyhouse.finite import FiniteSuite
from toyhouse.runs import toy_config

FINITE = "toyhouse.finite"


def test_greedy_episodes_are_not_played_twice():
    for suite, temperature, count in ((FiniteSuite(), 0.0, 3), (FiniteSuite(), 0.5, 8), (ToySuite(), 0.0, 8)):
        episodes = evaluation_episodes(suite, "left", "id", 8, temperature)
        assert [episode.initial_state for episode in episodes] == list(range(count))
    assert len(evaluation_episodes(FiniteSuite(), "left", "id", 2, 0.0)) == 2


def test_what_a_suite_says_of_its_states_is_checked():
    finite_states_come_round(FiniteSuite(), "left")

    class More(FiniteSuite):
        def states(self, task, split, variant="id"):
            return 5

    class Fewer(FiniteSuite):
        def states(self, task, split, variant="id"):
            return 2

    class Twice(FiniteSuite):
        def states(self, task, split, variant="id"):
            return None if split == "demonstration" else 2 * super().states(task, split, variant)

    for suite in (More(), Fewer(), Twice()):
        with pytest.raises(AssertionError, match="id"):
            finite_states_come_round(suite, "left")


@pytest.fixture(scope="module")
def run(toy_checkpoint, tmp_path_factory):
    """Eight episodes a cell, sampled and greedy, in three states."""
    made = replace(toy_config(toy_checkpoint), suite=FINITE)
    made = replace(made, evaluation=replace(made.evaluation, episodes=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.page, "write", lambda path: path / "report" / "index.html")
        return made, experiment.start(made, "toy", tmp_path_factory.mktemp("finite") / "run")


def test_a_run_knows_its_states(run):
    made, path = run
    sampled, greedy = (RunFolder.open(path).cell(Cell(1, decoder, "id", "left")) for decoder in ("sampled", "greedy"))
    assert (len(sampled.successes), len(greedy.successes)) == (8, 3)
    assert (sampled.states, greedy.states) == (3, 3)
    cells = 3 * 3 * (8 + 3)
    assert total_episodes(made) == 2 * 2 * 32 + cells
    assert work_of(made, 2).env_steps == 2 * 2 * 32 * 10 + cells * 10
    matrix = SuccessMatrix.from_run(RunFolder.open(path), "sampled", "id")
    assert matrix.states == {"left": 3, "right": 3, "up-left": 3}
    for again in (
        SuccessMatrix.from_json(json.loads(json.dumps(matrix.to_json()))),
        matrix.restricted(["left"], [], {"left": 8}),
        _results._unpacked(json.loads(json.dumps(_results._packed(matrix)))),
    ):
        assert again.states == matrix.states


def test_reports_tell_both_numbers_of_episodes(run):
    _, path = run
    told = summary.report_json(path)["decoders"]
    assert {name: figures["matrix"]["n"] for name, figures in told.items()} == {"sampled": 8, "greedy": 3}
    assert {name: figures["avg"]["n"] for name, figures in told.items()} == {"sampled": 16, "greedy": 6}
    successes = RunFolder.open(path).cell(Cell(0, "sampled", "id", "left")).successes
    interval = wilson(sum(successes), 8, 3)
    text = page.render(path)
    assert "that of as many episodes as states" in text
    assert f"of 8 episodes of left, 95\u00a0% interval {100 * interval.low:.1f} to {100 * interval.high:.1f}" in text


def test_a_gate_that_could_never_show_anything_is_refused(run):
    made, _ = run
    strict = replace(made, gate=Gate(max_forgetting=3, held_out=1))
    with pytest.raises(PerennialError, match=r"less than 3 points, as 2 guarded tasks .* give 8 pairs of episodes"):
        configuration.validate_settings(strict)
    configuration.validate_settings(replace(strict, gate=replace(strict.gate, max_forgetting=60)))
    configuration.validate_settings(replace(strict, suite="perennial.testing.toy"))
