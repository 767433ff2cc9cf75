"""Does the simple recipe hold? Strategies and ablations of arXiv 2603.11653 on five Meta-World tasks in a row.

The coefficients of EWC, L2, KL anchor, ER and DER and the learning rate of `full` were chosen by the study
`strategy_strength` on three of the tasks with a seed that is not used here (but on the same evaluation states): of a
strategy the strongest one tried that keeps two thirds of what sequential fine-tuning gains, of full fine-tuning the
rate that gains most. `kl_anchor_0.01` and `dark_replay_0.1` are what an earlier state of that search had chosen; they
and `full_2e-4` stay as other strengths. Rows called `..._ut2026` have the forms, coefficients and memories of the
paper's code, and the other strategies their published settings; `full_untuned` has the learning rate of LoRA, as in
the paper.
"""

from collections.abc import Mapping

from perennial.presets.simple_recipe_metaworld import SEQUENCE
from perennial.studies.base import Method, Preparation, Study
from perennial.suites.metaworld import MetaWorld

TAUGHT, HELD_OUT = SEQUENCE.trained, SEQUENCE.held_out
HARDEST = ("bin-picking-v3", "box-close-v3", "disassemble-v3", "pick-out-of-hole-v3", "stick-pull-v3")
BREADTHS = {
    10: (*TAUGHT, *HELD_OUT),
    25: (
        *TAUGHT, *HELD_OUT, "handle-press-v3", "drawer-close-v3", "lever-pull-v3", "reach-v3", "push-v3",
        "window-close-v3", "door-close-v3", "handle-pull-v3", "plate-slide-back-v3", "dial-turn-v3", "door-unlock-v3",
        "handle-press-side-v3", "plate-slide-side-v3", "plate-slide-back-side-v3", "reach-wall-v3",
    ),
    45: tuple(task for task in MetaWorld.tasks if task not in HARDEST),
}  # fmt: skip
"""Tasks that a base is pretrained on; every breadth has the same demonstrations and gradient steps for each task."""
WIDTHS = {"narrow10": "0.5", "wide10": "2"}
"""Width of the network, where it is not that of `breadth10`; the base is pretrained on the same ten tasks."""
STEPS_PER_TASK = 80


def _base(name: str, needed_by: str, tasks: int, *options: str) -> Preparation:
    arguments = ("pretrain", "{folder}/demonstrations", f"{{folder}}/{name}", "--tasks", *BREADTHS[tasks])
    steps = ("--steps", str(STEPS_PER_TASK * tasks), "--episodes", "0")
    return Preparation(name, (*arguments, *steps, *options), (needed_by,))


def _with_demonstrations(strategy: str, published: Mapping[str, float] | None = None) -> Method:
    """Replay as in the code of the paper: one demonstration of each of the ten tasks, from the first task on."""
    option = f"strategies.{strategy}"
    overrides = {f"{option}.variant": "ut2026", f"{option}.demonstrations": "{folder}/one_of_each"}
    return Method({"strategies": strategy, **overrides}, published=published or {})


STUDY = Study(
    description="Sequential fine-tuning with LoRA and GRPO against the strategies made against forgetting",
    preset="simple_recipe_metaworld",
    methods={
        "sequential": Method(
            orders=("given", "reversed", "interleaved"),
            published={"avg": 81.2, "gain": 24.3, "nbt": 0.3, "fwt": 3.9, "zs": 57.1, "zs_gain": 5.6},
        ),
        "multitask": Method({"schedule": "joint"}, published={"avg": 85.8, "gain": 28.9, "zs": 51.2, "zs_gain": -0.3}),
        "expansion": Method({"strategies": "expansion"}, published={"nbt": 0.0, "fwt": 0.0}),
        "ewc": Method({"strategies": "ewc", "strategies.ewc.coefficient": "0.05"}),
        "ewc_ut2026": Method(
            {"strategies": "ewc", "strategies.ewc.variant": "ut2026"},
            published={"avg": 66.1},
            published_form="the Fisher is taken from the last epoch of a task only",
        ),
        "l2": Method({"strategies": "l2", "strategies.l2.coefficient": "0.001"}),
        "kl_anchor": Method({"strategies": "kl_anchor", "strategies.kl_anchor.coefficient": "0.001"}),
        "kl_anchor_0.01": Method({"strategies": "kl_anchor", "strategies.kl_anchor.coefficient": "0.01"}),
        "replay": Method({"strategies": "replay", "strategies.replay.coefficient": "0.1"}),
        "replay_ut2026": _with_demonstrations("replay"),
        "dark_replay": Method({"strategies": "dark_replay", "strategies.dark_replay.coefficient": "1"}),
        "dark_replay_0.1": Method({"strategies": "dark_replay", "strategies.dark_replay.coefficient": "0.1"}),
        "dark_replay_ut2026": _with_demonstrations("dark_replay", {"avg": 73.4}),
        "slca": Method({"strategies": "slca"}, published={"avg": 69.9}),
        "slca_alignment": Method({"strategies": "slca,alignment"}),
        "merge": Method({"strategies": "merge", "strategies.merge.alpha": "0.5"}),
        "merge_ut2026": Method({"strategies": "merge", "strategies.merge.variant": "ut2026"}, published={"avg": 66.0}),
        "sft": Method(
            {"recipe": "sft", "recipe.sft.demonstrations": "{folder}/demonstrations"},
            section="other recipes",
            published={"avg": 29.9, "gain": -27.0, "nbt": 78.7, "fwt": -53.8, "zs": 1.1, "zs_gain": -50.4},
        ),
        "ppo": Method({"recipe": "ppo"}, section="other recipes"),
        "full": Method(
            {"policy.adapter": "none", "recipe.grpo.optimizer.learning_rate": "1e-4"}, section="other recipes"
        ),
        "full_2e-4": Method(
            {"policy.adapter": "none", "recipe.grpo.optimizer.learning_rate": "2e-4"}, section="other recipes"
        ),
        "full_untuned": Method(
            {"policy.adapter": "none"},
            section="other recipes",
            published={"avg": 7.3, "nbt": 40.9, "zs": 0.0},
        ),
        "rank4": Method({"policy.adapter.rank": "4", "policy.adapter.alpha": "4"}, section="other recipes"),
        "rank64": Method({"policy.adapter.rank": "64", "policy.adapter.alpha": "64"}, section="other recipes"),
        "from_scratch": Method({"policy.checkpoint": "{folder}/base0"}, section="pretraining"),
        **{
            f"breadth{tasks}": Method({"policy.checkpoint": f"{{folder}}/base{tasks}"}, section="pretraining")
            for tasks in BREADTHS
        },
        **{name: Method({"policy.checkpoint": f"{{folder}}/base_{name}"}, section="pretraining") for name in WIDTHS},
    },
    orders={
        "reversed": TAUGHT[::-1],
        "interleaved": tuple(TAUGHT[i] for i in (2, 4, 1, 3, 0)),
    },
    preparations=(
        Preparation(
            "demonstrations",
            ("demos", "{folder}/demonstrations", "--count", "40", "--tasks", *BREADTHS[45]),
            ("sft", "from_scratch", *(f"breadth{tasks}" for tasks in BREADTHS), *WIDTHS),
        ),
        Preparation(
            "one_of_each",
            ("demos", "{folder}/one_of_each", "--count", "1", "--tasks", *BREADTHS[10]),
            ("replay_ut2026", "dark_replay_ut2026"),
        ),
        Preparation(
            "base0",
            ("pretrain", "{folder}/demonstrations", "{folder}/base0", "--steps", "1", "--episodes", "0"),
            ("from_scratch",),
        ),
        *(_base(f"base{tasks}", f"breadth{tasks}", tasks) for tasks in BREADTHS),
        *(_base(f"base_{name}", name, 10, "--width", width) for name, width in WIDTHS.items()),
    ),
    source="arXiv 2603.11653, tables 1 and 3: OpenVLA-OFT (7B) on LIBERO-spatial, 3 seeds",
)
