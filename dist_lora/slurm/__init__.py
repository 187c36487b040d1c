"""Batch scripts for Slurm, made from a config and its plan."""
