"""Remembering: methods against forgetting, one file each; they compose as a list."""

from perennial.strategies._composition import Strategies

__all__ = ["Strategies"]
