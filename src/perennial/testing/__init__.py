"""Toy tasks, a toy policy, and conformance checks that plug-in authors run too."""
