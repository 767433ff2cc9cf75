"""What learning did to the weights of a run: size and rank, Fisher energy, divergence from the base, and its scale."""
