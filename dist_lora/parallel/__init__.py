"""The processes of a run: how they start, agree and end, and how they share a model."""
