"""The study of the simple recipe (arXiv 2603.11653) on LIBERO object: five tasks in a row, five held out.

It starts from their checkpoint: `hf download Haozhan72/Openvla-oft-SFT-libero-object-traj1`.
"""

from perennial.presets._simple_recipe import simple_recipe
from perennial.suites.libero_study import LiberoStudy

CONFIG = simple_recipe(
    "libero_study",
    LiberoStudy.sequences["object"],
    "hub:Haozhan72/Openvla-oft-SFT-libero-object-traj1",
    iterations=10,
)
