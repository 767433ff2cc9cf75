"""What a run needs of a machine, counted before anything is loaded."""
