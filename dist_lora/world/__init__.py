"""Who this process is, and how all processes of a run agree."""
