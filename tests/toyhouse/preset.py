"""The toy run as a preset, `perennial run toyhouse.preset --policy.checkpoint FOLDER`."""

from toyhouse.runs import CONFIG

__all__ = ["CONFIG"]
