"""Whole runs with the toy suite and policy, for tests; a package, so that worker processes find it by dotted name."""
