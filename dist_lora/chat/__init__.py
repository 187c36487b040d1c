"""Chat with a trained model."""
