"""The engine that a layout names; only that one's library is imported."""

from __future__ import annotations

from dist_lora.parallel.engine import SingleProcess
from dist_lora.parallel.world import World
from dist_lora.plan.layout import Layout


def make_engine(layout: Layout, world: World) -> SingleProcess:
    """The engine that a layout names."""
    if layout.engine == "fsdp2":
        from dist_lora.parallel.fsdp2 import Fsdp2

        return Fsdp2(world, layout)
    if layout.engine == "zero3":
        from dist_lora.parallel.zero3 import Zero3

        return Zero3(world, layout)
    return SingleProcess(world, layout)
