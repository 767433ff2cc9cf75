"""Does RETAIN hold? Its methods and the baselines that arXiv 2512.08333 lacks, on three Meta-World tasks.

A base of 42 tasks is fine-tuned to one task that it never saw, from 50 demonstrations with objects near the centre of
their range ("narrow"); "id" has wider positions, "ood_val" and "ood_test" also another camera and other light. What
the base could do is measured on ten of its own tasks. The strengths of L2, KL anchor and EWC come from the study
`retain_strength`: of those tried, the strongest that keeps two thirds of what plain fine-tuning reaches in its setting.
"""

from collections.abc import Mapping
from types import MappingProxyType

from perennial.presets.retain_metaworld import GENERALIST as OLD
from perennial.reports.protocol import GENERALIST
from perennial.studies.base import Method, Preparation, Study
from perennial.studies.simple_recipe import BREADTHS

TARGETS = {"door": ("door-open-v3",), "faucet": ("faucet-open-v3",), "plate": ("plate-slide-v3",)}
TAUGHT = tuple(task for tasks in TARGETS.values() for task in tasks)
BASES = {
    10: OLD,
    25: (
        *OLD, "handle-press-side-v3", "window-open-v3", "lever-pull-v3", "reach-v3", "push-v3", "handle-pull-v3",
        "plate-slide-back-v3", "plate-slide-side-v3", "plate-slide-back-side-v3", "dial-turn-v3", "door-unlock-v3",
        "reach-wall-v3", "button-press-wall-v3", "button-press-topdown-wall-v3", "coffee-pull-v3",
    ),
    42: tuple(task for task in BREADTHS[45] if task not in TAUGHT),
}  # fmt: skip
"""Tasks that a base is pretrained on; every base has the same demonstrations and gradient steps for each task."""
STEPS_PER_TASK = 80
DATA, NARROW = "{folder}/demonstrations", "{folder}/narrow"


CO = {"recipe.sft.pretraining": DATA}


def _merged(alpha: str, group: str = "alpha") -> dict[str, str]:
    """Merge everything, or one group of parameters alone."""
    return {"strategies": "retain", "strategies.retain.alpha": "1"} | {f"strategies.retain.{group}": alpha}


SEARCHED = "0,0.2,0.4,0.6,0.8,1"
RETAIN = _merged(SEARCHED)
OWN, OTHER = "methods of the paper", "other anchors"


def _method(section: str, settings: Mapping[str, str] = MappingProxyType({}), *published: float) -> Method:
    """A method that teaches each target; `published` are its percentages in distribution, OOD val, OOD test, old."""
    columns = ("narrow", "ood_val", "ood_test", GENERALIST)
    return Method(settings, section, tuple(TARGETS), dict(zip(columns, published, strict=False)))


def _from(tasks: int, settings: Mapping[str, str] = MappingProxyType({})) -> Method:
    return _method("pretraining", {**settings, "policy.checkpoint": f"{{folder}}/base{tasks}"})


def _base(tasks: int) -> Preparation:
    arguments = ("pretrain", DATA, f"{{folder}}/base{tasks}", "--tasks", *BASES[tasks])
    steps = ("--steps", str(STEPS_PER_TASK * tasks), "--episodes", "0")
    needed_by = ("*",) if tasks == 42 else (f"task_ft_{tasks}_tasks", f"retain_task_ft_{tasks}_tasks")
    return Preparation(f"base{tasks}", (*arguments, *steps), needed_by)


STUDY = Study(
    description="One new task from 50 narrow demonstrations: what is learned, how far it reaches, what is lost",
    preset="retain_metaworld",
    methods={
        "scratch": _method(OWN, {"policy.checkpoint": "{folder}/base0"}, 61.0, 11.8, 5.1, 1.0),
        "lora": _method(
            OWN,
            {"policy.adapter.rank": "16", "recipe.sft.optimizer.learning_rate": "1e-3"},
            *(49.4, 39.0, 20.0, 68.3),
        ),
        "freeze_ft": _method(OWN, {"recipe.sft.learns": "vision,action"}, 71.0, 51.7, 17.7, 42.1),
        "task_ft": _method(OWN, {}, 96.0, 71.0, 25.3, 67.6),
        "co_ft": _method(OWN, CO, 94.4, 73.6, 29.7, 87.2),
        "retain_task_ft": _method(OWN, RETAIN, 89.3, 81.1, 32.4, 79.2),
        "retain_co_ft": _method(OWN, CO | RETAIN, 84.3, 82.9, 36.4, 88.7),
        "retain_task_ft_0.8": _method(OWN, _merged("0.8")),
        "retain_task_ft_0.6": _method(OWN, _merged("0.6")),
        "retain_co_ft_0.8": _method(OWN, CO | _merged("0.8")),
        "retain_language": _method(OWN, _merged(SEARCHED, "language")),
        "retain_language_0.8": _method(OWN, _merged("0.8", "language")),
        "retain_language_0.6": _method(OWN, _merged("0.6", "language")),
        "l2": _method(OTHER, {"strategies": "l2", "strategies.l2.coefficient": "0.1"}),
        "kl_anchor": _method(OTHER, {"strategies": "kl_anchor", "strategies.kl_anchor.coefficient": "0.1"}),
        "ewc": _method(
            OTHER, {"strategies": "ewc", "strategies.ewc.coefficient": "100", "strategies.ewc.pretraining": DATA}
        ),
        "task_ft_10_tasks": _from(10),
        "retain_task_ft_10_tasks": _from(10, RETAIN),
        "task_ft_25_tasks": _from(25),
        "retain_task_ft_25_tasks": _from(25, RETAIN),
        **{
            f"task_ft_{20 * iterations}_steps": _method("overfitting", {"recipe.sft.iterations": str(iterations)})
            for iterations in (1, 3, 30)
        },
    },
    reference="task_ft",
    orders=TARGETS,
    pooled=tuple(TARGETS),
    overrides={"policy.checkpoint": "{folder}/base42", "recipe.sft.demonstrations": NARROW},
    preparations=(
        Preparation("demonstrations", ("demos", DATA, "--count", "40", "--tasks", *BASES[42]), ("*",)),
        Preparation("narrow", ("demos", NARROW, "--variant", "narrow", "--tasks", *TAUGHT), ("*",)),
        Preparation("base0", ("pretrain", DATA, "{folder}/base0", "--steps", "1", "--episodes", "0"), ("scratch",)),
        *map(_base, BASES),
    ),
    source="arXiv 2512.08333, mean of three LIBERO tasks with pi0, read off its charts",
)
