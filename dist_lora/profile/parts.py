"""Marks in the code by which a profile tells the parts of a step apart. They cost a function call while none is made."""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import torch

Part = Literal[
    "frozen matmuls",
    "dequantizing",
    "LoRA",
    "weight gradients",
    "attention",
    "elementwise",
    "loss",
    "communication",
    "optimizer",
    "data",
    "host",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""In the order of the table. ``host``: Python, and waiting for other ranks or for the device."""

PREFIX = "part: "
LAYER = "layer"
"""A layer's forward; within a backward it is a recomputation."""
STEP = "training step"

_NOTHING = contextlib.nullcontext()


def mark(name: Part) -> contextlib.AbstractContextManager[object]:
    """What runs in this context belongs to that part of a step, and so does its backward."""
    return _named(PREFIX + name)


def layer() -> contextlib.AbstractContextManager[object]:
    """What runs in this context is the forward of a layer."""
    return _named(LAYER)


def step() -> contextlib.AbstractContextManager[object]:
    """What runs in this context is the step."""
    return _named(STEP)


def _named(name: str) -> contextlib.AbstractContextManager[object]:
    if not torch.autograd._profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(name)
