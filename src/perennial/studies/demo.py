"""What does the demo teach and forget, over three seeds?"""

from perennial.studies.base import Method, Study

STUDY = Study(
    description="Three Meta-World tasks in a row with LoRA and GRPO",
    preset="demo",
    methods={"sequential": Method()},
    overrides={"evaluation.film": "0"},
)
