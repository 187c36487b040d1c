"""The base sharded over each node versus over all nodes, on two hosts, with a fast link between them and a slow one.

    bash launch/quickstart.sh        # once: SmolLM2-135M
    python -m bench.hosts [--rate 100mbit] [--steps 3]

The hosts are network namespaces of this machine (so it needs root), with one rank each. The step time is the median of
the steps after the first, from metrics.jsonl; the bytes that a host sends are counted by its interface.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from dist_lora.config.schema import Config
from dist_lora.herd.shape import read_shape
from dist_lora.layout.memory import setup_of
from dist_lora.plan.traffic import received_bytes
from tests.e2e.runs import INJECT, ROOT
from tests.hosts.network import Hosts, Ranks, lacking

MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
TIMEOUT_S = 1800.0


def settings_for(quant: str, base_shard: str, *, num_steps: int, folder: Path) -> dict[str, Any]:
    """SmolLM2 in fp32, two sequences of 256 tokens per rank and step."""
    return {
        "run": f"{quant}-{base_shard}",
        "runs_dir": str(folder / "runs"),
        "model": {"name": str(MODEL), "quant": quant, "dtype": "fp32"},
        "lora": {"rank": 16},
        "data": {"train": str(folder / "data.jsonl"), "cache_dir": str(folder / "cache"), "untrained_tokens": "allow"},
        "train": {"steps": num_steps, "global_batch": 4, "micro_batch": 2, "sequence_length": 256, "activation_checkpointing": False},
        "parallel": {"base_shard": base_shard},
        "checkpoint": {"every": 1000, "save_at_start": False},
        "log": {"trackers": []},
    }  # fmt: skip


def measure(hosts: Hosts, settings: dict[str, Any], *, port: int, folder: Path) -> tuple[float, float]:
    """Seconds per step, and the bytes that the first host sends per step."""
    name = f"{settings['run']}-{port}"
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings | {"run": name}))
    noted = folder / name
    noted.mkdir()
    environment = {
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{INJECT}:{ROOT}", "NOTED": str(noted), "DIST_LORA_FAULT": "bytes_of_the_network_told",
    }  # fmt: skip
    command = [sys.executable, "-m", "dist_lora", "train", config]
    with closing(Ranks(hosts, command, on_each=1, port=port, folder=folder, environment=environment)) as ranks:
        codes = ranks.wait(TIMEOUT_S)
        if set(codes) != {0}:
            sys.exit("\n".join(ranks.told()))
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    counts = [int(line.split()[1]) for line in (noted / "rank-0").read_text().splitlines()]
    sent = [after - before for before, after in zip(counts[1:], counts[2:], strict=False)]
    return median(line["step_s"] for line in lines[1:]), median(sent)


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Node-sharded versus world-sharded, on fast and slow links.")
    parser.add_argument("--rate", default="100mbit", help="of the slow link, in tc's units")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    if lacking():
        sys.exit(lacking())
    with tempfile.TemporaryDirectory() as name, closing(Hosts(2)) as hosts:
        folder = Path(name)
        (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 256}) + "\n" for i in range(64)))
        seconds: dict[tuple[str, str, str], float] = {}
        port = 29500
        print(
            f"| base | base_shard | a host sends per step, MB (planned) | step, fast link | step, {given.rate} |\n|---|---|---|---|---|"
        )
        for quant in ("none", "nf4"):
            for base_shard in ("node", "world"):
                settings = settings_for(quant, base_shard, num_steps=given.steps, folder=folder)
                setup = setup_of(
                    Config.model_validate(settings), read_shape(MODEL), num_nodes=2, gpus_per_node=1, device_bytes=2**34, on_gpu=False
                )  # fmt: skip
                sent = 0.0
                for link in ("fast", "slow"):
                    if link == "slow":
                        for host in range(2):
                            hosts.slow(host, given.rate)
                    port += 1
                    seconds[quant, base_shard, link], sent = measure(hosts, settings, port=port, folder=folder)
                    if link == "slow":
                        for host in range(2):
                            hosts.fast(host)
                print(
                    f"| {quant} | {base_shard} | {sent / 1e6:.1f} ({received_bytes(setup)[1] / 1e6:.1f}) "
                    f"| {seconds[quant, base_shard, 'fast']:.2f} s | {seconds[quant, base_shard, 'slow']:.2f} s |",
                    flush=True,
                )
        for quant in ("none", "nf4"):
            ratio = seconds[quant, "world", "slow"] / seconds[quant, "node", "slow"]
            print(f"\n{quant}: over the slow link, sharding over each node is {ratio:.1f} times as fast per step")


if __name__ == "__main__":
    main()
