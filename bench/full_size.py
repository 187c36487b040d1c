"""Trains one step of a full-size model on this machine: peak memory and seconds, next to the memory model's bytes.

    python -m bench.sparse 3.1-8b --out DIR --random
    python -m bench.full_size DIR [--nproc 2] [--quant nf4] [--tokens 64]

Each rank trains on one sequence of ``--tokens`` tokens. Without ``--random`` above the weights are zeros, which costs
the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dist_lora.config.schema import Config
from dist_lora.herd.shape import read_shape
from dist_lora.layout.memory import memory_of, setup_of
from dist_lora.layout.setup import Setup, embedding_bytes

ROOT = Path(__file__).parents[1]
GIB = 2**30


def imported_bytes() -> int:
    """Memory of a process that has only done a rank's imports."""
    program = (
        "import dist_lora.train.command, dist_lora.engines.fsdp2, dist_lora.supervision.run_rank, transformers\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def setup_for(folder: Path, *, nproc: int, quant: str, tokens: int) -> Setup:
    """The run, as the plan sees it."""
    config = Config.model_validate(
        {
            "run": "full-size",
            "model": {"name": str(folder), "quant": quant, "dtype": "fp32"},
            "data": {"train": "unused"},
            "train": {
                "steps": 1,
                "global_batch": nproc,
                "micro_batch": 1,
                "sequence_length": tokens,
                "activation_checkpointing": True,
            },
        }
    )
    return setup_of(config, read_shape(folder), num_nodes=1, gpus_per_node=nproc, device_bytes=12 * GIB, on_gpu=False)


def run(folder: Path, work: Path, *, nproc: int, quant: str, tokens: int) -> dict[str, float]:
    """The step's line of metrics, and the seconds that loading took."""
    text = "x" * (tokens - 2)  # with a token at the beginning and one at the end
    (work / "data.jsonl").write_text("".join(json.dumps({"text": f"{text[:-2]}{i:02}"}) + "\n" for i in range(nproc)))
    config = {
        "run": "full-size",
        "runs_dir": str(work / "runs"),
        "model": {"name": str(folder), "quant": quant, "dtype": "fp32"},
        "data": {"train": str(work / "data.jsonl"), "cache_dir": str(work / "cache"), "untrained_tokens": "allow"},
        "train": {
            "steps": 1,
            "global_batch": nproc,
            "micro_batch": 1,
            "sequence_length": tokens,
            "packing": False,
            "activation_checkpointing": True,
        },
        "optim": {"warmup_steps": 0},
        "log": {"trackers": []},
    }
    (work / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "dist_lora", "train", str(work / "config.yaml"), "--nproc", str(nproc)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    done.check_returncode()
    loaded = next(line for line in done.stderr.splitlines() if line.startswith("loaded base"))
    line = json.loads((work / "runs" / "full-size" / "metrics.jsonl").read_text())
    summary = json.loads((work / "runs" / "full-size" / "summary.json").read_text())
    return {
        "load_s": float(loaded.rsplit(" in ", 1)[1].removesuffix(" s")),
        "step_s": line["step_s"],
        "loss": line["loss"],
        "peak_bytes": max(summary["peak_bytes"]),
    }


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Trains one step of a model of full size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--quant", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    setup = setup_for(given.folder, nproc=given.nproc, quant=given.quant, tokens=given.tokens)
    memory = memory_of(setup)
    with tempfile.TemporaryDirectory() as work:
        measured = run(given.folder, Path(work), nproc=given.nproc, quant=given.quant, tokens=given.tokens)
    parts = {
        "its shard of the base": memory.base,
        "adapters, gradients, AdamW": memory.adapters + memory.gradients + memory.optimizer,
        "all-gathered base weights": memory.gathered,
        "activations and logits": memory.activations + memory.loss + memory.workspace,
        "a save's copy of the trained state": memory.host,
        "gloo's own buffer for an all-gather": embedding_bytes(setup),  # NCCL has none
        "imports": imported_bytes(),
    }
    for name, num_bytes in parts.items():
        print(f"{name:40} {num_bytes / GIB:6.2f} GiB computed")
    print(f"{'total, ' + memory.when:40} {sum(parts.values()) / GIB:6.2f} GiB")
    print(f"{'peak of a rank (whole process)':40} {measured['peak_bytes'] / GIB:6.2f} GiB measured")
    print(f"{'loading':40} {measured['load_s']:6.1f} s")
    print(f"{'the step':40} {measured['step_s']:6.1f} s, loss {measured['loss']:.4f}")


if __name__ == "__main__":
    main()
