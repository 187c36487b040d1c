"""What a run keeps on disk besides its checkpoints: its lock, records, status and report."""
