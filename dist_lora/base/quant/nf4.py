"""NF4: each weight as the nearest of 16 levels, times the largest magnitude of its block of 64.

The levels are quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3 and appendix E; the digits
are bitsandbytes'). On the CPU this file computes what bitsandbytes 0.50.2 computes there, bit for bit; on a GPU
bitsandbytes' kernels do the work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_lora.base.quant.finite import check_finite
from dist_lora.base.quant.library import gpu_functions
from dist_lora.layout.storage import NF4_BLOCK

# D_in inputs of a linear, a multiple of BLOCK; rows: any number of a linear's outputs

BLOCK = NF4_BLOCK
LEVELS: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_LEVELS = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")
# A weight on a midpoint takes the level below. Midpoints are rounded to fp32 and compared as such.
_MIDPOINTS: tuple[np.float32, ...] = tuple(((_LEVELS[:-1] + _LEVELS[1:]) / 2).numpy())
_BYTES = torch.arange(256, device="cpu")
# The two levels of each byte, as the 8 bytes of one int64: one look-up gives two weights.
_PAIRS = torch.stack([_LEVELS[_BYTES >> 4], _LEVELS[_BYTES & 15]], dim=1).view(torch.int64).view(-1)
# A block of zeros divides by this instead; bitsandbytes' number, which is part of what 'bit for bit' means.
_LEAST_ABSMAX = 1e-38
# Weights per chunk on the CPU: all temporaries (6 bytes per weight) stay in a core's second-level cache.
_CHUNK = 2**17


@torch.no_grad()
def quantize_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 codes and scales of some rows of a weight.

    Rows are independent: a block never leaves its row, so the result equals the same rows of the whole
    matrix quantized at once. Local. Peak memory is the result, and 1.3 MiB on the CPU. On a GPU bitsandbytes
    0.50.2 launches this kernel on the default stream, whatever the current one is.

    Args:
        rows: ``(rows, D_in)``, fp32, bf16 or fp16; copied first if not contiguous.

    Returns:
        codes ``(rows, D_in / 2)`` uint8, two weights per byte, the first in the high four bits, and absmax
        ``(rows, D_in / 64)`` fp32.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
        ConfigError: on a GPU, bitsandbytes is absent or broken.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    num_rows, width = rows.shape
    assert width % BLOCK == 0, f"rows of {width} weights are not whole blocks of {BLOCK}"
    if rows.device.type != "cpu" and num_rows:
        check_finite(rows)  # the kernels' maximum passes over NaN
        codes, state = gpu_functions(rows.device).quantize_4bit(
            rows.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        return codes.view(num_rows, width // 2), state.absmax.view(num_rows, width // BLOCK)
    codes = rows.new_empty((num_rows, width // 2), dtype=torch.uint8)
    absmax = rows.new_empty((num_rows, width // BLOCK), dtype=torch.float32)
    _quantize_blocks(rows.reshape(-1, BLOCK), codes=codes.view(-1, BLOCK // 2), absmax=absmax.view(-1))
    if not absmax.isfinite().all():
        check_finite(rows)
    return codes, absmax


def _quantize_blocks(blocks: Tensor, *, codes: Tensor, absmax: Tensor) -> None:
    """Fills ``codes`` ``(blocks, 32)`` and ``absmax`` ``(blocks,)`` from ``blocks`` ``(blocks, 64)``.

    Fifteen comparisons per weight, of whole chunks, are faster than a search or a table for each weight. They
    are numpy's: torch 2.13 writes the bytes of a comparison of floats one by one, ten times slower.
    """
    step = max(1, min(_CHUNK // BLOCK, len(blocks)))
    values_of = blocks.new_empty((step, BLOCK), dtype=torch.float32)
    levels_of = blocks.new_empty((step, BLOCK), dtype=torch.uint8)
    above_of = np.empty((step, BLOCK), dtype=np.bool_)
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        count = len(part)
        values, levels, above = values_of[:count], levels_of[:count], above_of[:count]
        if part.dtype != torch.float32:
            part = values.copy_(part)
        largest = absmax[first : first + count]
        torch.amax(part, dim=1, out=largest)
        torch.maximum(largest, part.amin(dim=1).neg_(), out=largest).abs_()
        torch.mul(part, largest.clamp(min=_LEAST_ABSMAX).reciprocal_()[:, None], out=values)
        _count_midpoints_below(values.numpy(), counts=levels.numpy(), scratch=above)
        # Two levels side by side are one little-endian int16, a + 256 b; times 4097 its upper byte is 16 a + b.
        pairs = levels.view(torch.int16).mul_(4097).bitwise_right_shift_(8)
        codes[first : first + count].copy_(pairs)


def _count_midpoints_below(values: np.ndarray, *, counts: np.ndarray, scratch: np.ndarray) -> None:
    """Fills ``counts``, uint8: how many midpoints each of ``values`` exceeds, which is its level."""
    np.greater(values, _MIDPOINTS[0], out=counts.view(np.bool_))
    for midpoint in _MIDPOINTS[1:]:
        np.greater(values, midpoint, out=scratch)
        np.add(counts, scratch.view(np.uint8), out=counts)


@torch.library.custom_op("dist_lora::dequantize_nf4", mutates_args=())
def dequantize_nf4(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """``(rows, D_in)`` in ``dtype`` of ``codes`` ``(rows, D_in / 2)`` and ``absmax`` ``(rows, D_in / 64)``.

    Level times absmax in fp32, rounded once to ``dtype``. That is bitsandbytes' number but for results below
    2^-126 in bf16, which its AVX-512 kernel makes zero. A single operator for tools that count or fake
    operators. Local. On the CPU, peak memory is the result and 1 MiB.
    """
    num_rows, width = codes.shape[0], 2 * codes.shape[1]
    assert absmax.dtype == torch.float32, f"absmax has become {absmax.dtype}: something casts the base's scales"
    if codes.device.type == "cpu" or not num_rows:
        weight = absmax.new_empty((num_rows, width), dtype=dtype)
        _fill_blocks(weight.view(-1, BLOCK), codes=codes.reshape(-1, BLOCK // 2), absmax=absmax.reshape(-1, 1))
        return weight
    functional = gpu_functions(codes.device)
    state = functional.QuantState(
        absmax=absmax.reshape(-1), shape=torch.Size((num_rows, width)), dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    # As a column: given one row of codes, dequantize_4bit would transpose its result.
    whole: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return whole


@dequantize_nf4.register_fake
def _(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype)


def _fill_blocks(weight: Tensor, *, codes: Tensor, absmax: Tensor) -> None:
    """Fills ``weight`` ``(blocks, 64)`` from ``codes`` ``(blocks, 32)`` and ``absmax`` ``(blocks, 1)``."""
    step = max(1, min(_CHUNK // BLOCK, len(weight)))
    indices_of = codes.new_empty((step, BLOCK // 2), dtype=torch.int32)
    values_of = absmax.new_empty((step if weight.dtype != torch.float32 else 0, BLOCK))
    for first in range(0, len(weight), step):
        part = weight[first : first + step]
        values = part if part.dtype == torch.float32 else values_of[: len(part)]
        indices = indices_of[: len(part)].copy_(codes[first : first + step])
        torch.index_select(_PAIRS, 0, indices.view(-1), out=values.view(torch.int64).view(-1))
        values.mul_(absmax[first : first + step])
        if values is not part:
            part.copy_(values)
