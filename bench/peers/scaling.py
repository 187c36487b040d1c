"""How a step of ours grows with each number of a run, beside the formula of its operations."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.contestant import Contestant, in_turn, median
from bench.peers.environment import ROOT
from bench.peers.turns import Job, read_batches
from bench.peers.work import Work
from dist_lora.config.load import load_config
from dist_lora.herd.shape import Shape

if TYPE_CHECKING:
    from bench.peers.__main__ import Settings

SMALL = Work(batch=1, lora_rank=8, layers=8)
LARGER = {
    "rank 8 to 64": replace(SMALL, lora_rank=64),
    "layers 8 to 30": replace(SMALL, layers=None),
    "tokens 512 to 8,192, one document": replace(SMALL, tokens=8192),
    "tokens 512 to 8,192, 16 documents": replace(SMALL, batch=16),
    "ranks 1 to 4, 512 tokens on each": replace(SMALL, batch=4, ranks=4, base_shard="node"),
}


def flops_of(job: Job) -> float:
    """Operations that a step of the job's first batch needs; see ``Shape.flops``."""
    shape = Shape.from_config(json.loads((Path(job.model) / "config.json").read_text()), where=job.model)
    lengths = [len(ids) for ids, _ in read_batches(job)[0]]
    return shape.flops(
        tokens=sum(lengths),
        rows=sum(lengths) - len(lengths),
        pairs=sum(length * (length + 1) // 2 for length in lengths),
        trained_weights=shape.trained_weights(load_config(Path(job.config)).lora),
    )


def scaling(settings: Settings) -> list[str]:
    """A table of its own: each larger run in turn with the small one."""
    lines = ["", "| from 8 layers, rank 8, 512 tokens, 1 rank | operations | processor time |", "|---|---|---|"]
    for title, larger in LARGER.items():
        with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name, ExitStack() as running:
            pair, flops = [], []
            for work, folder in ((SMALL, "small"), (larger, "larger")):
                job = work.prepare(gsm8k=settings.gsm8k, model=settings.model, folder=Path(name) / folder)
                pair.append(running.enter_context(Contestant("ours", job, work.ranks, settings.threads)))
                flops.append(flops_of(job))
            in_turn(pair, settings.turns, limit_s=settings.limit_s)
            times = median(pair[1], "cpu_s") / median(pair[0], "cpu_s")
            lines.append(f"| {title} | x {flops[1] / flops[0]:.2f} | x {times:.2f} |")
    return lines
