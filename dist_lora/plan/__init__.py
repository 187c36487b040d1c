"""Who will hold what: how many bytes, how long, and whether it fits."""
