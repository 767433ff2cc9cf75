"""The rows of the suites: what is measured, that the page keeps them, and that it shows what the files say."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return {name: importlib.import_module(name) for name in ("page", "rollout", "suites")}


def test_a_row_is_added_and_the_others_are_kept(scripts, tmp_path, capsys):
    """On an environment without a simulator; the page has a cell for everything that is measured."""
    target = tmp_path / "suites.json"
    target.write_text(json.dumps({"other": {"tasks": {"a": {}}}}))
    suite = "envhub:perennial.testing.hub:make_env"
    for task in ("lift-0", "lift-1"):
        scripts["suites"].main([suite, task, "--repeats", "1", "--out", str(target)])
    found = json.loads(target.read_text())
    assert found["other"] == {"tasks": {"a": {}}}
    assert set(found[suite]["tasks"]) == {"lift-0", "lift-1"}
    row = found[suite]["tasks"]["lift-0"]
    assert row["share_of_ceiling"] == pytest.approx(
        row["collected_steps_per_second"] / row["replayed_steps_per_second"], rel=0.01
    )
    assert row["memory_mb"] > row["memory_without_suite_mb"] > 100
    shown = " ".join(scripts["page"].COLUMNS.values())
    assert {name for name in row if f"{{{name}}}" in shown} == set(row)


def test_a_replay_takes_the_recorded_steps_and_looks_once_a_chunk(scripts):
    class Counting:
        steps, looks, begun = 0, 0, ()

        def borrow(self, task, variant):
            return self

        def give_back(self, task, variant, environment):
            assert environment is self

        def reset(self, options):
            self.begun = (*self.begun, options["index"])

        def step(self, action):
            self.steps += action

        def render(self):
            self.looks += 1

    from perennial.rollout.trajectory import Episode

    episodes = [Episode("t", "id", "training", index, "go", 1.0, ("k",)) for index in (4, 7)]
    environments = Counting()
    scripts["rollout"].replay(environments, [(episode, [[1, 1, 1], [1, 1, 1]], [3, 2]) for episode in episodes])
    assert (environments.steps, environments.looks, environments.begun) == (10, 4, (4, 7))


def test_the_page_shows_what_the_files_say(scripts):
    """So regenerating either part keeps the other."""
    names = ("results.json", "strategies.json", "suites.json")
    results, strategies, suites = (json.loads((ROOT / "benchmarks" / name).read_text()) for name in names)
    text = scripts["page"].page(results, strategies, suites)
    assert (ROOT / "docs" / "benchmarks.md").read_text() == text
    for suite, measured in suites.items():
        for task in measured["tasks"]:
            assert f"| `{suite}` | `{task}` |" in text
    for name, share in strategies["overhead"].items():
        signed = f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")
        assert f"| {scripts['page'].GUARDS[name]} | {signed} % |" in text
