"""The examples of `docs/python.md` are run from top to bottom, as a reader would."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from perennial.demonstrations.dataset import to_batch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """The names that the examples leave behind."""
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("the examples play in Meta-World")
    names = {"__name__": "examples"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reader"))
        for source in BLOCK.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8")):
            exec(source, names)
        names["folder"] = names["folder"].absolute()
    return names


def test_the_episode_is_played_to_its_end(after):
    assert isinstance(after["info"]["is_success"], bool)
    assert bool(after["terminated"]) == after["info"]["is_success"]
    assert after["ended"]


def test_the_step_learns_from_its_own_episodes(after):
    assert [t.episode.initial_state for t in after["trajectories"]] == [0] * 4 + [1] * 4
    moved = any(p.detach().abs().sum() > 0 for n, p in after["policy"].trainable().items() if "lora_B" in n)
    assert moved == (after["metrics"]["grad_norm"] > 0)


def test_the_run_is_what_its_settings_say(after):
    assert after["matrix"].tasks == ("button-press-v3", "drawer-close-v3")
    np.testing.assert_array_equal(after["matrix"].episodes(), np.full((2, 2), 4))
    assert json.loads((after["folder"] / "run.json").read_text())["config"]["recipe"][0]["iterations"] == 1


def test_forgetting_is_counted_by_hand(after):
    """Right after its turn `pick` was solved three times, in the end twice, of four."""
    assert after["forgotten"].value == pytest.approx(0.25)


def test_the_recording_is_read_as_it_was_written(after):
    read, task = after["demonstration"], after["task"]
    assert (read.task, read.instruction) == (task.name, task.instructions[0])
    np.testing.assert_array_equal(read.image_steps, [0, 4, 8])
    batch = to_batch([read], after["policy"])
    assert len(batch) == 3
    assert batch.mask.shape[1] == len(after["policy"].token_steps)


def test_the_merges_lie_between_base_and_finetuned(after):
    pretrained, finetuned, merged, partly = (after[n] for n in ("pretrained", "finetuned", "merged", "partly"))
    changed = [name for name in pretrained if not (pretrained[name] == finetuned[name]).all()]
    assert {after["group_of"][name] for name in changed} >= {"language"}
    for name in changed:
        expected = 0.2 * pretrained[name].double() + 0.8 * finetuned[name].double()
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
        language = after["group_of"][name] == "language"
        np.testing.assert_array_equal(partly[name], merged[name] if language else finetuned[name])
