import dataclasses
import io
import json

import gymnasium
import numpy as np
import pytest
from rich.console import Console

from perennial.commands import Demos
from perennial.demonstrations import command
from perennial.demonstrations.dataset import data_hash, load, read
from perennial.demonstrations.record import Settings, record, record_all
from perennial.errors import PerennialError
from perennial.storage.atomic import verify
from perennial.testing.toy import STEP, ToySuite, reach

TOY = "perennial.testing.toy"
SETTINGS = Settings(image_size=8, image_every=3)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_the_command_line_records_as_python_does():
    for name in ("variant", "image_size", "image_every"):
        assert getattr(Demos, name) == getattr(Settings, name)


def test_an_undisturbed_episode_is_the_experts(tmp_path):
    (path,) = record(ToySuite(), "up", [4], tmp_path, SETTINGS)
    header, demonstration = read(path)
    environment = ToySuite().make("up", image_size=8)
    state, _ = environment.reset(options={"split": "demonstration", "index": 4})
    images, images_at = [], []
    for step, action in enumerate(demonstration.actions):
        np.testing.assert_array_equal(demonstration.states[step], state)
        np.testing.assert_array_equal(action, reach(environment))
        if step % 3 == 0:
            images.append(environment.render())
            images_at.append(step)
        state, _, ended, _, info = environment.step(action)
    assert ended
    assert info["is_success"]
    assert header["success"] is True
    assert header["noise"] == 0
    assert demonstration.image_steps.tolist() == images_at
    np.testing.assert_array_equal(demonstration.images, np.stack(images))


def test_a_disturbed_episode_is_labelled_with_what_the_expert_wanted(tmp_path):
    (path,) = record(ToySuite(), "right", [5], tmp_path, SETTINGS)
    header, demonstration = read(path)
    assert header["noise"] == 0.25
    target = np.array(ToySuite.targets["right"], np.float32)
    wanted = np.clip((target - demonstration.states) / STEP, -1, 1)
    np.testing.assert_allclose(demonstration.actions, wanted, atol=1e-6)
    moved = np.diff(demonstration.states, axis=0) / STEP
    off = np.abs(moved - demonstration.actions[:-1]).max()
    assert 0.02 < off < 2
    assert np.abs(moved).max() < 1 + 1e-5, "executed actions stay in range"


class Sixteenths(ToySuite):
    """The same tasks with actions in [-1/16, 1/16]."""

    def expert(self, task):
        return lambda environment: reach(environment) / 16

    def make(self, task, variant="id", image_size=8):
        environment = super().make(task, variant, image_size)
        step = environment.step
        environment.step = lambda action: step(action * 16)
        environment.action_space = gymnasium.spaces.Box(-1 / 16, 1 / 16, (2,), np.float32)
        return environment


def test_noise_is_as_large_as_the_range_of_actions(tmp_path):
    """In other units of actions the same episode is recorded."""
    (plain,) = record(ToySuite(), "right", [5], tmp_path / "plain", SETTINGS)
    (scaled,) = record(Sixteenths(), "right", [5], tmp_path / "scaled", SETTINGS)
    (_, one), (_, other) = read(plain), read(scaled)
    np.testing.assert_allclose(other.states, one.states, atol=1e-6)
    np.testing.assert_allclose(16 * other.actions, one.actions, atol=1e-6)


def test_actions_without_bounds_are_refused(tmp_path):
    endless = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    class Endless(ToySuite):
        def make(self, task, variant="id", image_size=8):
            environment = super().make(task, variant, image_size)
            environment.action_space = endless
            return environment

    with pytest.raises(PerennialError, match=r"actions of up have no bounds .*give its environment a bounded"):
        record(Endless(), "up", [0], tmp_path, SETTINGS)


def test_every_paraphrase_is_heard_with_and_without_noise(tmp_path):
    headers = [read(path)[0] for path in record(ToySuite(), "down", range(8), tmp_path, SETTINGS)]
    heard = {(header["instruction"], header["noise"]) for header in headers}
    assert heard == {(sentence, noise) for sentence in ToySuite.tasks["down"].instructions for noise in (0.0, 0.25)}


def test_the_files_do_not_depend_on_the_order_or_the_processes(tmp_path):
    for index in (3, 0, 2, 1):
        for task in ("up", "left"):
            record(ToySuite(), task, [index], tmp_path / "backwards", SETTINGS)
    seen = []
    record_all(TOY, ["left", "up"], 4, tmp_path / "processes", workers=2, on_episode=seen.append, settings=SETTINGS)
    assert len(contents(tmp_path / "backwards")) == 8
    assert contents(tmp_path / "backwards") == contents(tmp_path / "processes")
    assert sorted(path.relative_to(tmp_path / "processes").as_posix() for path in seen) == list(
        contents(tmp_path / "processes")
    )


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_a_simulator_that_dies_or_hangs_ends_the_recording_and_the_rest_is_recorded_later(tmp_path, monkeypatch, way):
    monkeypatch.setenv("UNRELIABLE", str(tmp_path))

    def attempt(folder, workers):
        record_all("toyhouse.unreliable", [f"{way}-once"], 7, folder, workers, settings=SETTINGS, timeout=20.0)

    with pytest.raises(PerennialError, match=r"took longer than 20 seconds; repeat the command"):
        attempt(tmp_path / "twice", 2)
    assert len(contents(tmp_path / "twice")) == 5
    attempt(tmp_path / "twice", 2)
    attempt(tmp_path / "once", 1)
    assert len(contents(tmp_path / "once")) == 7
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_demonstrations_that_are_held_out_begin_where_the_others_end(tmp_path):
    record_all(TOY, ["up"], 4, tmp_path / "all", workers=1, settings=SETTINGS)
    record_all(TOY, ["up"], 2, tmp_path / "later", workers=1, settings=SETTINGS, first=2)
    everything = contents(tmp_path / "all")
    assert contents(tmp_path / "later") == {
        name: everything[name] for name in ("up/0002.safetensors", "up/0003.safetensors")
    }


def test_recording_again_makes_only_what_is_missing_or_damaged(tmp_path):
    paths = record(ToySuite(), "up", range(4), tmp_path, SETTINGS)
    before, kept = contents(tmp_path), paths[0].stat().st_mtime_ns
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    paths[2].unlink()
    paths[3].write_bytes(b"")
    assert record(ToySuite(), "up", range(4), tmp_path, SETTINGS) == paths
    assert contents(tmp_path) == before
    assert paths[0].stat().st_mtime_ns == kept


@pytest.mark.parametrize("other", [{"image_every": 2}, {"image_size": 16}, {"noise": 0.5}, {"variant": "ood_val"}])
def test_a_folder_recorded_otherwise_is_left_alone(tmp_path, other):
    record(ToySuite(), "up", range(2), tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(PerennialError, match=next(iter(other))):
        record(ToySuite(), "up", range(2), tmp_path, dataclasses.replace(SETTINGS, **other))
    assert contents(tmp_path) == before


class Clumsy(ToySuite):
    """Its expert stands still in the initial states of odd number."""

    def expert(self, task):
        return lambda environment: reach(environment) * (self.index % 2 == 0)

    def make(self, task, variant="id", image_size=8):
        environment = super().make(task, variant, image_size)
        reset = environment.reset

        def remember(*, seed=None, options=None):
            self.index = options["index"]
            return reset(seed=seed, options=options)

        environment.reset = remember
        return environment


def test_failures_are_recorded_but_not_loaded(tmp_path):
    paths = record(Clumsy(), "up", range(6), tmp_path, dataclasses.replace(SETTINGS, noise=0.0))
    assert [read(path)[0]["success"] for path in paths] == [True, False] * 3
    assert len(read(paths[1])[1].actions) == ToySuite.tasks["up"].horizon
    assert [demonstration.initial_state for demonstration in load(tmp_path)] == [0, 2, 4]
    record(Clumsy(), "left", [1, 3], tmp_path, dataclasses.replace(SETTINGS, noise=0.0))
    with pytest.raises(PerennialError, match="None of the 2 demonstrations of left"):
        load(tmp_path)
    assert len(load(tmp_path, ["up"])) == 3


def test_it_is_told_how_often_the_expert_failed(tmp_path, monkeypatch):
    paths = record(Clumsy(), "left", range(4), tmp_path, dataclasses.replace(SETTINGS, noise=0.0))
    monkeypatch.setattr(command, "record_all", lambda *asked: [asked[5](path) for path in paths])
    said = io.StringIO()
    command.record(Demos(tmp_path, tasks=("left",), count=4, suite=TOY), Console(file=said, width=200))
    assert said.getvalue().splitlines() == [
        f"4 demonstrations, 4 of each task, are in {tmp_path}.",
        "In 2 of them the expert failed; nobody learns from these.",
    ]


def test_a_task_without_an_expert_cannot_be_recorded(tmp_path):
    class Expertless(ToySuite):
        def expert(self, task):
            return None

    with pytest.raises(PerennialError, match="no scripted expert for up"):
        record(Expertless(), "up", [0], tmp_path, SETTINGS)


def test_the_manifest_knows_every_byte(tmp_path):
    record_all(TOY, ["up"], 3, tmp_path, workers=1, settings=SETTINGS)
    verify(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["data_sha256"] == data_hash(tmp_path)
    assert sorted(manifest["files"]) == list(contents(tmp_path))
    record(ToySuite(), "up", [3], tmp_path, SETTINGS)
    assert data_hash(tmp_path) != manifest["data_sha256"]


@pytest.mark.simulator
def test_meta_world_is_recorded(tmp_path):
    from perennial.suites.metaworld import MetaWorld

    suite = MetaWorld()
    record(suite, "handle-press-v3", range(3), tmp_path, Settings(image_size=32, image_every=4))
    demonstrations = load(tmp_path)
    assert [demonstration.initial_state for demonstration in demonstrations] == [0, 1, 2]
    environment = suite.make("handle-press-v3", image_size=32)
    state, _ = environment.reset(options={"split": "demonstration", "index": 2})
    np.testing.assert_array_equal(demonstrations[2].images[0], environment.render())
    np.testing.assert_array_equal(demonstrations[2].states[0], state)
    for action in demonstrations[2].actions:
        *_, info = environment.step(action)
    environment.close()
    assert info["is_success"]
