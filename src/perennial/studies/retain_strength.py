"""How strong may the anchors of the study `retain` be? Strengths on one task, with a seed that is not used there."""

from perennial.studies.base import Method, Study
from perennial.studies.retain import DATA
from perennial.studies.retain import STUDY as RETAIN

STRENGTHS = {"l2": ("0.01", "0.1", "1"), "kl_anchor": ("0.1", "0.3", "1"), "ewc": ("1", "10", "100", "1000")}


def _at(strategy: str, coefficient: str) -> Method:
    data = {"strategies.ewc.pretraining": DATA} if strategy == "ewc" else {}
    return Method({"strategies": strategy, f"strategies.{strategy}.coefficient": coefficient} | data)


STUDY = Study(
    description="Anchors of several strengths on one new task from narrow demonstrations",
    preset=RETAIN.preset,
    methods={
        "task_ft": Method(),
        **{f"{name}_{value}": _at(name, value) for name, values in STRENGTHS.items() for value in values},
    },
    reference="task_ft",
    seeds=(100,),
    overrides=RETAIN.overrides,
    preparations=tuple(p for p in RETAIN.preparations if p.needed_by == ("*",)),
)
