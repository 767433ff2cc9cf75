from pathlib import Path

import pytest

from perennial import discovery
from perennial.demonstrations.record import Settings, record_all
from perennial.strategies.alignment import Alignment
from perennial.strategies.base import Strategy
from perennial.strategies.dark_replay import DarkReplay
from perennial.strategies.ema import EMA
from perennial.strategies.ewc import EWC
from perennial.strategies.expansion import Expansion
from perennial.strategies.kl_anchor import KLAnchor
from perennial.strategies.l2 import L2
from perennial.strategies.merge import Merge
from perennial.strategies.replay import Replay
from perennial.strategies.retain import Retain
from perennial.strategies.sequential import Sequential
from perennial.strategies.slca import SLCA
from perennial.testing.strategy_conformance import CHECKS
from perennial.testing.toy import ToySuite

SMALL = {"capacity": 4, "episodes": 32}
CASES = {
    "sequential": Sequential,
    "ewc": lambda: EWC(coefficient=1.0, decay=0.9, episodes=4, samples=8),
    "ewc normalised": lambda: EWC(coefficient=0.1, normalise=True, episodes=4, samples=8),
    "ewc ut2026": lambda: EWC(coefficient=1.0, variant="ut2026"),
    "ewc pretraining": lambda: EWC(coefficient=1.0, pretraining="shown", episodes=4, samples=8),
    "l2": lambda: L2(coefficient=0.1),
    "l2 base": lambda: L2(coefficient=0.1, anchor="base"),
    "kl_anchor": lambda: KLAnchor(coefficient=0.5),
    "kl_anchor base": lambda: KLAnchor(coefficient=0.5, anchor="base"),
    "replay": lambda: Replay(coefficient=0.5, **SMALL),
    "replay demonstrations": lambda: Replay(coefficient=0.5, demonstrations="shown", **SMALL),
    "replay ut2026": lambda: Replay(coefficient=0.5, variant="ut2026", demonstrations="shown", **SMALL),
    "dark_replay": lambda: DarkReplay(coefficient=0.5, **SMALL),
    "dark_replay ++": lambda: DarkReplay(coefficient=0.5, label_coefficient=0.2, **SMALL),
    "dark_replay ut2026": lambda: DarkReplay(coefficient=0.5, variant="ut2026", **SMALL),
    "dark_replay demonstrations": lambda: DarkReplay(coefficient=0.5, demonstrations="shown", **SMALL),
    "dark_replay ut2026 demonstrations": lambda: DarkReplay(
        coefficient=0.5, variant="ut2026", demonstrations="shown", **SMALL
    ),
    "slca": SLCA,
    "alignment": lambda: Alignment(steps=4, learning_rate=0.1, episodes=8),
    "ema": lambda: EMA(decay=0.7),
    "merge": lambda: Merge(alpha=0.7, language=0.2),
    "merge ut2026": lambda: Merge(alpha=0.7, variant="ut2026"),
    "retain": lambda: Retain(alpha=(0.7,), language=(0.2,)),
    "retain searched": lambda: Retain(alpha=(0.2, 0.9), variant="ood_val", judged="taught", episodes=6),
    "retain parallel": lambda: Retain(alpha=(0.7,), chain="parallel"),
    "expansion": Expansion,
    "expansion last": lambda: Expansion(held_out="last"),
    "expansion nearest": lambda: Expansion(held_out="nearest"),
}


@pytest.fixture(autouse=True, scope="module")
def shown(tmp_path_factory):
    """Demonstrations of every task in the folder `shown`, from which the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        settings = Settings(image_size=8, image_every=2)
        record_all("perennial.testing.toy", tuple(ToySuite.tasks), 2, Path("shown"), 1, settings=settings)
        yield


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES)
def test_conformance(case, check):
    check(CASES[case])


def test_every_strategy_is_checked():
    checked = {type(make()) for make in CASES.values()}
    assert checked == {discovery.find("strategies", name, Strategy) for name in discovery.names("strategies")}
