"""Trackers mirror a run's numbers elsewhere. One file a tracker; `metrics.jsonl` in the run folder is always written."""
