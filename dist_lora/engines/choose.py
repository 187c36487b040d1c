"""Makes the engine that a layout names; only that engine's library is imported."""

from __future__ import annotations

from dist_lora.engines.engine import Engine
from dist_lora.engines.single import Single
from dist_lora.layout.choices import Layout
from dist_lora.world.world import World


def make_engine(layout: Layout, world: World) -> Engine:
    """An engine of the kind that a layout names."""
    if layout.base_shard == "gpu":
        from dist_lora.engines.replicated import Replicated

        return Replicated(world, layout)
    if layout.engine == "fsdp2":
        from dist_lora.engines.fsdp2 import Fsdp2

        return Fsdp2(world, layout)
    if layout.engine == "zero3":
        from dist_lora.engines.zero3 import Zero3

        return Zero3(world, layout)
    return Single(world, layout)
