"""What a save costs: how long a training step waits for it, and its write and read speed compared with dd.

    bash launch/quickstart.sh                      # once: SmolLM2-135M and the quickstart's data
    python -m bench.saving stall [--rank 64] [--steps 24]
    python -m bench.saving disk DIR [--gib 2.5] [--ranks 2]

``stall`` trains SmolLM2-135M on two ranks. Of every three steps the first is followed by no save, the second by an
asynchronous one, the third by one that is waited for: all in one run, so that they share the same conditions.

``disk`` writes a checkpoint as large as the adapter and the moments of 70B at rank 16 from ``--ranks`` processes, reads
it with its checksums, and has dd write and read as many bytes (``conv=fsync``; the page cache is dropped before each
read if permitted).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dist_lora.checkpoint.manifest import TensorSpec, read_manifest
from dist_lora.checkpoint.read import load_pieces, verify
from dist_lora.checkpoint.write import save_checkpoint
from dist_lora.config.load import load_config
from dist_lora.engines.adapters import share_of
from dist_lora.lora.state import KINDS, Piece
from dist_lora.train.build import build, open_base
from dist_lora.train.command import loader_of, tokens_of
from dist_lora.train.loop import Run
from dist_lora.world.world import World
from tests.ranks import pool
from tests.ranks.pool import Ranks

ROOT = Path(__file__).parents[1]
MODES = ("no save", "an asynchronous save", "a save that is waited for")


def train_and_save(world: World, folder: str, rank: int, num_steps: int) -> list[tuple[str, float, float]]:
    """Per step: how it was saved, its seconds including waits, and the seconds of these spent waiting for saves."""
    overrides = [f"runs_dir={folder}", "run=bench", f"lora.rank={rank}", "data.eval=null", "log.trackers=[]"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides=overrides)
    base = open_base(config, world)
    tokens, _ = tokens_of(config, base, world)
    loader = loader_of(config, tokens, world)
    trainee = build(config, base, world)
    run = Run(config, trainee, loader=loader, held_out=None, num_steps=num_steps, folder=Path(folder), world=world)
    trainee.model.train()
    steps = []
    for step in range(1, num_steps + 1):
        world.agree(f"step {step}", None)
        mode = MODES[step % 3]
        started_s = time.monotonic()
        run.step.take(step)
        run.progress.step = step
        if mode != MODES[0]:
            run.save()
        if mode == MODES[2]:
            run.saver.wait()
        steps.append((mode, time.monotonic() - started_s, run.saver.take_times()["save_stall_s"]))
    run.saver.wait()
    return steps


def stall(*, rank: int, num_steps: int) -> None:
    """Print the table of ``stall``."""
    with tempfile.TemporaryDirectory() as folder, closing(Ranks(2)) as ranks:
        measured = ranks.run(train_and_save, folder, rank, num_steps)[0][3:]  # the first ones warm up
    plain_s = statistics.median(seconds for mode, seconds, _ in measured if mode == MODES[0])
    print(f"| SmolLM2-135M, rank {rank}, 2 ranks | step, s | waited for saves, share of a plain step |\n|---|---|---|")
    for mode in MODES:
        steps = [(seconds, waited) for m, seconds, waited in measured if m == mode]
        median_s, waited_s = (statistics.median(column) for column in zip(*steps, strict=True))
        print(f"| {mode} | {median_s:.2f} | {waited_s / plain_s:.1%} |")


def specs_of(num_bytes: int) -> list[TensorSpec]:
    """Trained tensors whose values and moments take about so many bytes."""
    width = 2**20
    return [TensorSpec(f"model.layers.{i}.lora_A", (16, width // 16)) for i in range(num_bytes // (12 * width))]


def write_share(world: World, folder: str, num_bytes: int) -> float:
    """Seconds of one save by all ranks."""
    specs = specs_of(num_bytes)
    share: dict[Piece, torch.Tensor] = {}
    for spec in specs:
        mine = share_of(spec.num_elements, world.world_rank, world.world_size)
        for kind in KINDS:
            share[Piece(spec.name, kind, mine.start, mine.stop)] = torch.randn(mine.stop - mine.start)
    world.agree("drawn", None)
    started_s = time.monotonic()
    save_checkpoint(
        Path(folder), step=1, share=share, specs=specs, world=world, progress={}, config="", base={}, adapter={}
    )
    return time.monotonic() - started_s


def read_share(world: World, folder: str) -> float:
    """Seconds in which each rank reads its part of the checkpoint."""
    path = Path(folder) / "step-00000001"
    manifest = read_manifest(path)
    wanted = []
    for spec in manifest.tensors:
        mine = share_of(spec.num_elements, world.world_rank, world.world_size)
        wanted += [Piece(spec.name, kind, mine.start, mine.stop) for kind in KINDS]
    world.agree("wanted", None)
    started_s = time.monotonic()
    load_pieces(path, manifest, wanted)
    world.agree("read", None)
    return time.monotonic() - started_s


def drop_cache() -> None:
    """Drop the page cache, so that the next read comes from the disk, if this process may."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache couldn't be dropped: reads come from memory", file=sys.stderr)


def timed(action: Callable[[], Any]) -> float:
    """Seconds of an action."""
    started_s = time.monotonic()
    action()
    return time.monotonic() - started_s


def disk(folder: Path, *, num_bytes: int, num_ranks: int) -> None:
    """Print the table of ``disk``."""
    folder.mkdir(parents=True, exist_ok=True)
    mib = num_bytes // 2**20
    rows = []
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # dd's source must not be read from a disk
    with (
        tempfile.TemporaryDirectory(dir=memory) as shm,
        tempfile.TemporaryDirectory(dir=folder) as name,
        closing(Ranks(num_ranks)) as ranks,
    ):
        work = Path(name)
        source, target = Path(shm) / "source", work / "target"
        subprocess.run(["dd", "if=/dev/urandom", f"of={source}", "bs=1M", f"count={mib}", "status=none"], check=True)

        def dd(*arguments: str) -> None:
            subprocess.run(["dd", *arguments, "bs=16M", "status=none"], check=True)

        for _ in range(3):
            target.unlink(missing_ok=True)
            dd_write_s = timed(lambda: dd(f"if={source}", f"of={target}", "conv=fsync"))
            drop_cache()
            dd_read_s = timed(lambda: dd(f"if={target}", "of=/dev/null"))
            write_s = max(ranks.run(write_share, name, num_bytes))
            drop_cache()
            verify_s = timed(lambda: verify(work / "step-00000001"))
            drop_cache()
            read_s = max(ranks.run(read_share, name))
            rows.append((dd_write_s, write_s, dd_read_s, verify_s, read_s))
    names = ("dd writes", "a save by all ranks", "dd reads", "checked by one process", "read by all ranks")
    print(f"| {num_bytes / 2**30:.1f} GiB, {num_ranks} ranks | s | GB/s |\n|---|---|---|")
    for row, seconds in zip(names, (statistics.median(column) for column in zip(*rows, strict=True)), strict=True):
        print(f"| {row} | {seconds:.2f} | {num_bytes / 1e9 / seconds:.2f} |")
    print(json.dumps([[round(value, 2) for value in values] for values in rows]), file=sys.stderr)


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="What a save costs.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_stall = kinds.add_parser("stall")
    of_stall.add_argument("--rank", type=int, default=64)
    of_stall.add_argument("--steps", type=int, default=24)
    of_disk = kinds.add_parser("disk")
    of_disk.add_argument("folder", type=Path)
    of_disk.add_argument("--gib", type=float, default=2.5)
    of_disk.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    pool.TIMEOUT_S = 3600
    if given.kind == "stall":
        stall(rank=given.rank, num_steps=given.steps)
    else:
        disk(given.folder, num_bytes=int(given.gib * 2**30), num_ranks=given.ranks)


if __name__ == "__main__":
    main()
