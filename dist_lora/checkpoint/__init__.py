"""The trained state on disk: each rank writes its part, the manifest comes last; read back on any number of ranks."""
