import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.demonstrations.dataset import load, to_batch
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.randomness import stream
from perennial.strategies._memory import concatenate, draw, from_tensors, to_tensors
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.replay import Replay
from strategies.worlds import TASKS, batch, log_softmax, no_episodes, policy, shake, trajectory


def with_logits(rows, seed):
    logits = stream(seed, "logits").normal(0, 1, (*rows.sample.shape, 9)).astype(np.float32)
    return dataclasses.replace(rows, logits=logits)


def numpy_logits(learner, rows):
    return learner.logits(rows).detach().double().numpy()


def imitation(learner, rows):
    log_probs = log_softmax(numpy_logits(learner, rows))
    chosen = np.take_along_axis(log_probs, rows.sample[..., None], -1)[..., 0]
    return np.mean([-chosen[i, rows.mask[i]].mean() for i in range(len(rows))])


def test_replay_loss_is_the_weighted_imitation_loss():
    learner, rows = policy(), batch(7)
    loss = Replay(coefficient=0.3).replay_loss(learner.outputs(rows), rows)
    assert float(loss.detach()) == pytest.approx(0.3 * imitation(learner, rows), rel=1e-5)


def test_dark_replay_loss_is_the_squared_error_of_executed_logits():
    learner, rows = policy(), with_logits(batch(7), seed=4)
    squares = ((numpy_logits(learner, rows) - rows.logits) ** 2)[rows.mask].mean()
    loss = DarkReplay(coefficient=0.3).replay_loss(learner.outputs(rows), rows)
    assert float(loss.detach()) == pytest.approx(0.3 * squares, rel=1e-5)
    both = DarkReplay(coefficient=0.3, label_coefficient=0.7).replay_loss(learner.outputs(rows), rows)
    assert float(both.detach()) == pytest.approx(0.3 * squares + 0.7 * imitation(learner, rows), rel=1e-5)


@pytest.mark.parametrize("label_coefficient", [0.0, 0.7])
def test_dark_replay_looks_once_at_what_it_replays(label_coefficient):
    learner, rows, looks = policy(), with_logits(batch(7), seed=4), []
    learner.model.register_forward_hook(lambda *_: looks.append(1))
    DarkReplay(label_coefficient=label_coefficient).replay_loss(learner.outputs(rows), rows)
    assert len(looks) == 1


def test_only_successes_are_kept_and_no_more_than_fit():
    replay = Replay(capacity=6)
    played = [trajectory(i % 2 == 0, 4, seed=i) for i in range(6)]
    replay.remember(TASKS["left"], policy(), lambda count: played[: min(count, 6)])
    kept = replay.memories["left"]
    successful = np.concatenate([t.states for t in played if t.success])
    assert len(kept) == 6
    assert len({tuple(state) for state in kept.observation.states} & {tuple(s) for s in successful}) == 6
    assert kept.temperature == 1.0


def test_kept_rows_stay_whole():
    replay, played = Replay(capacity=5), trajectory(True, 9, seed=3)
    replay.remember(TASKS["left"], policy(), lambda count: [played])
    kept = replay.memories["left"]
    for row in range(5):
        source = np.flatnonzero((played.states == kept.observation.states[row]).all(1)).item()
        np.testing.assert_array_equal(kept.sample[row], played.samples[source])
        np.testing.assert_array_equal(kept.observation.images[row], played.images[source])
        assert kept.mask[row].sum() == 2 * played.steps[source]


def test_a_task_without_success_leaves_nothing():
    replay = Replay()
    replay.remember(TASKS["left"], policy(), lambda count: [trajectory(False, 4)])
    assert replay.replay(stream(0, "r"), 8) is None
    assert replay.state_dict() == {}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    record_all("perennial.testing.toy", ("left", "up"), 3, folder, 1, settings=Settings(image_size=8, image_every=2))
    return folder


def shown(folder, task, learner, count=None):
    return {tuple(state) for state in to_batch(load(folder, [task])[:count], learner).observation.states}


@pytest.mark.parametrize("kind", [Replay, DarkReplay])
def test_demonstrations_of_a_task_are_kept_once_it_has_been_learned(kind, demonstrations):
    learner, replay = policy(), kind(capacity=4, demonstrations=str(demonstrations))
    replay.before_task(TASKS["left"], learner)
    assert replay.memories == {}
    replay.remember(TASKS["left"], learner, no_episodes)
    assert list(replay.memories) == ["left"]
    kept = replay.memories["left"]
    assert len(kept) == 4
    assert {tuple(state) for state in kept.observation.states} < shown(demonstrations, "left", learner)
    assert (kept.logits is not None) == (kind is DarkReplay)


@pytest.mark.parametrize("kind", [Replay, DarkReplay])
def test_ut2026_replays_the_first_demonstration_of_every_task_from_the_start(kind, demonstrations):
    learner, base = policy(), policy()
    replay = kind(variant="ut2026", demonstrations=str(demonstrations))
    replay.before_task(TASKS["left"], learner)
    shake(learner, seed=1)
    replay.remember(TASKS["left"], learner, no_episodes)
    resumed = kind(variant="ut2026", demonstrations=str(demonstrations))
    resumed.load_state_dict(replay.state_dict(), learner)
    resumed.before_task(TASKS["down"], learner)
    assert list(resumed.memories) == ["left", "up"]
    for task, kept in resumed.memories.items():
        assert {tuple(s) for s in kept.observation.states} == shown(demonstrations, task, learner, 1)
        if kind is DarkReplay:
            np.testing.assert_allclose(kept.logits, base.logits(kept).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", [Replay, DarkReplay])
def test_missing_demonstrations_are_said_before_the_run(kind, demonstrations):
    kind(demonstrations=str(demonstrations)).check(("left", "up"))
    with pytest.raises(PerennialError, match=rf"demonstration of down .*set --strategies\.{kind.name}\.demonstrations"):
        kind(demonstrations=str(demonstrations)).check(("left", "down"))
    with pytest.raises(PerennialError, match="no demonstration of left"):
        Replay(variant="ut2026").check(("left",))


@pytest.mark.parametrize(("ratio", "size", "rows"), [(1.0, 8, 8), (0.5, 8, 4), (0.25, 8, 2), (0.1, 4, None)])
def test_the_ratio_decides_how_much_is_replayed(ratio, size, rows):
    replay = Replay(ratio=ratio)
    replay.remember(TASKS["left"], policy(), lambda count: [trajectory(True, 5)])
    drawn = replay.replay(stream(0, "r"), size)
    assert (None if drawn is None else len(drawn)) == rows


def test_logits_are_those_at_the_end_of_the_task():
    learner, dark = policy(adapter=True), DarkReplay(capacity=100)
    dark.before_task(TASKS["left"], learner)
    shake(learner, seed=1)
    dark.remember(TASKS["left"], learner, lambda count: [trajectory(True, 70)])
    kept = dark.memories["left"]
    np.testing.assert_allclose(kept.logits, learner.logits(kept).detach().numpy(), atol=1e-5)
    shake(learner, seed=2)
    assert np.abs(kept.logits - learner.logits(kept).detach().numpy()).max() > 0.01


@pytest.mark.parametrize("adapter", [False, True])
def test_ut2026_takes_the_logits_of_the_base(adapter):
    learner, base, dark = policy(adapter), policy(), DarkReplay(variant="ut2026")
    for task in ("left", "up"):
        dark.before_task(TASKS[task], learner)
        shake(learner, seed=1)
        shaken = learner.acting_weights()
        dark.remember(TASKS[task], learner, lambda count: [trajectory(True, 6)])
        kept = dark.memories[task]
        np.testing.assert_allclose(kept.logits, base.logits(kept).detach().numpy(), atol=1e-5)
        assert all(torch.equal(value, shaken[name]) for name, value in learner.acting_weights().items())


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), size=st.integers(1, 40), seed=st.integers(0, 999))
def test_draws_are_rows_of_the_memories_without_needless_repetition(sizes, size, seed):
    memories = [batch(rows, seed=i) for i, rows in enumerate(sizes)]
    everything = concatenate(memories)
    drawn = draw(memories, stream(seed, "draw"), size)
    assert len(drawn) == size
    known = {tuple(s): i for i, s in enumerate(everything.observation.states)}
    sources = [known[tuple(s)] for s in drawn.observation.states]
    np.testing.assert_array_equal(drawn.sample, everything.sample[sources])
    np.testing.assert_array_equal(drawn.mask, everything.mask[sources])
    assert len(set(sources)) == size or size > sum(sizes)


def test_every_row_is_as_likely_whatever_its_task():
    memories = [batch(2, seed=0), batch(6, seed=1)]
    known = {tuple(s): i for i, s in enumerate(concatenate(memories).observation.states)}
    counts = np.zeros(8)
    for seed in range(2000):
        for state in draw(memories, stream(seed, "draw"), 2).observation.states:
            counts[known[tuple(state)]] += 1
    np.testing.assert_allclose(counts / counts.sum(), 1 / 8, atol=0.015)


@settings(deadline=None, max_examples=30)
@given(sentence=st.text(max_size=40), rows=st.integers(1, 4), logits=st.booleans())
def test_a_memory_survives_as_tensors(sentence, rows, logits):
    kept = batch(rows, instruction=sentence)
    kept = with_logits(kept, 0) if logits else kept
    back = from_tensors(to_tensors(kept))
    assert back.observation.instructions == kept.observation.instructions
    for name in ("sample", "mask", "logits"):
        np.testing.assert_array_equal(getattr(back, name), getattr(kept, name))
    np.testing.assert_array_equal(back.observation.images, kept.observation.images)
    np.testing.assert_array_equal(back.observation.states, kept.observation.states)


@pytest.mark.parametrize("kind", [Replay, DarkReplay])
def test_the_coefficient_is_that_of_the_variant_unless_given(kind):
    learner, rows = policy(), with_logits(batch(5), seed=4)

    def loss(**given):
        return float(kind(**given).replay_loss(learner.outputs(rows), rows).detach())

    for variant, default in (("textbook", 0.1), ("ut2026", 0.03)):
        assert loss(variant=variant) == loss(variant=variant, coefficient=default)
        assert loss(variant=variant, coefficient=0.5) == pytest.approx(loss(variant=variant) / default * 0.5)


@pytest.mark.parametrize("kind", [Replay, DarkReplay])
@pytest.mark.parametrize("wrong", [{"coefficient": -1.0}, {"ratio": 0.0}, {"ratio": 1.5}, {"capacity": 0}])
def test_senseless_settings_are_refused(kind, wrong):
    with pytest.raises(PerennialError, match=rf"{kind.name}\.{next(iter(wrong))}"):
        kind(**wrong)


def test_a_negative_label_coefficient_is_refused():
    with pytest.raises(PerennialError, match="label_coefficient"):
        DarkReplay(label_coefficient=-0.1)
