"""What a run keeps on disk beside its checkpoints: its lock, records, status and report."""
