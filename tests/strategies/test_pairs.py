"""Every two strategies beside each other: refused with a reason, or both at work, whichever is listed first."""

import itertools
import re

import pytest
import torch

from perennial import discovery
from perennial.config import validate
from perennial.errors import PerennialError
from perennial.evaluation.gate import Gate
from perennial.strategies.alignment import Alignment
from perennial.strategies.composition import Strategies
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ema import EMA
from perennial.strategies.ewc import EWC
from perennial.strategies.expansion import Expansion
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.l2 import L2
from perennial.strategies.merge import Merge
from perennial.strategies.replay import Replay
from perennial.strategies.retain import Retain
from perennial.strategies.slca import SLCA
from perennial.testing.strategy_conformance import TASKS, Run
from toyhouse.runs import toy_config

MAKE = {
    "ewc": lambda: EWC(coefficient=1.0, episodes=4, samples=4),
    "l2": lambda: L2(coefficient=0.1),
    "kl_anchor": lambda: KLAnchor(coefficient=0.5),
    "replay": lambda: Replay(coefficient=0.5, capacity=4, episodes=16),
    "dark_replay": lambda: DarkReplay(coefficient=0.5, capacity=4, episodes=16),
    "slca": SLCA,
    "alignment": lambda: Alignment(steps=3, learning_rate=0.1, episodes=16),
    "ema": lambda: EMA(decay=0.5),
    "merge": lambda: Merge(alpha=0.7),
    "retain": lambda: Retain(alpha=(0.6,)),
    "retain parallel": lambda: Retain(alpha=(0.6,), chain="parallel"),
    "expansion": Expansion,
}
UNDONE = "as it would replace what '{}' makes of a task; list it before '{}'."
APART = (
    "as '{}' begins every task at the base, far from where the Fisher information was measured; leave one of them out."
)
CHANGED = "as '{}' would change what it aligned; list it after '{}'."
ONE = "as '{}' begins every task at the base's classifier; leave one of them out."
TWICE = "but each of them may be chosen once."
REFUSED = {
    ("merge", "ema"): "'ema' cannot guard tasks beside the other strategies, " + UNDONE.format("merge", "merge"),
    ("retain", "ema"): "'ema' cannot guard tasks beside the other strategies, " + UNDONE.format("retain", "retain"),
    ("retain parallel", "ema"): UNDONE.format("retain", "retain"),
    ("ewc", "expansion"): "'ewc' cannot guard tasks beside the other strategies, " + APART.format("expansion"),
    ("expansion", "ewc"): APART.format("expansion"),
    ("ewc", "retain parallel"): APART.format("retain"),
    ("retain parallel", "ewc"): APART.format("retain"),
    ("alignment", "ema"): CHANGED.format("ema", "ema"),
    ("alignment", "merge"): CHANGED.format("merge", "merge"),
    ("alignment", "retain"): CHANGED.format("retain", "retain"),
    ("alignment", "expansion"): ONE.format("expansion"),
    ("expansion", "alignment"): ONE.format("expansion"),
    ("alignment", "retain parallel"): ONE.format("retain"),
    ("retain parallel", "alignment"): ONE.format("retain"),
    ("retain", "retain parallel"): TWICE,
    ("retain parallel", "retain"): TWICE,
}
DRAW_IN_TURN = {"replay", "dark_replay"}
"""These two draw from one stream, one after the other."""


@pytest.mark.parametrize("pair", itertools.permutations(MAKE, 2), ids=",".join)
def test_a_pair_is_refused_with_its_reason_or_accepted(pair, toy_checkpoint):
    config = toy_config(toy_checkpoint, strategies=tuple(MAKE[name]() for name in pair))
    if pair in REFUSED:
        with pytest.raises(PerennialError, match=re.escape(REFUSED[pair])):
            validate(config)
    else:
        assert validate(config) is config


@pytest.mark.parametrize("other", MAKE)
def test_fresh_adapters_are_refused_beside_what_keeps_weights(other, toy_checkpoint):
    fresh = Merge(variant="ut2026")
    for pair in ((fresh, MAKE[other]()), (MAKE[other](), fresh)):
        config = toy_config(toy_checkpoint, strategies=pair)
        if other in ("replay", "slca"):
            assert validate(config) is config
        else:
            with pytest.raises(PerennialError, match=r"has a fresh adapter|begins every task|would (replace|change)"):
                validate(config)


def test_fresh_adapters_are_refused_beside_a_gate(toy_checkpoint):
    config = toy_config(toy_checkpoint, strategies=(Merge(variant="ut2026"),), gate=Gate(max_forgetting=10))
    with pytest.raises(PerennialError, match="what 'merge' makes, as with ut2026 every task has a fresh adapter"):
        validate(config)


def taught(*names):
    """What acts and learns after a task and a half, guarded by these strategies in this order."""
    run = Run(Strategies(tuple(MAKE[name]() for name in names)), adapter=False)
    run.teach(TASKS[0], updates=2)
    run.teach(TASKS[1], updates=2)
    return run.weights()


@pytest.fixture(scope="module")
def alone():
    return {name: taught(name) for name in MAKE}


def same(left, right):
    return all(torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-5) for name in left)


@pytest.mark.parametrize("pair", itertools.combinations(MAKE, 2), ids=",".join)
def test_in_either_order_both_are_at_work(pair, alone):
    orders = [order for order in (pair, pair[::-1]) if order not in REFUSED]
    found = [taught(*order) for order in orders]
    for weights in found:
        for name in pair:
            assert not same(weights, alone[name]), f"{pair} does no more than {name}"
    assert set(pair) == DRAW_IN_TURN or len(found) < 2 or same(*found), "it matters which is listed first"


def test_every_strategy_has_its_pairs():
    assert {name.partition(" ")[0] for name in MAKE} == set(discovery.names("strategies")) - {"sequential"}
