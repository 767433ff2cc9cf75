"""Does RETAIN hold? Its methods and the baselines that arXiv 2512.08333 lacks, on three Meta-World tasks.

A base of 42 tasks is fine-tuned to one task that it never saw, from 50 demonstrations with objects near the centre of
their range ("narrow"); "id" has wider positions, "ood_val" and "ood_test" also another camera and other light. What
the base could do is measured on ten of its own tasks.
"""

from perennial.presets.retain_metaworld import GENERALIST
from perennial.studies.base import Method, Preparation, Study
from perennial.studies.simple_recipe import BREADTHS

TARGETS = {"door": ("door-open-v3",), "faucet": ("faucet-open-v3",), "plate": ("plate-slide-v3",)}
TAUGHT = tuple(task for tasks in TARGETS.values() for task in tasks)
BASES = {
    10: GENERALIST,
    25: (
        *GENERALIST, "handle-press-side-v3", "window-open-v3", "lever-pull-v3", "reach-v3", "push-v3", "handle-pull-v3",
        "plate-slide-back-v3", "plate-slide-side-v3", "plate-slide-back-side-v3", "dial-turn-v3", "door-unlock-v3",
        "reach-wall-v3", "button-press-wall-v3", "button-press-topdown-wall-v3", "coffee-pull-v3",
    ),
    42: tuple(task for task in BREADTHS[45] if task not in TAUGHT),
}  # fmt: skip
"""Tasks that a base is pretrained on; every base has the same demonstrations and gradient steps for each task."""
STEPS_PER_TASK = 80
DATA, NARROW = "{folder}/demonstrations", "{folder}/narrow"
ALPHAS = "0,0.2,0.4,0.6,0.8,1"


def _base(tasks: int) -> Preparation:
    arguments = ("pretrain", DATA, f"{{folder}}/base{tasks}", "--tasks", *BASES[tasks])
    steps = ("--steps", str(STEPS_PER_TASK * tasks), "--episodes", "0")
    needed_by = ("*",) if tasks == 42 else (f"task_ft_base{tasks}", f"retain_co_ft_base{tasks}")
    return Preparation(f"base{tasks}", (*arguments, *steps), needed_by)


def _method(section: str, settings: dict[str, str] | None = None, **published: float) -> Method:
    return Method(settings or {}, section=section, orders=tuple(TARGETS), published=published)


CO = {"recipe.sft.pretraining": DATA}
RETAIN = {"strategies": "retain", "strategies.retain.alpha": ALPHAS}
LANGUAGE = {
    "strategies": "retain", "strategies.retain.alpha": "1", "strategies.retain.language": ALPHAS
}  # fmt: skip

STUDY = Study(
    description="One new task from 50 narrow demonstrations: what is learned, how far it reaches, what is lost",
    preset="retain_metaworld",
    methods={
        "scratch": _method("RETAIN's methods", {"policy.checkpoint": "{folder}/base0"}),
        "lora": _method(
            "RETAIN's methods", {"policy.adapter.rank": "16", "recipe.sft.optimizer.learning_rate": "1e-3"}
        ),
        "freeze_ft": _method("RETAIN's methods", {"recipe.sft.learns": "vision,action"}),
        "task_ft": _method("RETAIN's methods"),
        "co_ft": _method("RETAIN's methods", CO),
        "retain_task_ft": _method("RETAIN's methods", RETAIN),
        "retain_co_ft": _method("RETAIN's methods", CO | RETAIN),
        "retain_language": _method("RETAIN's methods", LANGUAGE),
        "l2": _method("other anchors", {"strategies": "l2", "strategies.l2.coefficient": "0.01"}),
        "kl_anchor": _method("other anchors", {"strategies": "kl_anchor", "strategies.kl_anchor.coefficient": "0.1"}),
        "ewc": _method(
            "other anchors",
            {"strategies": "ewc", "strategies.ewc.coefficient": "1", "strategies.ewc.pretraining": DATA},
        ),
        **{
            f"{name}_base{tasks}": _method("pretraining", settings | {"policy.checkpoint": f"{{folder}}/base{tasks}"})
            for tasks in (10, 25)
            for name, settings in (("task_ft", {}), ("retain_co_ft", CO | RETAIN))
        },
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
    source="arXiv 2512.08333, LIBERO with pi0",
)
