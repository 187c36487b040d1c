"""Names under which the ranks leave things for each other: one for each save, never used again."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_lora.world.world import World

_counts: dict[tuple[int, str], int] = {}


def fresh_key(world: World, what: str) -> str:
    """A key of the store for ``what`` that was not used before: all ranks ask as often and get the same."""
    counter = (id(world), what)
    if counter not in _counts:
        weakref.finalize(world, _counts.pop, counter, None)
    _counts[counter] = _counts.get(counter, 0) + 1
    return f"checkpoint/{what}/{_counts[counter]}"
