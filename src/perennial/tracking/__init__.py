"""Trackers mirror a run's numbers elsewhere, one file a tracker; the run folder always keeps them itself."""
