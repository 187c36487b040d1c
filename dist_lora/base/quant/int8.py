"""int8: each weight as a whole number from -127 to 127, times one scale per row.

Source: LLM.int8(), arXiv 2208.07339, section 2.1 (absmax quantization), with a scale for each row as in section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_lora.base.quant.finite import check_finite

# D_in inputs of a linear; rows: any number of a linear's outputs

LARGEST_CODE = 127
# A row of zeros, or of less than this, is divided by this: 127 / absmax stays finite and the scale normal.
_LEAST_ABSMAX = 1e-35
# Weights per chunk: on the CPU all temporaries stay in a core's second-level cache.
_CHUNK_ON_CPU, _CHUNK_ON_GPU = 2**17, 2**24
_DEQUANTIZED_ON_CPU = 2**18  # one operator has two temporaries, not four


@torch.no_grad()
def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of some rows of a weight, rounded half to even, and each row's scale: its absmax / 127.

    The codes are those of bitsandbytes' ``int8_vectorwise_quant`` on the CPU, where that is defined (it divides
    zero by zero in a row of zeros). Local. Peak memory is the result and 8 bytes for each weight of a chunk:
    1 MiB on the CPU, 128 MiB on a GPU, or one row's where that is more.

    Args:
        rows: ``(rows, D_in)``, fp32, bf16 or fp16.

    Returns:
        codes ``(rows, D_in)`` int8 and scale ``(rows, 1)`` fp32.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    codes = torch.empty_like(rows, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = rows.new_empty((len(rows), 1), dtype=torch.float32)
    chunk = _CHUNK_ON_CPU if rows.device.type == "cpu" else _CHUNK_ON_GPU
    for part in _row_chunks(rows, chunk):
        values = rows[part].float()
        largest = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
        largest.clamp_(min=_LEAST_ABSMAX)
        # By a tensor: CUDA divides by a number as a product with its reciprocal (torch 2.13), an ulp off for 5 % of the rows.
        torch.div(largest, torch.full_like(largest, LARGEST_CODE), out=scale[part])
        codes[part].copy_(torch.mul(values, largest.reciprocal_().mul_(LARGEST_CODE)).round_())
    if not scale.isfinite().all():
        check_finite(rows)
    return codes, scale


@torch.library.custom_op("dist_lora::dequantize_int8", mutates_args=())
def dequantize_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows, D_in)`` in ``dtype`` of ``codes`` ``(rows, D_in)`` and ``scale`` ``(rows, 1)``.

    Code times scale in fp32, rounded once to ``dtype``. A single operator for tools that count or fake
    operators. Local. Peak memory is the result, and on the CPU 2 MiB.
    """
    assert scale.dtype == torch.float32, f"scale has become {scale.dtype}: something casts the base's scales"
    weight = scale.new_empty(codes.shape, dtype=dtype)
    _fill_rows(weight, codes=codes, scale=scale)
    return weight


def _fill_rows(weight: Tensor, *, codes: Tensor, scale: Tensor) -> None:
    """Fills ``weight`` ``(rows, D_in)`` from ``codes`` ``(rows, D_in)`` and ``scale`` ``(rows, 1)``.

    On a GPU one kernel reads a byte per weight and writes the result. On the CPU torch 2.13 first makes copies of codes and
    result in fp32, which in chunks stay in a core's cache.
    """
    if codes.device.type != "cpu":
        torch.mul(codes, scale, out=weight)
        return
    for part in _row_chunks(codes, _DEQUANTIZED_ON_CPU):
        torch.mul(codes[part], scale[part], out=weight[part])


@dequantize_int8.register_fake
def _(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _row_chunks(rows: Tensor, chunk: int) -> Iterator[slice]:
    step = max(1, chunk // rows.shape[1])
    for first in range(0, len(rows), step):
        yield slice(first, first + step)
