"""The study of the simple recipe (arXiv 2603.11653) on LIBERO object: five tasks in a row, five held out.

It starts from their checkpoint Openvla-oft-SFT-libero-object-traj1; name its folder by --policy.checkpoint.
"""

from perennial.presets._simple_recipe import simple_recipe
from perennial.suites.libero_study import LiberoStudy

CONFIG = simple_recipe(
    "LIBERO, suite object",
    "libero_study",
    LiberoStudy.sequences["object"],
    "Openvla-oft-SFT-libero-object-traj1",
    iterations=10,
)
