"""Frobenius norms of the base's weights, summed from rows as they are read: each rank adds what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# torch 2.13 converts 16 bits to fp32 in memory first: from a cache it reads nine times as fast as a slice of 64 MiB.
_WEIGHTS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Squares:
    """The sum of the squares of some rows of a weight, and how many rows these are."""

    num_rows: int = 0
    total: float = 0.0

    def __add__(self, other: Squares) -> Squares:
        """Of the rows of both."""
        return Squares(self.num_rows + other.num_rows, self.total + other.total)


def squares_of(rows: Tensor) -> Squares:
    """Of ``rows`` ``(rows, D_in)``, of any float type, on their device.

    Each row is summed in fp32 and the rows in fp64: one fp32 sum over a weight loses its third digit. Takes 1 MiB.
    """
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, max(1, _WEIGHTS_AT_ONCE // rows.shape[1])):
        total += torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).double().square().sum()
    return Squares(len(rows), float(total))


def norm_of(parts: Sequence[Squares], *, num_rows: int) -> float | None:
    """The norm of a weight of ``num_rows`` rows from what all ranks have read of it; None if it isn't finite.

    Replicas read the same rows: each row must have been read equally often.
    """
    whole = sum(parts, Squares())
    times, rest = divmod(whole.num_rows, num_rows)
    assert times and not rest, f"{whole.num_rows} rows were read of {num_rows}"
    norm = math.sqrt(whole.total / times)
    return norm if math.isfinite(norm) else None
