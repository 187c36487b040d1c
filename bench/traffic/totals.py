"""Sums of counted kernels: of a layer by kind and phase, and of a step, as the tokens per second that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.traffic.counter import Counted, Counter, Phase
from bench.traffic.rates import GATHER_BYTES_PER_S, MEMORY_BYTES_PER_S, seconds_of
from bench.traffic.step import Case
from dist_lora.layout.setup import Setup
from dist_lora.plan.traffic import collectives_of

APART = ("frozen matmuls", "attention")  # what a layer must compute; all else is beside it


@dataclass(frozen=True)
class Sum:
    """Of some kernels."""

    num_kernels: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


def sum_of(counted: Iterable[Counted], which: Callable[[Counted], bool]) -> Sum:
    """The sum of those for which ``which`` is true."""
    chosen = [each for each in counted if which(each)]
    return Sum(
        len(chosen),
        sum(each.kernel.num_bytes for each in chosen),
        sum(seconds_of(each.kernel, each.phase) for each in chosen),
    )


def layer_sum(counter: Counter, layer: int, phase: Phase, *kinds: str) -> Sum:
    """Of a layer in a phase: the kernels of some kinds, or with no kinds those beside ``APART``."""

    def is_chosen(each: Counted) -> bool:
        kind = each.kernel.kind
        is_of_kind = kind in kinds if kinds else kind not in APART
        return each.place == layer and each.phase == phase and is_of_kind

    return sum_of(counter.kernels, is_chosen)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one micro-batch, in parts.

    With a sharded base the gathers run ahead of the layers that need them: the forward takes the longer of its kernels and its
    gathers, and so does the backward.

    Args:
        parts: the seconds of the kernels by what they are, which all add up to ``forward_s``, ``backward_s`` and ``update_s``.
        gather_s: of all that is received over the links; half of it in the forward, half in the backward.
    """

    parts: dict[str, float]
    forward_s: float
    backward_s: float
    update_s: float
    gather_s: float
    num_layers: int
    num_recomputed: int

    @property
    def step_s(self) -> float:
        """The whole."""
        wire = self.gather_s / 2
        return max(self.forward_s, wire) + max(self.backward_s, wire) + self.update_s


def step_time(case: Case, counter: Counter) -> StepTime:
    """The time of a case's counted step."""
    setup = case.setup()
    parts: dict[str, float] = {}
    forward_s = backward_s = update_s = 0.0
    for each in counter.kernels:
        seconds = seconds_of(each.kernel, each.phase)
        part = _part_of(each)
        parts[part] = parts.get(part, 0.0) + seconds
        if each.place == "update":
            update_s += seconds
        elif each.phase == "forward":
            forward_s += seconds
        else:
            backward_s += seconds
    copied_s = gather_copies_bytes(setup) / MEMORY_BYTES_PER_S
    parts["FSDP2's copies"] = copied_s
    received = sum(sent.received_bytes for sent in collectives_of(setup))
    return StepTime(
        parts,
        forward_s + copied_s / 2,
        backward_s + copied_s / 2,
        update_s,
        received / GATHER_BYTES_PER_S,
        num_layers=case.shape.num_layers,
        num_recomputed=len({each.place for each in counter.kernels if each.phase == "recomputation"}),
    )


def _part_of(each: Counted) -> str:
    if each.place == "update":
        return "optimizer"
    if not isinstance(each.place, int):
        return "embedding, head and loss"
    if each.phase == "recomputation":
        return "recomputation"
    return each.kernel.kind


def gather_copies_bytes(setup: Setup) -> int:
    """Bytes that FSDP2 (torch 2.13) moves around its all-gathers in a step.

    Each one loads this rank's shards and stores them in its buffer, and then loads the whole buffer and stores the parameters
    (``all_gather_copy_in`` and ``split_with_sizes_copy``).
    """
    return sum(
        2 * sent.count * (sent.num_bytes + sent.num_bytes // sent.num_ranks)
        for sent in collectives_of(setup)
        if sent.kind == "all-gather"
    )
