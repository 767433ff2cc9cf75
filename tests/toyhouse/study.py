"""A study of toy runs that begins with demonstrations and a base."""

from perennial.studies.base import Method, Preparation, Study

TOY = "perennial.testing.toy"

STUDY = Study(
    description="Toy methods",
    preset="toyhouse.preset",
    methods={
        "sequential": Method(orders=("given", "reversed"), published={"avg": 81.2, "nbt": 0.3}),
        "joint": Method({"schedule": "joint"}),
        "l2": Method({"strategies": "l2", "strategies.l2.coefficient": "0.5"}, section="anchors"),
    },
    seeds=(0, 1),
    orders={"reversed": ("right", "left")},
    overrides={"policy.checkpoint": "{folder}/base"},
    preparations=(
        Preparation(
            "demos",
            ("demos", "{folder}/demos", "--suite", TOY, "--count", "2", "--image-size", "8", "--workers", "1"),
            ("*",),
        ),
        Preparation(
            "base",
            (
                "pretrain",
                "{folder}/demos",
                "{folder}/base",
                "--suite",
                TOY,
                "--policy",
                TOY,
                "--steps",
                "40",
                "--episodes",
                "0",
            ),
            ("*",),
        ),
        Preparation("never", ("demos", "{folder}/never"), ("nobody",)),
    ),
    source="a paper",
)
