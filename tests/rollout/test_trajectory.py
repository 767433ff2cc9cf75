import numpy as np

from perennial.rollout.trajectory import Episode, Trajectory, to_batch

TOKEN_STEPS = np.array([0, 0, 1, 1, 2, 2])


def trajectory(steps, instruction, success=False):
    count = len(steps)
    rng = np.random.default_rng(count)
    return Trajectory(
        Episode("left", "id", "training", 0, instruction, 1.5, ("test",)),
        images=rng.integers(0, 256, (count, 1, 4, 4, 3), np.uint8),
        states=rng.normal(size=(count, 2)).astype(np.float32),
        samples=rng.integers(0, 9, (count, 6)),
        log_probs=rng.normal(size=(count, 6)).astype(np.float32),
        steps=np.array(steps, np.int32),
        success=success,
    )


def test_a_batch_holds_all_decisions_in_order_and_masks_what_was_not_executed():
    first, second = trajectory([3, 3, 2], "go left"), trajectory([1], "go on")
    batch = to_batch([first, second], TOKEN_STEPS)
    assert len(batch) == 4
    assert batch.observation.instructions == ("go left", "go left", "go left", "go on")
    np.testing.assert_array_equal(batch.observation.images[3], second.images[0])
    np.testing.assert_array_equal(batch.observation.states[:3], first.states)
    np.testing.assert_array_equal(batch.sample, np.concatenate([first.samples, second.samples]))
    np.testing.assert_array_equal(batch.log_prob[2], first.log_probs[2])
    np.testing.assert_array_equal(
        batch.mask.astype(int), [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    )
    assert batch.temperature == 1.5


def test_the_reward_is_one_at_success():
    assert trajectory([1], "go", success=True).reward == 1.0
    assert trajectory([1], "go").reward == 0.0
