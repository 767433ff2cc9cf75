import multiprocessing
import os
import signal
import struct
import time
import types
from contextlib import closing
from multiprocessing.connection import wait

import numpy as np
import pytest
import torch

from perennial.errors import LearningError, PerennialError
from perennial.policies.base import Batch, Observation
from perennial.policies.lora import LoRA, add_adapter
from perennial.rollout import workers as module
from perennial.rollout.trajectory import Episode
from perennial.rollout.workers import Cast, InlineWorkers, ProcessWorkers, WorkerConfig, start_beside
from perennial.testing.toy import ToyPolicy
from toyhouse.unreliable import BAD_STATE

TOY = "perennial.testing.toy"
ENOUGH = 8
TIMEOUT = 120.0


def requests(task="left", count=ENOUGH):
    return [Episode(task, "id", "training", i, "go left", 1.0, ("test", i), i) for i in range(count)]


def bad(task):
    """The one episode that misbehaves in the unreliable worlds; only the first worker plays it."""
    return requests(task)[BAD_STATE : BAD_STATE + 1]


def inline(checkpoint, slots=4, suite=TOY):
    cast = Cast(suite, TOY, checkpoint, seed=7)
    return InlineWorkers(WorkerConfig("inline", slots=slots), cast, ToyPolicy().acting_weights())


@pytest.fixture(scope="module")
def unreliable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unreliable")
    os.environ["UNRELIABLE"] = str(folder)
    yield folder
    del os.environ["UNRELIABLE"]


@pytest.fixture(scope="module")
def pair(toy_checkpoint, unreliable):
    """Two worker processes in the unreliable worlds."""
    config = WorkerConfig("process", count=2, slots=4, timeout=TIMEOUT)
    cast = Cast("toyhouse.unreliable", TOY, toy_checkpoint, seed=7)
    with closing(ProcessWorkers(config, cast, ToyPolicy().acting_weights())) as workers:
        yield workers


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.success == other.success
        for name in ("images", "states", "samples", "log_probs", "steps"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_processes_and_this_process_play_the_same(pair, toy_checkpoint):
    """Bit for bit: each worker's share is its own batch, so this process plays the shares one after the other."""
    ended = []
    got = pair.collect(requests("works"), lambda steps, success: ended.append((steps, success)))
    assert [t.episode for t in got] == requests("works")
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        assert_same(got[::2], alone.collect(requests("works")[::2]))
        assert_same(got[1::2], alone.collect(requests("works")[1::2]))
    assert sorted(ended) == sorted((int(t.steps.sum()), t.success) for t in got)


def test_ctrl_c_is_not_for_workers_even_while_they_start(toy_checkpoint):
    cast = Cast(TOY, TOY, toy_checkpoint, seed=7)
    former = signal.getsignal(signal.SIGINT)  # ignored already where the tests run in the background of a shell
    patient = WorkerConfig("process", count=1, timeout=1e10)  # longer than the system waits at one time
    with closing(ProcessWorkers(patient, cast, ToyPolicy().acting_weights())) as workers:
        process = workers._workers[0].process
        os.kill(process.pid, signal.SIGINT)
        assert len(workers.collect(requests())) == ENOUGH
        assert workers._workers[0].process is process
        assert signal.getsignal(signal.SIGINT) is former


def test_fewer_episodes_than_workers(pair, toy_checkpoint):
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        assert_same(pair.collect(requests("works", 1)), alone.collect(requests("works", 1)))
    assert pair.collect([]) == []


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(pair, unreliable, toy_checkpoint):
    got = pair.collect(requests("dies-once"))
    assert (unreliable / "dies-once").read_text() == "x"
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        assert_same(got[::2], alone.collect(requests("dies-once")[::2]))
        assert_same(got[1::2], alone.collect(requests("dies-once")[1::2]))


def test_a_worker_killed_between_two_collects_is_replaced(pair, toy_checkpoint):
    victim = pair._workers[1].process
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    got = pair.collect(requests("works"))
    assert [t.episode for t in got] == requests("works")


def test_new_weights_act_at_once_in_every_worker(pair, toy_checkpoint):
    other = ToyPolicy(seed=3)
    before = pair.collect(requests("works"))
    try:
        pair.broadcast(other.acting_weights())
        after = pair.collect(requests("works"))
    finally:
        pair.broadcast(ToyPolicy().acting_weights())
    assert all(not np.array_equal(a.log_probs[:1], b.log_probs[:1]) for a, b in zip(after, before, strict=True))
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        alone.broadcast(other.acting_weights())
        assert_same(after[::2], alone.collect(requests("works")[::2]))
        alone.broadcast(ToyPolicy().acting_weights())
        assert_same(before[::2], alone.collect(requests("works")[::2]))


def test_the_learner_plays_with_its_adapter_and_without_a_copy(toy_checkpoint):
    policy, cast = ToyPolicy.load(toy_checkpoint), Cast(TOY, TOY, toy_checkpoint, seed=7)
    add_adapter(policy, LoRA(rank=2), 0)
    with closing(start_beside(WorkerConfig("shared", slots=4), cast, policy)) as workers:
        workers.follow(policy)
        base = workers.collect(requests())
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B." in name:
                    parameter.add_(1.0)
        taught = workers.collect(requests())  # nothing was handed over
        assert any(not np.array_equal(one.samples, two.samples) for one, two in zip(base, taught, strict=True))
        for played in taught:
            decisions = len(played.images)
            observation = Observation(played.images, (played.episode.instruction,) * decisions, played.states)
            batch = Batch(observation, played.samples, np.ones(played.samples.shape, bool))
            np.testing.assert_allclose(policy.log_prob(batch).detach(), played.log_probs, atol=1e-5)
        with pytest.raises(PerennialError, match=r"cannot act; set --workers\.backend inline"):
            workers.broadcast(policy.acting_weights())


def test_an_error_for_the_user_arrives_as_it_is(pair):
    with pytest.raises(PerennialError, match=r"^The world is closed; try another one\.$"):
        pair.collect(bad("refuses-always"))
    assert [t.episode.task for t in pair.collect(requests("works"))] == ["works"] * ENOUGH


def test_what_a_simulator_says_when_it_breaks_is_told(pair, unreliable):
    with pytest.raises(LearningError, match=r"failed \(FileNotFoundError: no mesh called kettle\.obj\) 3 times"):
        pair.collect(bad("breaks-always"))
    assert (unreliable / "breaks-always").read_text() == "xxx"


def test_a_world_that_kills_every_time_stops_the_run(pair, unreliable):
    with pytest.raises(LearningError, match=r"died \(exit code -9\) 3 times .*'dies-always'") as raised:
        pair.collect(bad("dies-always"))
    assert raised.value.exit_code == 3
    assert (unreliable / "dies-always").read_text() == "xxx"


def test_a_worker_killed_in_the_middle_of_a_message_is_replaced(pair, toy_checkpoint):
    """What it had sent when it died is the head of a message, as its length says, and the beginning of the rest."""
    worker = pair._workers[0]
    requested, replaced = requests("works")[::2], worker.process
    worker.play(range(0, ENOUGH, 2), requested)
    own, other = multiprocessing.Pipe()
    os.write(other.fileno(), struct.pack("!i", 1000) + b"not a thousand bytes")
    other.close()
    worker.connection.close()
    worker.connection = own
    assert not pair._receive(worker, {}, lambda steps, success: None)
    assert worker.process is not replaced
    got = {}
    while not pair._receive(worker, got, lambda steps, success: None):
        pass
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        assert_same([got[i] for i in range(0, ENOUGH, 2)], alone.collect(requested))


def test_a_sign_of_life_is_sent_once_a_second_and_heard(pair):
    own, other = multiprocessing.Pipe()
    worker, clock = types.SimpleNamespace(connection=own, heard=0.0), [100.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: clock[0])
        alive = module._beat(other)
        for now in (100.5, 101.0, 101.5, 101.9, 102.1):
            clock[0] = now
            alive()
        for _ in range(2):
            assert not pair._receive(worker, {}, lambda steps, success: None)
    assert worker.heard == 102.1
    assert not own.poll()


def test_a_hung_worker_is_replaced(pair, unreliable, toy_checkpoint, monkeypatch):
    """Time jumps as soon as the world sleeps, so that the test neither waits nor races a starting worker."""
    hung, timeouts, jumps, now = [], [], [0.0], time.monotonic

    def wait_until_it_hangs(connections, timeout):
        timeouts.append(timeout)
        while not (ready := wait(connections, 0.02)):
            if not hung and (unreliable / "hangs-once").exists():
                hung.append(pair._workers[BAD_STATE % 2].process)
                jumps[0] = TIMEOUT + 1
                break
        return ready

    monkeypatch.setattr(module, "wait", wait_until_it_hangs)
    monkeypatch.setattr(module.time, "monotonic", lambda: now() + jumps[0])
    got = pair.collect(requests("hangs-once"))
    assert 0 < max(timeouts) <= TIMEOUT
    assert hung[0].exitcode == -signal.SIGKILL
    assert (unreliable / "hangs-once").read_text() == "x"
    with closing(inline(toy_checkpoint, suite="toyhouse.unreliable")) as alone:
        assert_same(got[::2], alone.collect(requests("hangs-once")[::2]))
        assert_same(got[1::2], alone.collect(requests("hangs-once")[1::2]))


def test_workers_end_with_their_owner(toy_checkpoint):
    cast = Cast(TOY, TOY, toy_checkpoint, seed=7)
    workers = ProcessWorkers(WorkerConfig(count=1), cast, ToyPolicy().acting_weights())
    process = workers._workers[0].process
    workers.close()
    assert process.exitcode == -signal.SIGKILL
