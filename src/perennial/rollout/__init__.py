"""Acting: episodes are played by workers and come back as trajectories."""
