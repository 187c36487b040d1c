"""What comes after training: evaluate, generate, merge."""
