"""One rank of many loads its share of a base for real: seconds, bytes read, and the most memory it held.

    python -m bench.share FOLDER --ranks 128 [--rank 0] [--quant nf4]

The other ranks are simulated (a fake process group), so that one machine shows what each of 128 does. The folder may be
one of holes, as bench/sparse.py makes it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lora.base.index import open_index
from dist_lora.base.llama import build_on_meta
from dist_lora.base.quant.formats import format_of
from dist_lora.base.stream import SLICE_BYTES, fill_slots
from dist_lora.config.schema import ParallelSection
from dist_lora.engines.choose import make_engine
from dist_lora.herd.shape import read_shape
from dist_lora.layout.choices import choose_layout
from dist_lora.train.meter import peak_bytes
from dist_lora.world.world import World


def load_share(folder: Path, *, num_ranks: int, rank: int, quant: str, dtype: torch.dtype) -> dict[str, Any]:
    """What loading a rank's share took. Leaves a fake process group behind: call it once in a process."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    world = World(rank, num_ranks, rank % 8, 8, torch.device("cpu"))
    shape, index = read_shape(folder), open_index(folder)
    index.expect(shape.tensor_shapes())
    fmt = format_of(quant, dtype)
    before = peak_bytes(world.device)
    model = build_on_meta(shape, dtype=dtype, fmt=fmt)
    whole = sum(p.numel() * p.element_size() for p in model.base_parameters().values())
    layout = choose_layout(
        ParallelSection(engine="fsdp2", base_shard="world"),
        world_size=num_ranks,
        local_size=8,
        base_bytes=whole,
        trained_weights=0,
        device_bytes=0,
    )
    engine = make_engine(layout, world)
    engine.shard(model)
    engine.materialize(model)
    slots = engine.slots(model)
    started_s = time.monotonic()
    report = fill_slots(slots, index=index, formats=model.formats())
    return {
        "ranks": num_ranks,
        "rank": rank,
        "quant": quant,
        "base_bytes": whole,
        "share_bytes": sum(slot.destination.nbytes for slot in slots),
        "bytes_read": report.bytes_read,
        "disk_bytes": index.num_bytes,
        "slice_bytes": SLICE_BYTES,
        "seconds": round(time.monotonic() - started_s, 1),
        "peak_growth_bytes": peak_bytes(world.device) - before,
    }


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="One rank of many loads its share of a base.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--quant", choices=("none", "nf4", "int8"), default="nf4")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is not quantized")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[given.dtype]
    result = load_share(given.folder, num_ranks=given.ranks, rank=given.rank, quant=given.quant, dtype=dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
