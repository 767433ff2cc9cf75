"""Runs that are killed by SIGKILL at named points and then resumed end with the bytes of an uninterrupted run."""

import multiprocessing
import signal

import numpy as np
import pytest

from toyhouse.runs import command, essence

# A fresh process for every attempt, forked from one that has imported everything and done nothing.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["__main__", "toyhouse.runs", "perennial.testing.toy", "peft"])

ADAPTER = (
    "--strategies=ewc,replay",
    "--strategies.ewc.episodes=4",
    "--strategies.replay.episodes=8",
    "--strategies.replay.capacity=16",
)
GATED = (
    "--gate.max_forgetting=1",
    "--gate.pairs=96",
    "--strategies=toyhouse.harmful",
    "--strategies.harmful.strength=30",
)
ALL_WEIGHTS = ("--policy.adapter=none", "--recipe=grpo,grpo", "--strategies=l2")
CRITIC = (
    "--recipe=ppo",
    "--recipe.ppo.iterations=2",
    "--recipe.ppo.rollouts=32",
    "--recipe.ppo.value_rate=3",
    "--strategies=slca",
)
ONE_WORKER = ("--workers.backend=process", "--workers.count=1")
TWO_WORKERS = ("--workers.backend=process", "--workers.count=2")


def attempt(arguments, kill_at=""):
    """Run a command in a process of its own; the exit code."""
    environment = {"PERENNIAL_KILL_AT": kill_at} if kill_at else {}
    process = processes.Process(target=command, args=([str(argument) for argument in arguments], environment))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def start(toy_checkpoint):
    """The command that starts a run, without the choices that differ and without its folder."""
    return ["run", "toyhouse.preset", f"--policy.checkpoint={toy_checkpoint}", "--evaluation.decoders=sampled"]


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """What a run with some choices gives when nothing happens to it, computed once."""
    known = {}

    def run(choices):
        if choices not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert attempt([*start, *choices, "--run-dir", folder]) == 0
            known[choices] = essence(folder)
            assert sum(name.startswith("evaluations") for name in known[choices]) == 9
            assert any(name.startswith("tasks/02-right/") for name in known[choices])
        return known[choices]

    return run


def survive(start, folder, kills):
    """Start a run, kill it at each of the points in turn, and let the last resumption finish it; the exit codes."""
    codes = []
    for kill_at in kills:
        begun = (folder / "run.json").exists()
        codes.append(attempt(["resume", folder] if begun else [*start, "--run-dir", folder], kill_at))
    assert attempt(["resume", folder]) == 0
    return codes


# Points lie ever later in a run: in the base row, the first task, its end or second stage, its row, the second task.
IN_THIS_PROCESS = ("evaluate:2", "update:2", "save:1", "rename:3", "evaluate:2", "save:2")
# In the first gate; after it, in the commit that would have kept it; past it; in the second gate, at a smaller scale.
IN_THE_GATE = ("gate:2", "save:2", "update:1", "gate:4")
IN_A_WORKER = ("rollout:5", "update:1", "rename:3")


@pytest.mark.parametrize(
    ("choices", "kills"),
    [
        (ADAPTER, IN_THIS_PROCESS),
        (ALL_WEIGHTS, IN_THIS_PROCESS),
        (GATED, IN_THE_GATE),
        (CRITIC, IN_THIS_PROCESS),
        ((*ADAPTER, *ONE_WORKER), IN_A_WORKER),
    ],
    ids=[
        "adapter, EWC and replay",
        "all weights, two stages and L2",
        "a gate",
        "a value head and SLCA",
        "a worker process",
    ],
)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(start, uninterrupted, tmp_path, choices, kills):
    codes = survive([*start, *choices], tmp_path / "run", kills)
    assert codes == [-signal.SIGKILL] * len(kills)
    # One worker plays the same batches as this process does, so it must give the same bytes.
    whole = uninterrupted(tuple(choice for choice in choices if choice not in ONE_WORKER))
    assert essence(tmp_path / "run") == whole


MOST = {"rollout": 90, "update": 4, "evaluate": 9, "save": 8, "rename": 8}
"""How often an uninterrupted run passes each point at least; "rollout" depends on which messages come together."""


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_random_ends_with_the_same_bytes(start, uninterrupted, tmp_path, seed):
    rng = np.random.default_rng(seed)
    points = rng.choice(sorted(MOST), size=rng.integers(1, 4))
    kills = [f"{point}:{rng.integers(1, MOST[point] + 1)}" for point in points]
    choices = ADAPTER + TWO_WORKERS
    codes = survive([*start, *choices], tmp_path / "run", kills)
    assert codes[0] == -signal.SIGKILL
    assert set(codes) <= {-signal.SIGKILL, 0}  # what is left after the first kill may not reach the next point
    assert essence(tmp_path / "run") == uninterrupted(choices)
