"""What a run's data are, before it is started: counts, lengths, duplicates, samples, steps and hours."""
