"""Engine ``zero3``: DeepSpeed ZeRO-3 behind the same promise as ``fsdp2``."""

from __future__ import annotations

from dist_lora.parallel.engine import SingleProcess


class Zero3(SingleProcess):
    """ZeRO-3."""

    name = "zero3"
