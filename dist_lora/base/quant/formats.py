"""How a linear of the base is stored, by ``model.quant``: values with pure functions, independent of model and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_lora.base.quant.int8 import dequantize_int8, quantize_int8
from dist_lora.base.quant.nf4 import BLOCK, dequantize_nf4, quantize_nf4
from dist_lora.config.schema import Quant
from dist_lora.layout.storage import nf4_refusal

# D_in and D_out of a linear; rows: any number of its outputs, in any order


@dataclass(frozen=True)
class PartSpec:
    """One tensor that a linear stores. ``shape`` is that of the whole; its rows are the linear's rows."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype


class Format(Protocol):
    """How a linear's weight is stored. A value without state: equal formats do the same."""

    @property
    def name(self) -> Quant:
        """Its name in ``model.quant``."""

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """The tensors that hold a whole weight ``(D_out, D_in)``, in the order that every file and rank has them."""

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape can't be stored so, in one sentence; None where it can."""

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of ``rows`` ``(rows, D_in)``, fp32, bf16 or fp16, on their device and contiguous.

        Rows are independent: any rows give exactly these rows of the whole. Local: no communication.

        Raises:
            NotFiniteError: a weight is NaN or infinite (only where a weight is quantized).
            ConfigError: on a GPU, bitsandbytes is needed and absent or broken.
        """

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight ``(rows, D_in)`` in ``dtype`` that some rows' ``parts`` represent, detached from any graph."""


@dataclass(frozen=True)
class Plain:
    """The weight itself in ``dtype``: ``weight`` ``(D_out, D_in)``."""

    dtype: torch.dtype

    @property
    def name(self) -> Quant:
        """``none``."""
        return "none"

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """``weight`` ``(D_out, D_in)``."""
        return (PartSpec("weight", (out_features, in_features), self.dtype),)

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Every shape can be stored."""
        return None

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """``rows`` cast to ``dtype``, not copied where they have it. NaN is allowed."""
        return {"weight": rows.detach().to(self.dtype).contiguous()}

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, not copied where it is stored in ``dtype``."""
        return parts["weight"].detach().to(dtype)


@dataclass(frozen=True)
class Nf4:
    """4.5 bits per weight: ``codes`` uint8 ``(D_out, D_in / 2)``, ``absmax`` fp32 ``(D_out, D_in / 64)``."""

    @property
    def name(self) -> Quant:
        """``nf4``."""
        return "nf4"

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """``codes`` and ``absmax``."""
        return (
            PartSpec("codes", (out_features, in_features // 2), torch.uint8),
            PartSpec("absmax", (out_features, in_features // BLOCK), torch.float32),
        )

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Rows must be whole blocks of 64 weights."""
        return nf4_refusal(out_features, in_features)

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """``codes`` and ``absmax`` of ``rows``; see ``quantize_nf4``."""
        codes, absmax = quantize_nf4(rows)
        return {"codes": codes, "absmax": absmax}

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Level times absmax; see ``dequantize_nf4``."""
        weight: Tensor = dequantize_nf4(parts["codes"].detach(), parts["absmax"].detach(), dtype)
        return weight


@dataclass(frozen=True)
class Int8:
    """8 bits per weight: ``codes`` int8 ``(D_out, D_in)``, ``scale`` fp32 ``(D_out, 1)``."""

    @property
    def name(self) -> Quant:
        """``int8``."""
        return "int8"

    def parts(self, out_features: int, in_features: int) -> tuple[PartSpec, ...]:
        """``codes`` and ``scale``."""
        return (
            PartSpec("codes", (out_features, in_features), torch.int8),
            PartSpec("scale", (out_features, 1), torch.float32),
        )

    def refusal(self, out_features: int, in_features: int) -> str | None:
        """Every shape can be stored."""
        return None

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """``codes`` and ``scale`` of ``rows``; see ``quantize_int8``."""
        codes, scale = quantize_int8(rows)
        return {"codes": codes, "scale": scale}

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Code times scale; see ``dequantize_int8``."""
        weight: Tensor = dequantize_int8(parts["codes"].detach(), parts["scale"].detach(), dtype)
        return weight


def format_of(quant: Quant, dtype: torch.dtype) -> Format:
    """The format of the linears of a base with ``model.quant`` and ``model.dtype``."""
    formats: dict[Quant, Format] = {"none": Plain(dtype), "nf4": Nf4(), "int8": Int8()}
    return formats[quant]
