"""Where runs are kept: atomic commits, the run folder, tensors and the optimiser's state."""
