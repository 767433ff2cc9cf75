"""The study of the simple recipe (arXiv 2603.11653) on Meta-World: five tasks in a row, five held out."""

from perennial.config import Config, Evaluation, Tasks
from perennial.suites.metaworld import MetaWorld

SEQUENCE = MetaWorld.sequences["simple_recipe"]

CONFIG = Config(
    tasks=Tasks(SEQUENCE.trained, SEQUENCE.held_out),
    evaluation=Evaluation(film=0),
)
