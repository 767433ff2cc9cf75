"""How strong may each strategy be before it keeps the small policy from learning, and how fast may all weights learn?

Three Meta-World tasks, one seed.
"""

from perennial.studies.base import Method, Study


def _strengths(strategy: str, *coefficients: str) -> dict[str, Method]:
    return {
        f"{strategy}_{coefficient}": Method({"strategies": strategy, f"strategies.{strategy}.coefficient": coefficient})
        for coefficient in coefficients
    }


def _full(rate: str) -> Method:
    """Full fine-tuning at another learning rate than LoRA's."""
    return Method({"policy.adapter": "none", "recipe.grpo.optimizer.learning_rate": rate}, section="other recipes")


STUDY = Study(
    description="Strengths of the strategies, on the preset demo",
    preset="demo",
    methods={
        "sequential": Method(),
        **_strengths("ewc", "0.005", "0.05", "1", "10"),
        **_strengths("l2", "0.0001", "0.001", "0.01"),
        **_strengths("kl_anchor", "0.001", "0.01", "0.1"),
        **_strengths("replay", "0.01", "0.1", "1"),
        **_strengths("dark_replay", "0.01", "0.1", "1"),
        **{f"full_{rate}": _full(rate) for rate in ("5e-5", "1e-4", "2e-4", "5e-4")},
    },
    seeds=(100,),
    overrides={"evaluation.decoders": "sampled", "evaluation.film": "0"},
)
