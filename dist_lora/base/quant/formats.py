"""The formats of a frozen linear's weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartSpec:
    """One part of a weight."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype


class Format(Protocol):
    """A way to keep a weight."""

    @property
    def name(self) -> str:
        """See the class."""
        ...

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """See the class."""
        ...

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """See the class."""
        return None

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """See the class."""
        ...

    def dense(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See the class."""
        ...


@dataclass(frozen=True)
class Plain:
    """As it is."""

    dtype: torch.dtype
    name: str = "none"

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """See the class."""
        return (PartSpec("weight", (out_features, in_features), self.dtype),)

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """See the class."""
        return None

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """See the class."""
        return {"weight": rows}

    def dense(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See the class."""
        return parts["weight"].to(dtype)


def format_of(quant: str, dtype: torch.dtype) -> Format:
    """See the class."""
    assert quant == "none"
    return Plain(dtype)
