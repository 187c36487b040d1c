"""Triton's kernels and their launches. Imported only where they run, on a CUDA device, and by their tests.

Numbers are loaded and stored in their own dtype and computed in fp32. All tensors are contiguous. Sizes that a model fixes are
constants of the kernel; the number of tokens, which differs by micro-batch, is not, so that each kernel is compiled once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_lora.base.kernels import rows_per_program

# T tokens, D width of a norm, F feed-forward width, H query heads, G key heads, E width of a head, K rows of logits, V vocabulary

NUMBERS_PER_PROGRAM = 2048  # of gate and up
HEADS_AT_ONCE = 8
LOGITS_AT_ONCE = 4096


# Norms


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    x_at, delta_at, weight_at, total_at, h_at, inverse_rms_at, num_rows, eps,
    HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_at + columns, mask=inside, other=0.0)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        at = row * WIDTH  # added first: so all columns are at constant distances of one address
        is_there = inside & (row < num_rows)
        x = tl.load(x_at + at + columns, mask=is_there, other=0.0).to(tl.float32)
        if HAS_DELTA:
            # Normed is what the backward will find: the sum as it is stored.
            total = (x + tl.load(delta_at + at + columns, mask=is_there, other=0.0).to(tl.float32)).to(
                h_at.dtype.element_ty
            )
            tl.store(total_at + at + columns, total, mask=is_there)
            x = total.to(tl.float32)
        inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(x * x) / WIDTH + eps)
        # In 16 bits the normed row is rounded before the weight is applied, as Llama was trained.
        normed = (x * inverse_rms).to(h_at.dtype.element_ty).to(tl.float32)
        tl.store(h_at + at + columns, (normed * weight.to(tl.float32)).to(h_at.dtype.element_ty), mask=is_there)
        tl.store(inverse_rms_at + row, inverse_rms, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    d_h_at, x_at, weight_at, inverse_rms_at, d_stream_at, h_at, num_rows,
    HAS_STREAM: tl.constexpr, NEEDS_H: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_at + columns, mask=inside, other=0.0)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        at = row * WIDTH  # added first: so all columns are at constant distances of one address
        is_there = inside & (row < num_rows)
        normed = tl.load(x_at + at + columns, mask=is_there, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_at + row, mask=row < num_rows, other=0.0)
        normed *= inverse_rms
        scale = weight.to(tl.float32)
        if NEEDS_H:
            rounded = normed.to(d_h_at.dtype.element_ty).to(tl.float32)
            tl.store(h_at + at + columns, (rounded * scale).to(d_h_at.dtype.element_ty), mask=is_there)
        d_normed = tl.load(d_h_at + at + columns, mask=is_there, other=0.0).to(tl.float32) * scale
        d_x = (d_normed - normed * (tl.sum(d_normed * normed) / WIDTH)) * inverse_rms
        if HAS_STREAM:
            d_x += tl.load(d_stream_at + at + columns, mask=is_there, other=0.0).to(tl.float32)
        tl.store(d_h_at + at + columns, d_x.to(d_h_at.dtype.element_ty), mask=is_there)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """See ``operators.norm`` and ``operators.add_norm``: the sum, if ``delta`` is given, h and 1 / rms."""
    num_rows, width = x.shape
    total = torch.empty_like(x) if delta is not None else None
    h, inverse_rms = torch.empty_like(x), x.new_empty((num_rows, 1), dtype=torch.float32)
    _check_contiguous(x, delta, weight)
    sizes = sizes_of_norm(width, is_backward=False)
    _norm[(triton.cdiv(num_rows, sizes["ROWS"]),)](
        x, x if delta is None else delta, weight, x if total is None else total, h, inverse_rms, num_rows, eps,
        HAS_DELTA=delta is not None, **sizes,
    )  # fmt: skip
    return total, h, inverse_rms


def norm_backward_(
    d_h: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, d_stream: Tensor | None, h: Tensor | None
) -> None:
    """See ``operators.norm_backward_``."""
    num_rows, width = x.shape
    _check_contiguous(d_h, x, weight, inverse_rms, d_stream, h)
    sizes = sizes_of_norm(width, is_backward=True)
    _norm_backward[(triton.cdiv(num_rows, sizes["ROWS"]),)](
        d_h, x, weight, inverse_rms, x if d_stream is None else d_stream, d_h if h is None else h, num_rows,
        HAS_STREAM=d_stream is not None, NEEDS_H=h is not None, **sizes,
    )  # fmt: skip


def sizes_of_norm(width: int, *, is_backward: bool) -> dict[str, Any]:
    """Constants and warps of a norm's kernels: a row stays in registers, at most 16 numbers of a tensor per thread."""
    block = triton.next_power_of_2(width)
    rows = rows_per_program(width, is_backward=is_backward)
    return {"WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": min(32, max(4, block // 512))}


# SiLU times


@triton.jit(do_not_specialize=["num_numbers"])
def _silu_times(gate_at, up_at, h_at, num_numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < num_numbers - at
    gate = tl.load(gate_at + at + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at + at + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_at + at + columns, (gate * tl.sigmoid(gate) * up).to(h_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_numbers"])
def _silu_times_backward(d_h_at, gate_at, up_at, num_numbers, NEEDS_H: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < num_numbers - at
    d_h = tl.load(d_h_at + at + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_at + at + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at + at + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(
        gate_at + at + columns, (d_h * up * (sigmoid + silu * (1.0 - sigmoid))).to(d_h_at.dtype.element_ty), mask=inside
    )
    tl.store(up_at + at + columns, (d_h * silu).to(d_h_at.dtype.element_ty), mask=inside)
    if NEEDS_H:
        tl.store(d_h_at + at + columns, (silu * up).to(d_h_at.dtype.element_ty), mask=inside)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """See ``operators.silu_times``."""
    _check_contiguous(gate, up)
    h = torch.empty_like(gate)
    _silu_times[(triton.cdiv(gate.numel(), NUMBERS_PER_PROGRAM),)](
        gate, up, h, gate.numel(), BLOCK=NUMBERS_PER_PROGRAM, num_warps=8
    )
    return h


def silu_times_backward_(d_h: Tensor, gate: Tensor, up: Tensor, needs_h: bool) -> None:
    """See ``operators.silu_times_backward_``."""
    _check_contiguous(d_h, gate, up)
    _silu_times_backward[(triton.cdiv(gate.numel(), NUMBERS_PER_PROGRAM),)](
        d_h, gate, up, gate.numel(), NEEDS_H=needs_h, BLOCK=NUMBERS_PER_PROGRAM, num_warps=8
    )


# Rotary embedding


@triton.jit
def _rotate_heads(at, cos, sin, inside, NUM_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    for head in range(0, NUM_HEADS, HEADS):
        heads = head + tl.arange(0, HEADS)
        is_there = (heads < NUM_HEADS)[:, None] & inside[None, :]
        first_at = at + heads[:, None] * (2 * HALF) + columns[None, :]
        first = tl.load(first_at, mask=is_there, other=0.0).to(tl.float32)
        second = tl.load(first_at + HALF, mask=is_there, other=0.0).to(tl.float32)
        tl.store(first_at, (first * cos - second * sin).to(at.dtype.element_ty), mask=is_there)
        tl.store(first_at + HALF, (second * cos + first * sin).to(at.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate(
    query_at, key_at, cos_at, sin_at,
    IS_BACK: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    cos = tl.load(cos_at + token * HALF + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_at + token * HALF + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if IS_BACK:
        sin = -sin
    _rotate_heads(query_at + token * (NUM_HEADS * 2 * HALF), cos, sin, inside, NUM_HEADS, HALF, HEADS, BLOCK)
    _rotate_heads(key_at + token * (NUM_KEY_HEADS * 2 * HALF), cos, sin, inside, NUM_KEY_HEADS, HALF, HEADS, BLOCK)


def rotate_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> None:
    """See ``operators.rotate_``."""
    _check_contiguous(query, key, cos, sin)
    _rotate[(len(query),)](query, key, cos, sin, IS_BACK=is_back, **sizes_of_rotate(query, key, cos))


def sizes_of_rotate(query: Tensor, key: Tensor, cos: Tensor) -> dict[str, Any]:
    """Constants and warps of the rotation."""
    half = cos.shape[-1]
    return {
        "NUM_HEADS": query.shape[1] // (2 * half),
        "NUM_KEY_HEADS": key.shape[1] // (2 * half),
        "HALF": half,
        "HEADS": HEADS_AT_ONCE,
        "BLOCK": triton.next_power_of_2(half),
        "num_warps": 2,
    }


# Cross entropy


@triton.jit
def _cross_entropy(
    logits_at, labels_at, losses_at, TO_GRADIENT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_at += row * VOCAB
    label = tl.load(labels_at + row)
    of_label = tl.load(logits_at + label).to(tl.float32)
    largest = float("-inf")
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, VOCAB, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_at + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logits))
        sums = sums * tl.exp(largest - larger) + tl.exp(logits - larger)
        largest = larger
    total = tl.sum(sums)
    loss = largest + tl.log(total) - of_label
    tl.store(losses_at + row, loss)
    if TO_GRADIENT:
        # A label's gradient, its probability less one, in fp32: in 16 bits a probability near 1 would leave nothing of the
        # difference. Triton has no expm1, nor has the loss more digits than this.
        of_label = tl.exp(-loss) - 1.0
        scale = 1.0 / total
        for first in range(0, VOCAB, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < VOCAB
            logits = tl.load(logits_at + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.where(columns == label, of_label, tl.exp(logits - largest) * scale)
            tl.store(logits_at + columns, gradient.to(logits_at.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, labels: Tensor, to_gradient: bool) -> Tensor:
    """See ``operators.cross_entropy_``."""
    _check_contiguous(logits, labels)
    losses = logits.new_empty((len(logits), 1), dtype=torch.float32)
    _cross_entropy[(len(logits),)](
        logits, labels, losses, TO_GRADIENT=to_gradient, VOCAB=logits.shape[1], BLOCK=LOGITS_AT_ONCE, num_warps=8
    )
    return losses


def _check_contiguous(*tensors: Tensor | None) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors), "a kernel's tensors are contiguous"
