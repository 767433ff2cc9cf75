"""With which coefficients to merge: `perennial alpha`."""
