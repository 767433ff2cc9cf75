"""What is left after ten merges? RETAIN along a sequence, of which arXiv 2512.08333 shows two tasks.

Every task is fine-tuned from 50 narrow demonstrations. Each row of the success matrix is that of a shorter sequence, so
one run tells of every length up to ten. In a running chain with coefficient alpha the base keeps (1 - alpha)^N.
"""

from perennial.presets.retain_metaworld import GENERALIST
from perennial.studies.base import Method, Preparation, Study

NEW = (
    "door-open-v3", "faucet-open-v3", "plate-slide-v3", "window-open-v3", "handle-press-side-v3",
    "button-press-wall-v3",
    "plate-slide-back-side-v3", "door-unlock-v3", "button-press-topdown-wall-v3", "plate-slide-side-v3",
)  # fmt: skip
STEPS_PER_TASK = 80
DATA, NARROW = "{folder}/demonstrations", "{folder}/narrow"


def _merged(**settings: str) -> Method:
    return Method({"strategies": "retain"} | {f"strategies.retain.{name}": value for name, value in settings.items()})


STUDY = Study(
    description="Ten new tasks in a row from narrow demonstrations, merged after each",
    preset="retain_metaworld",
    methods={
        "task_ft": Method(),
        "co_ft": Method({"recipe.sft.pretraining": DATA}),
        "retain_0.8": _merged(alpha="0.8"),
        "retain_0.5": _merged(alpha="0.5"),
        "retain_searched": _merged(alpha="0.2,0.4,0.6,0.8,1", judged="taught", episodes="10"),
        "parallel_0.8": _merged(alpha="0.8", chain="parallel"),
    },
    reference="task_ft",
    overrides={
        "tasks.trained": ",".join(NEW),
        "policy.checkpoint": "{folder}/base10",
        "recipe.sft.demonstrations": NARROW,
        "recipe.sft.iterations": "5",
        "evaluation.episodes": "10",
        "evaluation.variants": "id,ood_test",
    },
    preparations=(
        Preparation("demonstrations", ("demos", DATA, "--count", "40", "--tasks", *GENERALIST), ("*",)),
        Preparation("narrow", ("demos", NARROW, "--variant", "narrow", "--tasks", *NEW), ("*",)),
        Preparation(
            "base10",
            ("pretrain", DATA, "{folder}/base10", "--steps", str(STEPS_PER_TASK * len(GENERALIST)), "--episodes", "0"),
            ("*",),
        ),
    ),
    source="arXiv 2512.08333, which shows two tasks on a real robot",
)
