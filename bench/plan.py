"""The plan beside the simulated step, beside what a real run on this machine allocates, beside what its process takes.

    bash launch/quickstart.sh        # once: SmolLM2-135M
    python -m bench.plan [--tensors] [--processes]
    python -m bench.plan --configs    # every file of configs/ on its machines: planned beside simulated
    python -m bench.plan --zero3      # some of them by engine zero3

Planned: ``dist_lora.layout.memory``. Simulated: the real step on fake tensors. Tracked: the fullest rank of a real gloo
run, by the same tracker. Process: the most that a rank of ``dist-lora train`` has held, beside what one has held that came as
far as to its data, plus the plan, plus a save's copy of what is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from dist_lora.config.load import load_config
from dist_lora.config.schema import Config
from dist_lora.herd.shape import read_shape
from dist_lora.layout.memory import memory_of, setup_of
from dist_lora.plan.presets import Preset, presets
from dist_lora.simulation.simulate import simulate
from dist_lora.text import GIB
from tests.pretend.shipped import Compared, alike, beside, compared, planned_traffic, simulated_traffic
from tests.ranks import pool
from tests.ranks.pool import Ranks
from tests.ranks.test_tracker import WORLDS, tracked_step

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
MIB = 2**20
DEVICE_BYTES = 8 * 2**30
# What a rank holds without a model: the command looks at its data and trains nothing.
DRY_RUN = """
import sys
from dist_lora.cli import app
try:
    app(["train", sys.argv[1], "--dry-run", "--nproc", "1"], standalone_mode=False)
except SystemExit:
    pass
print()
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
"""
# glibc's heap keeps blocks of up to 32 MiB that were freed; by these it gives back what is 64 KiB or more, and is slower.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def config_for(quant: str, parallel: dict[str, str], **train: Any) -> Config:
    """SmolLM2 in fp32, as on this machine."""
    return Config.model_validate(
        {
            "run": "it",
            "model": {"name": str(MODEL), "quant": quant, "dtype": "fp32"},
            "data": {"train": "unused"},
            "train": {"sequence_length": 256, "micro_batch": 2, "global_batch": 8, "steps": 9, **train},
            "parallel": parallel,
        }
    )


def compare(ranks: Ranks, config: Config, world: str) -> tuple[int, int, int, str]:
    """Planned, simulated and tracked bytes; how the collectives of the real run compare, to the byte."""
    size, node_size = WORLDS[world]
    shape = read_shape(MODEL)
    machines = {"num_nodes": size // node_size, "gpus_per_node": node_size, "device_bytes": DEVICE_BYTES}
    setup = setup_of(config, shape, **machines, on_gpu=False)
    simulated = simulate(config, shape, **machines, device="cpu")
    seen = ranks.run(tracked_step, config, node_size=node_size)
    sent = "otherwise"
    if Counter(simulated.traffic) == Counter(seen[0].traffic):
        sent = "as simulated"
        if planned_traffic(setup) == simulated_traffic(simulated):
            sent = "as planned"
    return memory_of(setup).device, simulated.peak_bytes, max(s.memory.peak.total_bytes for s in seen), sent


FSDP2_KEPT = ({"engine": "fsdp2", "adapters": "replicate"}, False)
FSDP2 = ({"engine": "fsdp2", "adapters": "shard"}, True)
ALONE = [({"engine": "none"}, is_again) for is_again in (False, True)]
ZERO3 = ({"engine": "zero3"}, True)
WAYS = {"1": ALONE, "2": [FSDP2_KEPT, FSDP2, ZERO3], "2 x 2": [FSDP2]}  # and whether activations are recomputed


def table_of_tensors(worlds: list[str]) -> None:
    """Print planned, simulated and tracked."""
    print("| engine | base | adapters | activations | ranks | planned, MiB | simulated | tracked | sent |")
    print("|---|---|---|---|---|---|---|---|---|")
    for world in worlds:
        with closing(Ranks(WORLDS[world][0])) as ranks:
            for quant in ("none", "nf4", "int8"):
                for parallel, again in WAYS[world]:
                    config = config_for(quant, parallel, activation_checkpointing=again)
                    planned, simulated, tracked, sent = compare(ranks, config, world)
                    off = [f"{value / MIB:.1f} ({value / planned - 1:+.2%})" for value in (simulated, tracked)]
                    way = f"{parallel['engine']} | {quant} | {parallel.get('adapters', '-')}"
                    kept = "recomputed" if again else "kept"
                    print(
                        f"| {way} | {kept} | {world} | {planned / MIB:.1f} | {off[0]} | {off[1]} | {sent} |", flush=True
                    )


def table_of_configs() -> None:
    """Print every shipped config's planned and simulated bytes of a GPU, and whether it sends what is planned."""
    started_s = time.monotonic()
    print("| config | machines | planned, GiB | simulated | difference | sent |\n|---|---|---|---|---|---|")
    groups = alike(presets().values())
    compared_all = []
    for name, machines, found in _configs(groups):
        sizes = f"{found.planned_bytes / GIB:.2f} | {found.simulated_bytes / GIB:.2f} | {found.off:+.2%}"
        sent = "as planned" if found.is_sent_as_planned else "otherwise"
        print(f"| {name} | {machines} | {sizes} | {sent} |", flush=True)
        compared_all.append(found)
    largest = max((found.off for found in compared_all), key=abs)
    same = sum(found.is_sent_as_planned for found in compared_all)
    print(
        f"\n{len(compared_all)} configs, {len(groups) + 1} of them of other bytes than all others; largest difference "
        f"{largest:+.2%}; {same} send what is planned: as many collectives and bytes, by the number of ranks; "
        f"{time.monotonic() - started_s:.0f} s"
    )


# One of each size, method and machine by whose GPUs a base is cut.
BY_ZERO3 = (
    "3.2-1b-instruct_lora_2x24gb", "3.2-1b-instruct_lora_8x80gb", "3.1-8b-instruct_lora_2x24gb", "3.1-8b-instruct_lora_8x80gb",
    "3.1-8b-instruct_qlora_2x24gb", "3.1-70b-instruct_lora_8x80gb", "3.1-70b-instruct_qlora_8x80gb",
    "3.1-405b-instruct_qlora_8x80gb",
)  # fmt: skip


def table_of_zero3() -> None:
    """Print planned and simulated bytes of a GPU with engine zero3."""
    print("| config, with parallel.engine=zero3 | planned, GiB | simulated | difference |\n|---|---|---|---|")
    for name in BY_ZERO3:
        preset = presets()[name]
        parallel = {"engine": "zero3", "offload": preset.config.parallel.offload}
        config = Config.model_validate(preset.config.model_dump() | {"parallel": parallel})
        machine = preset.machine
        machines = {
            "num_nodes": machine.num_nodes, "gpus_per_node": machine.gpus_per_node, "device_bytes": machine.gpu.memory_bytes,
        }  # fmt: skip
        simulated = simulate(config, preset.member.shape, **machines)
        found = beside(setup_of(config, preset.member.shape, **machines), simulated)
        print(
            f"| {name} | {found.planned_bytes / GIB:.2f} | {found.simulated_bytes / GIB:.2f} | {found.off:+.2%} |",
            flush=True,
        )


def _configs(groups: list[list[Preset]]) -> Iterator[tuple[str, str, Compared]]:
    for group in groups:
        for preset, found in compared(group):
            yield preset.name, str(preset.plan.machines), found
    yield "quickstart", "2 processes without a GPU", _quickstart()


def _quickstart() -> Compared:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    machines = {"num_nodes": 1, "gpus_per_node": 2, "device_bytes": DEVICE_BYTES}
    simulated = simulate(config, read_shape(MODEL), **machines, device="cpu")
    return beside(setup_of(config, read_shape(MODEL), **machines, on_gpu=False), simulated)


def table_of_processes() -> None:
    """Print what processes of the command take, beside what explains it."""
    print(
        "| base | ranks | planned, MiB | with imports, data and a save's copy | most of a process | with glibc's usual heap |"
    )
    print("|---|---|---|---|---|---|")
    for quant in ("none", "nf4", "int8"):
        for nproc in (1, 2):
            config = config_for(quant, {"adapters": "replicate"})
            setup = setup_of(
                config, read_shape(MODEL), num_nodes=1, gpus_per_node=nproc, device_bytes=DEVICE_BYTES, on_gpu=False
            )
            memory = memory_of(setup)
            with tempfile.TemporaryDirectory() as name:
                path = config_file(config, Path(name))
                explained = imported(path) + memory.device + memory.host
                found, usual = train(path, nproc, GIVES_BACK), train(path, nproc, {})
            print(
                f"| {quant} | {nproc} | {memory.device / MIB:.0f} | {explained / MIB:.0f} | "
                f"{found / MIB:.0f} ({found / explained - 1:+.1%}) | {usual / MIB:.0f} |",
                flush=True,
            )


def config_file(config: Config, folder: Path) -> Path:
    """The file of a run of three full steps, with its data."""
    tokens = config.train.sequence_length
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i} " * tokens}) + "\n" for i in range(64)))
    tree = config.model_dump(mode="json")
    tree["data"] |= {
        "train": str(folder / "data.jsonl"),
        "cache_dir": str(folder / "cache"),
        "untrained_tokens": "allow",
    }
    tree["train"] |= {"steps": 3}
    tree["checkpoint"] |= {"resume": "never"}
    tree |= {"runs_dir": str(folder / "runs"), "log": {"trackers": []}}
    (folder / "it.yaml").write_text(json.dumps(tree))
    return folder / "it.yaml"


def imported(config: Path) -> int:
    """The most bytes of a process that has come as far as to its data."""
    command = [sys.executable, "-c", DRY_RUN, str(config)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **GIVES_BACK}, capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout.splitlines()[-1])


def train(config: Path, nproc: int, settings: dict[str, str]) -> int:
    """Train by the command; the most bytes that a rank has held."""
    command = [sys.executable, "-m", "dist_lora", "train", str(config), "--nproc", str(nproc)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, check=True)
    return max(json.loads((config.parent / "runs" / "it" / "summary.json").read_text())["peak_bytes"])


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="The plan beside what is.")
    parser.add_argument("--tensors", action="store_true", help="planned, simulated and tracked tensors alone")
    parser.add_argument("--processes", action="store_true", help="what processes take alone")
    parser.add_argument("--configs", action="store_true", help="every file of configs/, planned beside simulated")
    parser.add_argument(
        "--zero3", action="store_true", help="some of configs/ by engine zero3, planned beside simulated"
    )
    given = parser.parse_args()
    if given.zero3:
        table_of_zero3()
        return
    if given.configs:
        table_of_configs()
        return
    if given.tensors or not given.processes:
        pool.TIMEOUT_S = 600
        table_of_tensors(list(WORLDS))
        print()
    if given.processes or not given.tensors:
        table_of_processes()


if __name__ == "__main__":
    main()
