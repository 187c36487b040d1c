"""Compares the plan with the simulated step, with what a real run on this machine allocates, and with its processes.

    bash launch/quickstart.sh        # once: SmolLM2-135M
    python -m bench.plan [--tensors] [--processes]
    python -m bench.plan --configs    # every file of configs/ on its machines: planned and simulated
    python -m bench.plan --zero3      # some of them with engine zero3

Planned: ``dist_lora.layout.memory``. Simulated: the real step on fake tensors. Tracked: the rank with the most memory
in a real gloo run, by the same tracker. Process: peak memory of a rank of ``dist-lora train``, next to that of a
process which has only loaded its data, plus the plan, plus a save's copy of the trained state.
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
# Memory of a rank without a model: the command loads its data and trains nothing.
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
# glibc's heap keeps freed blocks of up to 32 MiB; with these it returns blocks of 64 KiB or more, and is slower.
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def config_for(quant: str, parallel: dict[str, str], **train: Any) -> Config:
    """SmolLM2 in fp32."""
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
    """Planned, simulated and tracked bytes; whether the real run's collectives are as planned, to the byte."""
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
    """Print every shipped config's planned and simulated bytes per GPU, and whether its traffic is as planned."""
    started_s = time.monotonic()
    print("| config | machines | planned, GiB | simulated | difference | sent |\n|---|---|---|---|---|---|")
    groups = alike(presets().values())
    compared_all = []
    for name, machines, comparison in _configs(groups):
        sizes = f"{comparison.planned_bytes / GIB:.2f} | {comparison.simulated_bytes / GIB:.2f} | {comparison.off:+.2%}"
        sent = "as planned" if comparison.is_sent_as_planned else "otherwise"
        print(f"| {name} | {machines} | {sizes} | {sent} |", flush=True)
        compared_all.append(comparison)
    largest = max((comparison.off for comparison in compared_all), key=abs)
    same = sum(comparison.is_sent_as_planned for comparison in compared_all)
    print(
        f"\n{len(compared_all)} configs, {len(groups) + 1} of them distinct in bytes; largest difference "
        f"{largest:+.2%}; {same} send as planned: the same collectives and bytes, by the number of ranks; "
        f"{time.monotonic() - started_s:.0f} s"
    )


# One of each size, method and machine that shards a base.
BY_ZERO3 = (
    "3.2-1b-instruct_lora_2x24gb", "3.2-1b-instruct_lora_8x80gb", "3.1-8b-instruct_lora_2x24gb", "3.1-8b-instruct_lora_8x80gb",
    "3.1-8b-instruct_qlora_2x24gb", "3.1-70b-instruct_lora_8x80gb", "3.1-70b-instruct_qlora_8x80gb",
    "3.1-405b-instruct_qlora_8x80gb",
)  # fmt: skip


def table_of_zero3() -> None:
    """Print planned and simulated bytes per GPU with engine zero3."""
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
        comparison = beside(setup_of(config, preset.member.shape, **machines), simulated)
        print(
            f"| {name} | {comparison.planned_bytes / GIB:.2f} | {comparison.simulated_bytes / GIB:.2f} | {comparison.off:+.2%} |",
            flush=True,
        )


def _configs(groups: list[list[Preset]]) -> Iterator[tuple[str, str, Compared]]:
    for group in groups:
        for preset, comparison in compared(group):
            yield preset.name, str(preset.plan.machines), comparison
    yield "quickstart", "2 processes without a GPU", _quickstart()


def _quickstart() -> Compared:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    machines = {"num_nodes": 1, "gpus_per_node": 2, "device_bytes": DEVICE_BYTES}
    simulated = simulate(config, read_shape(MODEL), **machines, device="cpu")
    return beside(setup_of(config, read_shape(MODEL), **machines, on_gpu=False), simulated)


def table_of_processes() -> None:
    """Print the peak memory of the command's processes, next to its explanation."""
    print(
        "| base | ranks | planned, MiB | with imports, data and a save's copy | peak of a process | with glibc's default heap |"
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
                peak, default = train(path, nproc, RETURNS_MEMORY), train(path, nproc, {})
            print(
                f"| {quant} | {nproc} | {memory.device / MIB:.0f} | {explained / MIB:.0f} | "
                f"{peak / MIB:.0f} ({peak / explained - 1:+.1%}) | {default / MIB:.0f} |",
                flush=True,
            )


def config_file(config: Config, folder: Path) -> Path:
    """The config file of a run of three full steps, with its data."""
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
    """Peak bytes of a process that has only loaded its data."""
    command = [sys.executable, "-c", DRY_RUN, str(config)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **RETURNS_MEMORY}, capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout.splitlines()[-1])


def train(config: Path, nproc: int, settings: dict[str, str]) -> int:
    """Train with the command; returns the peak bytes of any rank."""
    command = [sys.executable, "-m", "dist_lora", "train", str(config), "--nproc", str(nproc)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, check=True)
    return max(json.loads((config.parent / "runs" / "it" / "summary.json").read_text())["peak_bytes"])


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="The plan compared with real runs.")
    parser.add_argument("--tensors", action="store_true", help="only planned, simulated and tracked tensors")
    parser.add_argument("--processes", action="store_true", help="only the processes' memory")
    parser.add_argument("--configs", action="store_true", help="every file of configs/, planned and simulated")
    parser.add_argument(
        "--zero3", action="store_true", help="some of configs/ with engine zero3, planned and simulated"
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
