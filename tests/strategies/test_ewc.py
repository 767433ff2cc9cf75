from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from perennial.demonstrations.dataset import load, to_batch
from perennial.demonstrations.record import Settings, record_all
from perennial.errors import PerennialError
from perennial.policies.base import Batch, Observation
from perennial.randomness import stream
from perennial.rollout.trajectory import Episode, Trajectory
from perennial.strategies import _fisher as module
from perennial.strategies._fisher import drawn, fisher_diagonal
from perennial.strategies.ewc import EWC
from perennial.testing.toy import ToyPolicy
from strategies.worlds import TASKS, batch, policy, shake


class SoftmaxRegression(ToyPolicy):
    """Logits [N, 1, 3] = W x of the state x, W [3, 2]: its Fisher information has a closed form."""

    token_steps = np.array([0])
    chunk_steps = 1
    centres = np.linspace(-1, 1, 3, dtype=np.float32)

    def __init__(self, weight):
        self.model = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor(weight))

    def _forward(self, observation):
        return self.model(torch.from_numpy(observation.states))[:, None], None


WEIGHT = [[0.5, -1.0], [0.0, 0.3], [-0.8, 1.2]]


def states(rows):
    return stream(0, "states").normal(0, 1, (rows, 2)).astype(np.float32) * np.float32([1.0, 2.0])


def probabilities(x):
    exponentials = np.exp(x @ np.array(WEIGHT).T)
    return exponentials / exponentials.sum(1, keepdims=True)


def observed(x):
    return Observation(np.zeros((len(x), 1, 8, 8, 3), np.uint8), ("go",) * len(x), x)


def episodes(learner, x):
    """One decision per episode, drawn from the policy itself."""
    chunk = learner.act(observed(x), 1.0, [stream(1, "draw", i) for i in range(len(x))])
    episode = Episode("left", "id", "training", 0, "go", 1.0, ("e",))
    images = np.zeros((1, 1, 8, 8, 3), np.uint8)
    return [
        Trajectory(episode, images, x[i : i + 1], chunk.sample[i : i + 1], chunk.log_prob[i : i + 1], np.ones(1), True)
        for i in range(len(x))
    ]


def test_fisher_is_the_mean_squared_score_of_each_decision():
    x, actions = states(40), stream(2, "actions").integers(0, 3, 40)
    learner = SoftmaxRegression(WEIGHT)
    fisher = fisher_diagonal(learner, Batch(observed(x), actions[:, None], np.ones((40, 1), bool)))["weight"]
    score = (np.eye(3)[actions] - probabilities(x))[:, :, None] * x[:, None, :]
    np.testing.assert_allclose(fisher.numpy(), (score**2).mean(0), rtol=1e-4)


def test_fisher_of_own_rollouts_nears_its_closed_form():
    x, learner = states(3000), SoftmaxRegression(WEIGHT)
    ewc = EWC(samples=3000)
    ewc.remember(TASKS["left"], learner, lambda count: episodes(learner, x))
    p = probabilities(x)
    closed = ((p * (1 - p))[:, :, None] * x[:, None, :] ** 2).mean(0)
    np.testing.assert_allclose(ewc.fisher["weight"].numpy(), closed, rtol=0.1)


def test_tokens_that_were_never_executed_do_not_count():
    learner, half = policy(), np.tile([True, True, False, False], (5, 1))
    rows = batch(5, mask=half)
    changed = Batch(rows.observation, np.where(half, rows.sample, 8 - rows.sample), half)
    before, after = fisher_diagonal(learner, rows), fisher_diagonal(learner, changed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    unmasked = fisher_diagonal(learner, batch(5, mask=np.ones((5, 4), bool)))
    assert not torch.allclose(before["head.weight"], unmasked["head.weight"])


def test_descent_ends_where_old_and_new_task_balance():
    """min 1/2 sum H (w - b)^2 + c/2 sum F (w - w*)^2 lies at (H b + c F w*) / (H + c F)."""
    learner, x, c = SoftmaxRegression(WEIGHT), states(64), 3.0
    ewc = EWC(coefficient=c)
    ewc.remember(TASKS["left"], learner, lambda count: episodes(learner, x))
    ewc.before_task(TASKS["up"], learner)
    fisher, old = ewc.fisher["weight"], torch.tensor(WEIGHT)
    curvature = torch.tensor([[1.0, 2.0], [0.5, 1.0], [3.0, 0.2]])
    goal = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.15)
    for _ in range(600):
        optimizer.zero_grad()
        loss = 0.5 * (curvature * (learner.model.weight - goal) ** 2).sum()
        (loss + ewc.penalty(learner)).backward()
        optimizer.step()
    expected = (curvature * goal + c * fisher * old) / (curvature + c * fisher)
    torch.testing.assert_close(learner.model.weight.detach(), expected, atol=1e-4, rtol=0)


def test_the_fisher_of_older_tasks_decays():
    learner, x = SoftmaxRegression(WEIGHT), states(64)
    parts = [x[:32], x[32:]]
    alone = []
    for part in parts:
        ewc = EWC()
        ewc.remember(TASKS["left"], learner, lambda count, part=part: episodes(learner, part))
        alone.append(ewc.fisher["weight"])
    online = EWC(decay=0.25)
    for part in parts:
        online.remember(TASKS["left"], learner, lambda count, part=part: episodes(learner, part))
    torch.testing.assert_close(online.fisher["weight"], 0.25 * alone[0] + alone[1])


def test_a_normalised_fisher_has_mean_one():
    learner, x = policy(), batch(6)
    ewc = EWC(normalise=True, samples=6)
    plain = fisher_diagonal(learner, x)
    one = [
        Trajectory(
            Episode("left", "id", "training", 0, "go left", 1.0, ("e",)),
            x.observation.images,
            x.observation.states,
            x.sample,
            np.zeros((6, 4), np.float32),
            np.where(x.mask.all(1), 2, 1),
            True,
        )
    ]
    ewc.remember(TASKS["left"], learner, lambda count: one)
    assert float(torch.cat([f.flatten() for f in ewc.fisher.values()]).mean()) == pytest.approx(1, rel=1e-5)
    ratios = ewc.fisher["head.weight"] / plain["head.weight"]
    torch.testing.assert_close(ratios, torch.full_like(ratios, ratios.median().item()), rtol=1e-4, atol=0)


def test_what_the_base_can_do_counts_as_a_task_where_its_data_is_there(tmp_path):
    record_all("perennial.testing.toy", ("up", "down"), 4, tmp_path, 1, settings=Settings(image_size=8, image_every=2))
    strategy, learner = EWC(coefficient=3.0, samples=16, pretraining=str(tmp_path)), policy()
    strategy.before_task(TASKS["left"], learner)
    shown = to_batch(load(tmp_path), learner)
    rows = np.linspace(0, len(shown) - 1, 16).astype(int)
    chunk = learner.act(shown.observation.take(rows), 1.0, [stream(0, "ewc", row) for row in range(16)])
    expected = fisher_diagonal(learner, replace(shown.take(rows), sample=chunk.sample))
    for name, value in expected.items():
        torch.testing.assert_close(strategy.fisher[name], value)
    before = {name: parameter.detach().clone() for name, parameter in learner.trainable().items()}
    assert strategy.penalty(learner).item() == 0
    shake(learner, 5)
    moved = sum((expected[n] * (p.detach() - before[n]) ** 2).sum() for n, p in learner.trainable().items())
    assert strategy.penalty(learner).item() == pytest.approx(1.5 * float(moved), rel=1e-5)


def test_the_base_draws_a_few_rows_at_a_time_and_the_same_actions(monkeypatch):
    learner, rows, seen = policy(), batch(13), []

    def act(observation, *rest):
        seen.append(len(observation))
        return ToyPolicy.act(learner, observation, *rest)

    at_once = drawn(learner, rows)
    monkeypatch.setattr(module, "ROWS", 5)
    monkeypatch.setattr(learner, "act", act)
    np.testing.assert_array_equal(drawn(learner, rows).sample, at_once.sample)
    assert seen == [5, 5, 3]
    assert len(np.unique(at_once.sample, axis=0)) > 8


def test_the_folder_of_the_base_is_looked_into_before_a_run(tmp_path):
    with pytest.raises(PerennialError, match=r"no demonstration in .*set --strategies\.ewc\.pretraining"):
        EWC(pretraining=str(tmp_path)).check(())
    (tmp_path / "adapter").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter" / "model.safetensors")
    with pytest.raises(PerennialError, match=r"model\.safetensors cannot be read"):
        EWC(pretraining=str(tmp_path)).check(())
    EWC().check(())


def test_the_first_task_is_free():
    ewc, learner = EWC(), policy()
    ewc.before_task(TASKS["left"], learner)
    assert ewc.penalty(learner) is None


def test_the_spring_is_tied_to_the_start_of_the_present_task():
    learner, ewc = SoftmaxRegression(WEIGHT), EWC(coefficient=2.0)
    for task in ("left", "up", "right"):
        ewc.before_task(TASKS[task], learner)
        with torch.no_grad():
            learner.model.weight.add_(1.0)
        ewc.remember(TASKS[task], learner, lambda count: episodes(learner, states(8)))
    ewc.before_task(TASKS["down"], learner)
    assert float(ewc.penalty(learner).detach()) == 0
    with torch.no_grad():
        learner.model.weight.add_(0.5)
    energy = float(ewc.penalty(learner).detach())
    assert energy == pytest.approx(0.25 * float(ewc.fisher["weight"].sum()), rel=1e-4)


def test_ut2026_squares_partial_sums_of_the_training_gradient():
    learner, ewc, rows = SoftmaxRegression(WEIGHT), EWC(coefficient=2.0, variant="ut2026"), batch(4)
    ewc.before_task(TASKS["left"], learner)
    slopes = torch.tensor([[[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]], [[-2.0, 1.0], [1.0, 1.0], [200.0, 0.0]]])
    for _ in range(3):  # optimiser steps, of two micro-batches each
        for slope in slopes:
            assert ewc.batch_loss(learner.outputs(rows), rows) is None
            (slope * learner.model.weight).sum().backward()
        learner.model.zero_grad(set_to_none=True)
    ewc.remember(TASKS["left"], learner, lambda count: pytest.fail("ut2026 plays no episodes"))
    expected = (slopes[0] ** 2 + (slopes[0] + slopes[1]) ** 2).clamp(max=1e4)
    torch.testing.assert_close(ewc.fisher["weight"], expected)
    assert expected.max() == 1e4

    ewc.before_task(TASKS["up"], learner)
    with torch.no_grad():
        learner.model.weight.add_(0.5)
    energy = float(2.0 * expected.sum() * 0.25)
    assert float(ewc.batch_loss(learner.outputs(rows), rows).detach()) == pytest.approx(energy)
    assert float(ewc.batch_loss(learner.outputs(rows.take(np.arange(1))), rows).detach()) == pytest.approx(energy / 4)
    assert ewc.penalty(learner) is None


def test_ut2026_counts_optimiser_steps_although_some_parameters_get_no_gradient():
    learner, ewc, rows = policy(), EWC(variant="ut2026"), batch(2)
    for _ in range(3):
        for _ in range(2):
            ewc.batch_loss(learner.outputs(rows), rows)
            learner.model.head.weight.sum().backward()
        learner.model.zero_grad(set_to_none=True)
    assert ewc.squares.steps == 3
    ewc.remember(TASKS["left"], learner, lambda count: [])
    torch.testing.assert_close(ewc.fisher["head.weight"], torch.full((36, 32), 5.0))


def test_ut2026_no_longer_listens_after_a_task():
    learner, ewc, rows = SoftmaxRegression(WEIGHT), EWC(variant="ut2026"), batch(2)
    ewc.batch_loss(learner.outputs(rows), rows)
    learner.model.weight.sum().backward()
    ewc.remember(TASKS["left"], learner, lambda count: [])
    learner.model.weight.sum().backward()
    assert ewc.squares.totals == {}
    torch.testing.assert_close(ewc.fisher["weight"], torch.ones(3, 2))


def test_the_coefficient_is_that_of_the_variant_unless_given():
    assert [EWC(variant=variant).strength for variant in ("textbook", "ut2026")] == [0.05, 1e6]
    assert EWC(variant="ut2026", coefficient=7.0).strength == 7.0
    learner, ewc, rows = SoftmaxRegression(WEIGHT), EWC(variant="ut2026"), batch(4)
    ewc.fisher = {name: torch.ones_like(p) for name, p in learner.trainable().items()}
    ewc.anchor = {name: p.detach() + 0.5 for name, p in learner.trainable().items()}
    energy = ewc.batch_loss(learner.outputs(rows), rows)
    size = sum(p.numel() for p in learner.trainable().values())
    assert float(energy.detach()) == pytest.approx(1e6 * 0.25 * size)
    ewc.squares.finish(ceiling=1.0)


@pytest.mark.parametrize("settings", [{"coefficient": -1.0}, {"decay": 1.5}, {"episodes": 0}, {"samples": 0}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(PerennialError, match=next(iter(settings))):
        EWC(**settings)
