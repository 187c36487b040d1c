"""One training step on fake tensors in a simulated cluster."""
