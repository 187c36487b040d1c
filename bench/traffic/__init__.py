"""Counts the kernels and the bytes of a training step on a GPU, without one: see ``python -m bench.traffic --help``."""
