"""The study of the simple recipe (arXiv 2603.11653) on RoboCasa: five tasks in a row, five held out.

Which tasks the paper teaches, how long, and from which checkpoint is not published: the tasks are the suite's choice,
the length is that of LIBERO spatial. Name the folder of an OpenVLA-OFT policy for RoboCasa by --policy.checkpoint. Not
run by us.
"""

from perennial.presets._simple_recipe import simple_recipe
from perennial.suites.robocasa import RoboCasa

CONFIG = simple_recipe("robocasa", RoboCasa.sequences["simple_recipe"], "Openvla-oft-SFT-robocasa", iterations=10)
