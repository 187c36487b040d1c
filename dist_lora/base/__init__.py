"""The frozen base: what lies on disk, and how each rank reads its own rows of it."""
