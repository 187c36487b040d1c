"""From records to token ids with a loss mask, packed sequences, and the batches of each rank."""
