"""Remembering: methods against forgetting, one file each; they compose as a list."""
