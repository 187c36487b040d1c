"""Kernels, bytes and milliseconds of a layer and of a step on an H100, counted from the real code without a GPU.

    python -m bench.traffic                                                 # a layer of 8B, and steps of 8B, 70B and 405B
    python -m bench.traffic --model 3.1-70b --quant nf4 --sequences 1 --gpus 8   # a layer and a step of this run

The training step runs on the meta device, which only knows shapes, with its batch on the CPU; every operator that it calls becomes
the kernels that CUDA starts for it, by the table in bench/traffic/cuda.py, and these become time by the fixed rates of
bench/traffic/rates.py. Nothing is measured: launches, gaps between kernels and caches aren't counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from bench.traffic import rates
from bench.traffic.counter import PHASES, Counter
from bench.traffic.cuda import Kind, UnknownOperatorError
from bench.traffic.step import Case, count_step
from bench.traffic.totals import APART, StepTime, Sum, layer_sum, step_time
from dist_lora.herd.members import MEMBERS

GOALS = (
    Case("3.1-8b"),
    Case("3.1-70b", gpus=8),
    Case("3.1-405b", quant="nf4", sequences=1, gpus=8),
)
RECOMPUTE = {"auto": "auto", "all": True, "none": False}
LAYERS, LAYER = 3, 1  # of a model cut to three layers, the one in the middle
PARTS = (*get_args(Kind), "recomputation", "embedding, head and loss", "optimizer", "FSDP2's copies")


def print_layer(case: Case) -> None:
    """A layer's kernels, bytes and time by kind and phase; what it keeps; the copies from the host."""
    kept = count_step(replace(case, recompute=False), num_layers=LAYERS)
    recomputed = count_step(replace(case, recompute=True), num_layers=LAYERS)
    counters = {"forward": kept, "recomputation": recomputed, "backward": kept}
    print(f"One layer of {case.title}: kernels, GB loaded and stored, ms\n")
    print(f"| | {' | | | '.join(PHASES)} | | |\n|---|{'--:|' * 9}")
    rows: list[tuple[str, tuple[str, ...]]] = [(kind, (kind,)) for kind in get_args(Kind)]
    for name, kinds in [*rows, (f"all beside {' and '.join(APART)}", ()), ("all", get_args(Kind))]:
        sums = [layer_sum(counters[phase], LAYER, phase, *kinds) for phase in PHASES]
        if any(each.num_kernels for each in sums):
            print(f"| {name} | {' | '.join(map(_cells, sums))} |")
    times = [layer_sum(counters[phase], LAYER, phase, *get_args(Kind)).seconds for phase in PHASES]
    print(
        f"\nRecomputed, the layer takes {times[1] / (times[0] + times[2]):.0%} more. Kept for the backward without recomputation: "
        f"{kept.kept_bytes[LAYER] / case.tokens:,.0f} bytes a token, with it {recomputed.kept_bytes[LAYER] / case.tokens:,.0f}."
    )
    print(_transfers(recomputed))


def _cells(total: Sum) -> str:
    return (
        f"{total.num_kernels} | {total.num_bytes / 1e9:.2f} | {total.seconds * 1e3:.2f}" if total.num_kernels else "| |"
    )


def _transfers(counter: Counter) -> str:
    to_device = [each for each in counter.transfers if each.to_device]
    to_host = len(counter.transfers) - len(to_device)
    forward, again = (
        sum(each.place == LAYER and each.phase == phase for each in to_device) for phase in ("forward", "recomputation")
    )
    around = sum(not isinstance(each.place, int) for each in to_device)
    return (
        f"Copies from the host: {around} a micro-batch, {forward} in a layer's forward, {again} in its recomputation; "
        f"reads by the host, for which it waits: {to_host} a step."
    )


def print_steps(cases: Sequence[Case]) -> None:
    """The time of a step of each case, in parts, and the tokens per second that follow."""
    times = [step_time(case, count_step(case)) for case in cases]
    head = [f"{case.title}, {case.gpus} GPU{'s' if case.gpus > 1 else ''}" for case in cases]
    print(f"\nA step of one micro-batch per GPU, ms\n\n| | {' | '.join(head)} |\n|---|{'--:|' * len(cases)}")
    for part in PARTS:
        seconds = [time.parts.get(part, 0.0) for time in times]
        if any(seconds):
            _row(part, [f"{s * 1e3:,.1f}" for s in seconds])
    _row("layers recomputed", [f"{time.num_recomputed} of {time.num_layers}" for time in times])
    _row("forward + backward + update", [_sum(time) for time in times])
    _row("gathers, half in each direction", [f"{time.gather_s * 1e3:,.1f}" for time in times])
    _row("a step, where gathers overlap with kernels", [f"{time.step_s * 1e3:,.1f}" for time in times])
    rates_of = [case.tokens / time.step_s for case, time in zip(cases, times, strict=True)]
    _row("tokens/s per GPU", [f"{rate:,.0f}" for rate in rates_of])
    _row("tokens/s in all", [f"{rate * case.gpus:,.0f}" for case, rate in zip(cases, rates_of, strict=True)])


def _sum(time: StepTime) -> str:
    return f"{time.forward_s * 1e3:,.1f} + {time.backward_s * 1e3:,.1f} + {time.update_s * 1e3:,.1f}"


def _row(name: str, cells: Sequence[str]) -> None:
    print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Case()
    parser.add_argument("--model", choices=sorted(MEMBERS), default=default.model)
    parser.add_argument("--quant", choices=("none", "nf4", "int8"), default=default.quant)
    parser.add_argument(
        "--rank", type=int, default=default.rank, help="of the adapters, which are on all seven linears"
    )
    parser.add_argument("--sequences", type=int, default=default.sequences, help="of a micro-batch, one document each")
    parser.add_argument("--tokens", type=int, default=default.length, help="of a sequence")
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, default="auto", help="of the step; a layer is shown with and without"
    )
    parser.add_argument("--gpus", type=int, default=default.gpus, help="over which the base is sharded")
    parser.add_argument("--fused-kernels", choices=("auto", "none"), default=default.fused_kernels, help="of our own")
    given = parser.parse_args()
    case = Case(
        given.model, given.quant, given.rank, given.sequences, given.tokens, RECOMPUTE[given.recompute], given.gpus,
        given.fused_kernels,
    )  # fmt: skip
    try:
        print_layer(case)
        print_steps(GOALS if case == default else [case])
    except UnknownOperatorError as error:
        sys.exit(str(error))
    print(
        f"\nRates: products {rates.PRODUCT_FLOPS_PER_S / 1e12:.0f} TFLOP/s, attention {rates.ATTENTION_FLOPS_PER_S['forward'] / 1e12:.0f} forward and "
        f"{rates.ATTENTION_FLOPS_PER_S['backward'] / 1e12:.0f} backward, memory {rates.MEMORY_BYTES_PER_S / 1e12} TB/s, gathers {rates.GATHER_BYTES_PER_S / 1e9:.0f} GB/s."
    )


if __name__ == "__main__":
    main()
