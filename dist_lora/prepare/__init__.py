"""What is done once before runs: fetching all that they need, and storing a base quantized."""
