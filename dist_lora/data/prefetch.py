"""Micro-batches on the device that computes, each copied there while the one before it is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch

from dist_lora.data.loader import MicroBatch


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The micro-batches in turn, with their tensors on ``device``: on the CPU themselves, at no cost.

    On a GPU each is copied on a stream of its own as soon as the work of the one before it is enqueued, for which it doesn't wait.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = _copy_stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch.to(device)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        # All its tensors are parts of one storage, which must not be reused before the computation has read it.
        copied.ids.record_stream(computing)
        yield copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
