"""Elementwise work in few passes over memory: operators with Triton kernels for CUDA, and the plain torch that is their measure."""

from __future__ import annotations


def rows_per_program(width: int, *, is_backward: bool) -> int:
    """Rows that a program of a norm's kernels computes, for which it loads the weight ``(width,)`` once.

    In a backward, a weight of more than 8,192 numbers beside a row of three tensors is more than a thread's registers hold.
    """
    return 1 if is_backward and width > 8192 else 8
