"""From a config to a trained adapter: building the model, the training loop, and its records."""
