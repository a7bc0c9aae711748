"""Methods that act on gradients and the optimiser."""
