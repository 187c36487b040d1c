"""Micro-batches on the device that computes, each copied there while it computes what came before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import torch

from dist_lora.data.loader import Loader, MicroBatch, StepBatch


class StepsAhead:
    """The batches of a run's steps, the next one made while the device computes.

    A batch is a pure function of its step, so one that is made and never trained on leaves no trace in the loader.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._made: tuple[int, StepBatch] | None = None

    def prepare(self, step: int) -> None:
        """Make the batch of a step (from 0) in pinned memory, and begin to copy its first micro-batch.

        Call it once all work of the step before it is enqueued. On the CPU it does nothing: there the work is done by then.
        """
        if self._device.type == "cpu":
            return
        batch = self._loader.batch(step)
        is_pinned = self._device.type == "cuda"
        first, *others = (micro.unpacked(micro.packed(is_pinned=is_pinned)) for micro in batch.micro_batches)
        self._made = step, replace(batch, micro_batches=(_send(first, self._device), *others))

    def take(self, step: int) -> StepBatch:
        """The batch of a step (from 0), whether it was prepared or not; its micro-batches are for ``on_device``."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] == step else self._loader.batch(step)


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches in turn, with their tensors on ``device``: on the CPU themselves, at no cost.

    On a GPU each is copied on a stream of its own as soon as the work of the one before it is enqueued, for which it doesn't wait.
    """
    for batch in batches:
        copied = _send(batch, device)
        if device.type == "cuda":
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(_copy_stream(device))
            # All its tensors are parts of one storage, which must not be reused before the computation has read it.
            copied.ids.record_stream(computing)
        yield copied


def _send(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on ``device``; on a GPU only once the stream of the copies has come so far."""
    if device.type != "cuda":
        return batch.to(device)
    with torch.cuda.stream(_copy_stream(device)):
        return batch.to(device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
