"""Speed of a device in a run's kinds of work: matrix products, attention, dequantization, elementwise work, calls."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.base.quant.formats import Format, format_of
from dist_lora.config.schema import QUANTIZED
from dist_lora.doctor.findings import Answer
from dist_lora.errors import DistLoraError
from dist_lora.layout.choices import DtypeName, choose_attention

# T tokens, D_in and D_out of a linear, H heads of E numbers

# (T, D_in, D_out): of linears as Llamas have them, and of LoRA's thin ones
TOKENS = (256, 1024, 4096)
LINEARS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (8192, 28672))
THIN = ((576, 16), (16, 576), (1536, 16), (16, 1536), (4096, 16), (16, 4096), (14336, 16), (16, 14336))
HEADS = (576, 49152), (4096, 128256)  # products with the head, in slices of its rows
DOCUMENTS = ((256, 9, 64), (512, 9, 64), (1024, 9, 64), (256, 32, 64), (1024, 32, 64), (4096, 32, 128))
DENSE = (2048, 2048)
ELEMENTS = tuple(2**power for power in range(15, 26, 2))  # of elementwise work: within a cache and beyond it
CALLS = 200
SLOW_TIMES = 1.5  # a rank that is slower than the others by this factor is named

REPEATS = 7
SHORT_S, MAX_CALLS = 2e-3, 200  # of a repeat on a GPU, and the most calls in it
# Of the whole budget, the share for the repeats of one size, and the longest share of a single one: sizes that would take
# longer are skipped.
ENOUGH, TOO_LONG = 1 / 200, 1 / 100


def measure_compute(device: torch.device, dtype: torch.dtype, *, budget_s: float) -> dict[str, Any]:
    """Rates of one rank, in the form of ``plan.measured``; sizes that would take too long are skipped.

    ``budget_s``: about how long it takes at most.
    """
    return {
        "elementwise": _elementwise(device, dtype, budget_s),
        "call_s": _call_s(device, dtype, budget_s),
        "products": _products(device, dtype, budget_s),
        "attention": _attention(device, dtype, budget_s),
        "dense_weights_per_s": {
            quant: _dequantize(format_of(quant, dtype), device, dtype, budget_s) for quant in QUANTIZED
        },
    }


def examine_compute(device: torch.device, dtype: torch.dtype, *, budget_s: float) -> Answer:
    """``measure_compute`` as facts, for ``judge_compute``; a format that this device can't dequantize is a fault."""
    answer = Answer()
    try:
        answer.facts = measure_compute(device, dtype, budget_s=budget_s)
    except DistLoraError as error:
        answer.add("fault", "compute", str(error), "See the message; model.quant: none and int8 may still work.")
    return answer


def judge_compute(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> Answer:
    """The speed of the slowest rank, and which ranks are slower than the others.

    Args:
        ranks: in order, each one's host and facts; these are empty for one that measured nothing.
    """
    answer = Answer()
    fastest = {
        i: max(facts["products"], key=lambda product: product["flops_per_s"][1])["flops_per_s"][1]
        for i, (_, facts) in enumerate(ranks)
        if "products" in facts
    }
    if not fastest:
        return answer
    slowest = min(fastest, key=lambda i: fastest[i])
    facts = ranks[slowest][1]
    elementwise = [size["bytes_per_s"][1] / 1e9 for size in facts["elementwise"]]
    dequantized = {name: rate[1] / 1e6 for name, rate in facts["dense_weights_per_s"].items()}
    answer.add(
        "ok",
        "compute",
        f"{facts['device']}: {fastest[slowest] / 1e12:.3g} TFLOP/s in matrix products, {elementwise[-1]:.3g} to "
        f"{max(elementwise):.3g} GB/s in elementwise work, {dequantized['nf4']:,.0f} million weights/s dequantized from nf4 "
        f"and {dequantized['int8']:,.0f} from int8{' (the slowest rank)' if len(ranks) > 1 else ''}",
    )
    usual = statistics.median(fastest.values())
    for i, rate in fastest.items():
        if rate * SLOW_TIMES < usual:
            answer.add(
                "warning",
                "compute",
                f"rank {i} on {ranks[i][0]} reaches {rate / 1e12:.3g} TFLOP/s, the others {usual / 1e12:.3g}",
                "Check what else runs on its device, its clocks and its temperature (nvidia-smi -q -d PERFORMANCE), or exclude "
                "it: every step waits for it.",
            )
    return answer


def name_of(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} per rank"


def memory_of_device(device: torch.device, *, ranks: int) -> int:
    """Memory of a rank's device in bytes; on a CPU its share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // ranks


def _products(device: torch.device, dtype: torch.dtype, budget_s: float) -> list[dict[str, Any]]:
    """Forward and backward matrix products of frozen linears and of LoRA's, by size."""
    rates: list[dict[str, Any]] = []
    fastest, ends_s = 0.0, time.perf_counter() + budget_s / 2
    sizes = [(tokens, width, out) for tokens in TOKENS for width, out in LINEARS + THIN]
    sizes += [(max(1, 2**25 // out), width, out) for width, out in HEADS]
    for tokens, width, out in sorted(sizes, key=lambda size: size[0] * size[1] * size[2]):
        flops = 2 * tokens * width * out
        is_too_long = fastest and 2 * flops / fastest > TOO_LONG * budget_s
        if rates and (is_too_long or time.perf_counter() > ends_s):
            continue
        x = torch.randn(tokens, width, device=device, dtype=dtype)
        weight = torch.randn(out, width, device=device, dtype=dtype)
        d_y = torch.randn(tokens, out, device=device, dtype=dtype)

        def both(x: Tensor = x, weight: Tensor = weight, d_y: Tensor = d_y) -> None:
            F.linear(x, weight)
            torch.mm(d_y, weight)

        times = _times(both, device, budget_s)
        rate = _rate(2 * flops, times)
        fastest = max(fastest, rate[1])
        rates.append({"tokens": tokens, "width": width, "out": out, "flops_per_s": rate})
    return rates


def _attention(device: torch.device, dtype: torch.dtype, budget_s: float) -> list[dict[str, Any]]:
    """Causal attention of one document, forward and backward, as the model calls it.

    It counts 6 operations per head element and attended token: 2 forward and twice that backward, for scores and values.
    """
    rates: list[dict[str, Any]] = []
    name: DtypeName = "bf16" if dtype == torch.bfloat16 else "fp32"
    backend, _ = choose_attention("auto", dtype=name, on_gpu=device.type == "cuda")
    for tokens, heads, head_dim in DOCUMENTS:
        flops = 6 * heads * head_dim * tokens * tokens
        if rates and flops / rates[-1]["flops_per_s"][1] > TOO_LONG * budget_s:
            continue
        parts = [torch.randn(tokens, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        attention = Documents((0, tokens), backend)
        d_y = torch.randn(tokens, heads, head_dim, device=device, dtype=dtype)

        def both(parts: list[Tensor] = parts, attention: Documents = attention, d_y: Tensor = d_y) -> None:
            torch.autograd.grad(attention(0, *parts), parts, d_y)

        rates.append(
            {
                "tokens": tokens,
                "width": heads,
                "out": head_dim,
                "flops_per_s": _rate(flops, _times(both, device, budget_s)),
            }
        )
    return rates


def _dequantize(fmt: Format, device: torch.device, dtype: torch.dtype, budget_s: float) -> list[float]:
    parts = fmt.quantize_rows(torch.randn(*DENSE, device=device, dtype=dtype))
    times = _times(lambda: fmt.dequantize(parts, dtype), device, budget_s)
    return _rate(DENSE[0] * DENSE[1], times)


def _elementwise(device: torch.device, dtype: torch.dtype, budget_s: float) -> list[dict[str, Any]]:
    """Bytes per second that an out-of-place addition reads and writes."""
    rates: list[dict[str, Any]] = []
    for elements in ELEMENTS:
        num_bytes = 3 * elements * dtype.itemsize
        if rates and num_bytes / rates[-1]["bytes_per_s"][0] > TOO_LONG * budget_s:
            break
        a, b = (torch.ones(elements, device=device, dtype=dtype) for _ in range(2))
        times = _times(lambda a=a, b=b: torch.add(a, b), device, budget_s)  # type: ignore[misc]
        rates.append({"num_bytes": a.nbytes, "bytes_per_s": _rate(num_bytes, times)})
    return rates


def _call_s(device: torch.device, dtype: torch.dtype, budget_s: float) -> float:
    """Seconds per call of a small operator, or of its backward."""
    x = torch.ones(8, device=device, dtype=dtype, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(CALLS):
            y = y * 1.0
        torch.autograd.grad(y, x, torch.ones_like(y))

    return min(_times(chain, device, budget_s)) / (2 * CALLS)


def _times(work: Callable[[], object], device: torch.device, budget_s: float) -> list[float]:
    """Seconds of each repeat, after a warm-up: at least three, more while the budget allows.

    On a GPU a repeat is as many calls in a row as take ``SHORT_S``: one alone would be timed with its launch and its end.
    """
    timed = _seconds_on_gpu if device.type == "cuda" else _seconds_on_host
    started_s = time.perf_counter()
    first_s = timed(work, 1)
    calls = calls_of(timed(work, 1)) if device.type == "cuda" else 1
    times: list[float] = []
    while len(times) < REPEATS:
        times.append(timed(work, calls))
        if len(times) >= 3 and time.perf_counter() - started_s > ENOUGH * budget_s + first_s:
            break
    return times


def calls_of(call_s: float) -> int:
    """How many calls of ``call_s`` seconds are timed in a row on a GPU."""
    return max(1, min(MAX_CALLS, math.ceil(SHORT_S / max(call_s, 1e-7))))


def _seconds_on_host(work: Callable[[], object], calls: int) -> float:
    """Seconds per call."""
    began_s = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began_s) / calls


def _seconds_on_gpu(work: Callable[[], object], calls: int) -> float:
    """Seconds per call between two events on the GPU; the host waits once, for the last."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(calls):
        work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


def _rate(amount: float, times: list[float]) -> list[float]:
    """Slow and fast; the slowest of several repeats is dropped: something else was running."""
    kept = sorted(times)[: max(1, len(times) - 1)]
    return [amount / kept[-1], amount / kept[0]]
