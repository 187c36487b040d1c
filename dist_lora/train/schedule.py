"""The learning rate of each step."""

from __future__ import annotations

import math

from dist_lora.config.schema import OptimSection


def lr_at(step: int, *, section: OptimSection, num_steps: int) -> float:
    """The learning rate of ``step`` (1 is the first), a pure function: it has no state to save.

    It rises linearly over ``warmup_steps``, reaching ``lr`` at the last of them, then stays constant, or falls linearly
    or along half a cosine to 0 one step after the last: the last step still learns.
    """
    if step <= section.warmup_steps:
        return section.peak_lr * step / section.warmup_steps
    if section.schedule == "constant":
        return section.peak_lr
    done = (step - section.warmup_steps - 1) / max(1, num_steps - section.warmup_steps)
    done = min(1.0, done)
    return section.peak_lr * ((1 - done) if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
