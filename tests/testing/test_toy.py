import numpy as np
import pytest
import torch

from perennial import discovery
from perennial.errors import PerennialError
from perennial.policies.base import Batch, Observation, Policy
from perennial.policies.lora import LoRA, add_adapter, set_trainable
from perennial.randomness import stream
from perennial.rollout.collect import Environments, play
from perennial.rollout.trajectory import Episode, to_batch
from perennial.suites.base import Suite
from perennial.testing.toy import ToyPolicy, ToySuite

SUITE = ToySuite()


def observations(rows, seed=0):
    rng = stream(seed, "observations")
    images = rng.integers(0, 256, (rows, 1, 8, 8, 3)).astype(np.uint8)
    instructions = tuple(("go left", "move the point up", "please move down")[i % 3] for i in range(rows))
    return Observation(images, instructions, rng.uniform(-1, 1, (rows, 2)).astype(np.float32))


def test_one_module_is_found_as_a_suite_and_as_a_policy():
    assert discovery.find("suites", "perennial.testing.toy", Suite) is ToySuite
    assert discovery.find("policies", "perennial.testing.toy", Policy) is ToyPolicy


@pytest.mark.parametrize("variant", SUITE.variants)
@pytest.mark.parametrize("task", SUITE.tasks)
def test_the_expert_solves_every_task_and_an_idle_robot_none(task, variant):
    for index in range(5):
        for expert, solved in ((SUITE.expert(task), True), (lambda environment: np.zeros(2, np.float32), False)):
            environment = SUITE.make(task, variant)
            environment.reset(options={"split": "evaluation", "index": index})
            done = False
            while not done:
                _, reward, terminated, truncated, info = environment.step(expert(environment))
                done = terminated or truncated
            assert info["is_success"] == terminated == bool(reward) == solved
            assert (environment.steps == SUITE.tasks[task].horizon) == (not solved)


def test_initial_states_are_named_by_split_and_index():
    environment = SUITE.make("left")
    first = {
        (split, index): tuple(environment.reset(options={"split": split, "index": index})[0])
        for split in ("training", "evaluation", "demonstration")
        for index in range(20)
    }
    assert len(set(first.values())) == len(first)
    again = SUITE.make("left", image_size=32)
    assert all(tuple(again.reset(options={"split": s, "index": i})[0]) == at for (s, i), at in first.items())


def test_the_image_shows_the_point_and_the_film_also_the_target():
    environment = SUITE.make("right", image_size=8)
    environment.position = np.array([-1.0, 1.0], np.float32)
    image = environment.render()
    assert image.shape == (1, 8, 8, 3)
    assert image.dtype == np.uint8
    assert np.argwhere(image[0, :, :, 0] == 255).tolist() == [[0, 0]]
    frame = environment.film(64)
    assert frame.shape == (64, 64, 3)
    assert np.argwhere(frame[:, :, 1] == 200).mean(0) == pytest.approx([31.5, 51.5], abs=1)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(PerennialError, match="Did you mean left"):
        SUITE.make("lefty")
    with pytest.raises(PerennialError, match="ood_val"):
        SUITE.make("left", "ood_vall")


def test_acting_and_learning_agree_on_the_log_probability():
    policy, seen = ToyPolicy(3), observations(12)
    chunk = policy.act(seen, 1.6, [stream(0, "row", i) for i in range(12)])
    assert chunk.actions.shape == (12, 2, 2)
    batch = Batch(seen, chunk.sample, np.ones((12, 4), bool), temperature=1.6)
    np.testing.assert_allclose(policy.log_prob(batch).detach().numpy(), chunk.log_prob, atol=1e-6)
    np.testing.assert_array_equal(policy.encode(chunk.actions), chunk.sample)


def test_a_row_does_not_depend_on_its_company():
    policy, seen = ToyPolicy(3), observations(12)
    together = policy.act(seen, 1.0, [stream(0, "row", i) for i in range(12)])
    alone = [policy.act(seen.take(np.array([i])), 1.0, [stream(0, "row", i)]).sample[0] for i in range(12)]
    np.testing.assert_array_equal(together.sample, np.stack(alone))


def test_samples_follow_the_distribution():
    policy, one = ToyPolicy(3), observations(1)
    crowd = one.take(np.zeros(20_000, int))
    sample = policy.act(crowd, 0.7, [stream(0, "row", i) for i in range(20_000)]).sample
    expected = (policy.logits(Batch(one, sample[:1], np.ones((1, 4), bool)))[0] / 0.7).softmax(-1).detach().numpy()
    observed = np.stack([np.bincount(sample[:, token], minlength=9) for token in range(4)]) / 20_000
    np.testing.assert_allclose(observed, expected, atol=0.015)


def test_greedy_takes_the_most_likely_bin_and_draws_nothing():
    policy, seen = ToyPolicy(3), observations(4)
    rng = [stream(0, "row", i) for i in range(4)]
    chunk = policy.act(seen, 0.0, rng)
    logits = policy.logits(Batch(seen, chunk.sample, np.ones((4, 4), bool)))
    np.testing.assert_array_equal(chunk.sample, logits.argmax(-1).numpy())
    assert [r.random() for r in rng] == [stream(0, "row", i).random() for i in range(4)]


def test_imitation_is_the_mean_over_executed_tokens():
    policy, seen = ToyPolicy(3), observations(3)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    sample = stream(0, "sample").integers(0, 9, (3, 4))
    batch = Batch(seen, sample, mask)
    log_probs = policy.log_prob(batch).detach().numpy()
    expected = [-log_probs[0].mean(), -log_probs[1, :2].mean(), -log_probs[2, :2].mean()]
    np.testing.assert_allclose(policy.imitation_loss(batch).detach().numpy(), expected, rtol=1e-5)


def test_it_is_saved_with_its_adapter_and_a_broken_folder_is_refused(tmp_path):
    policy, seen = ToyPolicy(3), observations(4)
    add_adapter(policy, LoRA(rank=2, alpha=2), seed=0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.save(tmp_path / "base")
    batch = Batch(seen, np.zeros((4, 4), np.int64), np.ones((4, 4), bool))
    torch.testing.assert_close(ToyPolicy.load(tmp_path / "base").logits(batch), policy.logits(batch))
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PerennialError, match="save it again"):
        ToyPolicy.load(tmp_path / "base")


def test_reinforcement_teaches_it_with_an_adapter():
    policy = ToyPolicy(1)
    add_adapter(policy, LoRA(rank=8, alpha=8), seed=0)
    set_trainable(policy)
    optimizer = torch.optim.Adam(policy.trainable().values(), 1e-2)
    environments = Environments(SUITE, policy.image_size)

    def success(split, iteration):
        episodes = [Episode("up", "id", split, i, "go up", 1.0, (split, iteration, i)) for i in range(64)]
        return play(policy, environments, episodes, seed=0, slots=64)

    before = np.mean([t.success for t in success("evaluation", 0)])
    for iteration in range(12):
        trajectories = success("training", iteration)
        mean = np.mean([t.success for t in trajectories])
        batch = to_batch(trajectories, policy.token_steps)
        advantage = np.repeat([t.success - mean for t in trajectories], [len(t.steps) for t in trajectories])
        weight = torch.from_numpy(batch.mask * advantage[:, None]).float()
        for _ in range(3):
            loss = -(policy.log_prob(batch) * weight).sum() / len(trajectories)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert before < 0.3
    assert np.mean([t.success for t in success("evaluation", 0)]) > 0.8
