"""Weights per second of quantizing and dequantizing, ours and bitsandbytes', on one thread of this machine.

    python bench/quant.py [--rows 1024] [--inputs 4096] [--rounds 15]

All are timed in turn in one run, so that a busy machine slows all of them; times are this thread's CPU seconds, and
medians are shown. The ratio is to bitsandbytes with the same format.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bitsandbytes import functional
from torch import Tensor

from dist_lora.base.quant.formats import Int8, Nf4

DTYPES = (torch.float32, torch.bfloat16)


def bucketize_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 by binary search per weight."""
    levels = functional.get_4bit_type("nf4", device="cpu")
    blocks = rows.float().view(-1, 64)
    absmax = blocks.abs().amax(dim=1)
    values = blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(len(rows), -1)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def quantizers(rows: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name, the reference of each format first."""
    return {
        "nf4 bitsandbytes": lambda: functional.quantize_4bit(rows, blocksize=64, quant_type="nf4"),
        "nf4 bucketize": lambda: bucketize_nf4(rows),
        "nf4 ours": lambda: Nf4().quantize_rows(rows),
        "int8 bitsandbytes": lambda: functional.int8_vectorwise_quant(rows),
        "int8 ours": lambda: Int8().quantize_rows(rows),
    }


def dequantizers(rows: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name, the reference of each format first; the results have the type of ``rows``."""
    codes, state = functional.quantize_4bit(rows, blocksize=64, quant_type="nf4")
    nf4, int8 = Nf4().quantize_rows(rows), Int8().quantize_rows(rows)
    absmax = int8["scale"] * 127
    return {
        "nf4 bitsandbytes": lambda: functional.dequantize_4bit(codes, state),
        "nf4 ours": lambda: Nf4().dequantize(nf4, rows.dtype),
        "int8 bitsandbytes": lambda: functional.int8_vectorwise_dequant(int8["codes"], absmax).to(rows.dtype),
        "int8 ours": lambda: Int8().dequantize(int8, rows.dtype),
    }


def measure(actions: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each action, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            begin = time.thread_time()
            action()
            seconds[name].append(time.thread_time() - begin)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = torch.randn(arguments.rows, arguments.inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    print(f"{arguments.rows:,} x {arguments.inputs:,} weights, one thread, torch {torch.__version__}")
    for direction, actions in (("quantizing", quantizers), ("dequantizing", dequantizers)):
        for dtype in DTYPES:
            taken = measure(actions(weights.to(dtype)), rounds=arguments.rounds)
            print(f"\n{direction} {'from' if direction == 'quantizing' else 'to'} {str(dtype).removeprefix('torch.')}")
            for name, seconds in taken.items():
                ratio = taken[f"{name.split()[0]} bitsandbytes"] / seconds
                print(f"  {name:<18} {weights.numel() / seconds / 1e6:8,.0f} million weights/s {ratio:7.2f} x")


if __name__ == "__main__":
    main()
