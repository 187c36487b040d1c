"""What each rank holds: the choices that a config leaves open, and the bytes."""
