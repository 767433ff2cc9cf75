"""The study of the simple recipe (arXiv 2603.11653) on LIBERO long: five tasks in a row, five held out.

It starts from their checkpoint: `hf download Haozhan72/Openvla-oft-SFT-libero10-trajall`.
"""

from perennial.presets._simple_recipe import simple_recipe
from perennial.suites.libero_study import LiberoStudy

CONFIG = simple_recipe(
    "libero_study",
    LiberoStudy.sequences["long"],
    "hub:Haozhan72/Openvla-oft-SFT-libero10-trajall",
    iterations=5,
)
