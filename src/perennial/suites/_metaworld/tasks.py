"""The fifty tasks of Meta-World (Yu et al. 2019, arXiv 1910.10897; version 3) in words.

Paraphrases of one task share the words of its object, so that a word-level tokenizer can generalise to the evaluation
paraphrase; no sentence stands for two tasks.
"""

from __future__ import annotations

from perennial.suites.base import Sequence, Task

# name: (first training paraphrase, second training paraphrase, evaluation paraphrase)
_SENTENCES = {
    "assembly-v3": (
        "pick up the round nut and put it on the peg",
        "place the nut over the peg",
        "put the round nut over the peg",
    ),
    "basketball-v3": (
        "put the basketball in the hoop",
        "drop the basketball into the hoop",
        "place the basketball into the hoop",
    ),
    "bin-picking-v3": (
        "move the block from one bin to the other",
        "pick up the block and drop it into the other bin",
        "put the block into the other bin",
    ),
    "box-close-v3": ("close the box with its lid", "put the lid on the box", "place the lid on the box"),
    "button-press-topdown-v3": (
        "press the button from the top",
        "push the button down",
        "press down the button from the top",
    ),
    "button-press-topdown-wall-v3": (
        "press the button behind the wall from the top",
        "push down the button behind the wall",
        "press down the button behind the wall",
    ),
    "button-press-v3": ("press the button forward", "push the button in", "press in the button"),
    "button-press-wall-v3": (
        "press the button behind the wall forward",
        "push in the button behind the wall",
        "press in the button behind the wall",
    ),
    "coffee-button-v3": (
        "press the button on the coffee machine",
        "push the button of the coffee machine",
        "press the coffee machine button",
    ),
    "coffee-pull-v3": (
        "pull the mug away from the coffee machine",
        "move the mug back from the coffee machine",
        "pull back the mug from the coffee machine",
    ),
    "coffee-push-v3": (
        "push the mug under the coffee machine",
        "move the mug to the coffee machine",
        "push the mug to the coffee machine",
    ),
    "dial-turn-v3": ("turn the dial", "rotate the dial", "turn the dial around"),
    "disassemble-v3": (
        "take the round nut off the peg",
        "lift the nut up from the peg",
        "lift the round nut off the peg",
    ),
    "door-close-v3": ("close the door", "push the door shut", "shut the door"),
    "door-lock-v3": ("lock the door", "turn the lock of the door shut", "turn the lock to lock the door"),
    "door-open-v3": ("open the door", "pull the door open", "pull open the door"),
    "door-unlock-v3": ("unlock the door", "turn the lock of the door open", "turn the lock to unlock the door"),
    "hand-insert-v3": (
        "insert the hand into the hole",
        "put the gripper in the hole",
        "insert the gripper into the hole",
    ),
    "drawer-close-v3": ("close the drawer", "push the drawer shut", "shut the drawer"),
    "drawer-open-v3": ("open the drawer", "pull the drawer open", "pull open the drawer"),
    "faucet-open-v3": ("open the faucet", "turn the faucet on", "turn on the faucet"),
    "faucet-close-v3": ("close the faucet", "turn the faucet off", "turn off the faucet"),
    "hammer-v3": ("hammer the nail in", "hit the nail with the hammer", "use the hammer to hit the nail"),
    "handle-press-side-v3": (
        "press the handle down from the side",
        "push down the side handle",
        "press the side handle down",
    ),
    "handle-press-v3": ("press the handle down", "push down the handle", "press down the handle"),
    "handle-pull-side-v3": ("pull the handle up from the side", "lift up the side handle", "pull up the side handle"),
    "handle-pull-v3": ("pull the handle up", "lift up the handle", "pull up the handle"),
    "lever-pull-v3": ("pull the lever up", "lift the lever", "pull up the lever"),
    "pick-place-wall-v3": (
        "pick up the puck and place it behind the wall",
        "lift the puck over the wall to the goal",
        "pick up the puck and move it over the wall",
    ),
    "pick-out-of-hole-v3": (
        "pick the puck out of the hole",
        "lift the puck out of the hole to the goal",
        "take the puck out of the hole",
    ),
    "pick-place-v3": (
        "pick up the puck and place it at the goal",
        "lift the puck to the goal",
        "pick up the puck and move it to the goal",
    ),
    "plate-slide-v3": (
        "slide the plate into the cabinet",
        "push the plate forward into the cabinet",
        "push the plate into the cabinet",
    ),
    "plate-slide-side-v3": (
        "slide the plate sideways into the cabinet",
        "push the plate to the side into the cabinet",
        "move the plate sideways into the cabinet",
    ),
    "plate-slide-back-v3": (
        "slide the plate out of the cabinet",
        "pull the plate back out of the cabinet",
        "move the plate back out of the cabinet",
    ),
    "plate-slide-back-side-v3": (
        "slide the plate sideways out of the cabinet",
        "pull the plate to the side out of the cabinet",
        "move the plate sideways out of the cabinet",
    ),
    "peg-insert-side-v3": (
        "insert the peg into the hole from the side",
        "push the peg into the side of the box",
        "put the peg into the hole from the side",
    ),
    "peg-unplug-side-v3": (
        "unplug the peg from the side",
        "pull the peg out of the side of the box",
        "pull out the peg from the side",
    ),
    "soccer-v3": (
        "kick the soccer ball into the goal",
        "push the soccer ball into the goal",
        "move the soccer ball into the goal",
    ),
    "stick-push-v3": (
        "push the thermos with the stick",
        "use the stick to push the thermos",
        "move the thermos forward with the stick",
    ),
    "stick-pull-v3": (
        "pull the thermos with the stick",
        "use the stick to pull the thermos",
        "move the thermos back with the stick",
    ),
    "push-v3": ("push the puck to the goal", "slide the puck to the goal", "push the puck forward to the goal"),
    "push-wall-v3": (
        "push the puck around the wall to the goal",
        "slide the puck around the wall",
        "push the puck around the wall",
    ),
    "push-back-v3": (
        "pull the puck back to the goal",
        "slide the puck back to the goal",
        "move the puck back to the goal",
    ),
    "reach-v3": ("reach the goal", "move the hand to the goal", "reach the goal with the hand"),
    "reach-wall-v3": (
        "reach the goal behind the wall",
        "move the hand to the goal behind the wall",
        "reach the goal behind the wall with the hand",
    ),
    "shelf-place-v3": (
        "place the puck on the shelf",
        "pick up the puck and put it on the shelf",
        "put the puck on the shelf",
    ),
    "sweep-into-v3": ("sweep the puck into the hole", "push the puck into the hole", "move the puck into the hole"),
    "sweep-v3": ("sweep the puck off the table", "push the puck off the table", "move the puck off the table"),
    "window-open-v3": ("open the window", "slide the window open", "slide open the window"),
    "window-close-v3": ("close the window", "slide the window shut", "shut the window"),
}

_HORIZON = 120
_LONGER = {
    "bin-picking-v3": 160,
    "box-close-v3": 160,
    "disassemble-v3": 240,
    "door-lock-v3": 160,
    "handle-pull-v3": 160,
    "peg-insert-side-v3": 160,
    "peg-unplug-side-v3": 160,
    "pick-out-of-hole-v3": 160,
    "push-back-v3": 160,
    "soccer-v3": 160,
    "stick-pull-v3": 200,
}
"""Tasks for which the scripted expert often needs more than `_HORIZON` steps."""

TASKS = {
    name: Task(name, (first, second), evaluation, _LONGER.get(name, _HORIZON))
    for name, (first, second, evaluation) in _SENTENCES.items()
}

SEQUENCES = {
    "demo": Sequence(
        trained=("faucet-open-v3", "drawer-open-v3", "window-open-v3"),
        held_out=("door-open-v3", "faucet-close-v3", "coffee-button-v3"),
    ),
    "simple_recipe": Sequence(
        trained=("faucet-open-v3", "drawer-open-v3", "window-open-v3", "plate-slide-v3", "door-lock-v3"),
        held_out=("door-open-v3", "faucet-close-v3", "coffee-button-v3", "button-press-v3", "button-press-topdown-v3"),
    ),
    "mt10": Sequence(
        trained=(
            "reach-v3",
            "push-v3",
            "pick-place-v3",
            "door-open-v3",
            "drawer-open-v3",
            "drawer-close-v3",
            "button-press-topdown-v3",
            "peg-insert-side-v3",
            "window-open-v3",
            "window-close-v3",
        ),
        held_out=(),
    ),
}
