"""The trained state on disk: each rank its share, a manifest last, read back on any number of ranks."""
