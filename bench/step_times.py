"""Compares the plan's range of a step's time, from a measurement of this machine just before, with a real run's steps.

    bash launch/quickstart.sh        # once: SmolLM2-135M
    python -m bench.step_times [--only 3 4 5] [--json FILE]

For each shape: ``dist-lora doctor --out`` measures the machine with as many ranks as the run has, ``dist-lora train``
trains, and the doctor measures again; ``dist-lora plan --measured`` predicts from both, and the median of the steps
after the first two is compared with the union of both ranges. If the machine was busy, so that the two predictions
differ (by more than ``STEADY``), all three are repeated, up to ``TRIES`` times; the measured steps have no influence on
that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.conftest import save_byte_tokenizer

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / ".cache" / "smollm2-135m-instruct"
STEPS, WARM = 7, 2
STEADY, TRIES = 1.25, 6


@dataclass(frozen=True)
class Shape:
    """A run to predict: the model, its base, the number of ranks, and the batch."""

    title: str
    is_wide: bool
    quant: str
    ranks: int
    micro_batch: int
    sequence_length: int
    passes: int
    recompute: bool


SHAPES = (
    Shape("SmolLM2-135M", False, "none", 1, 2, 256, 1, False),
    Shape("SmolLM2-135M", False, "nf4", 1, 1, 256, 2, True),
    Shape("SmolLM2-135M", False, "none", 2, 2, 256, 1, False),
    Shape("SmolLM2-135M", False, "int8", 2, 1, 512, 1, True),
    Shape("4 layers of width 2048", True, "nf4", 2, 1, 512, 1, False),
)


@dataclass(frozen=True)
class Row:
    """What was predicted, and what was measured."""

    shape: Shape
    predicted_s: tuple[float, float]
    measured_s: float
    is_steady: bool

    @property
    def is_inside(self) -> bool:
        """Whether the range contains the median step."""
        return self.predicted_s[0] <= self.measured_s <= self.predicted_s[1]


def save_wide(folder: Path) -> None:
    """A Llama of few, wide layers (3.2-1B's), with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=512, tie_word_embeddings=True, bos_token_id=256, eos_token_id=[257, 260], pad_token_id=262,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)


def dist_lora(*arguments: object) -> str:
    """What a command prints; its errors go to the terminal."""
    command = [sys.executable, "-m", "dist_lora", *map(str, arguments)]
    # One thread per rank: several that wait for each other are slowed down far more by other load.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def config_of(shape: Shape, model: Path, folder: Path) -> Path:
    """The run's config and its data, every sequence full."""
    folder.mkdir()
    tokens = shape.sequence_length
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i} " * tokens}) + "\n" for i in range(64)))
    tree: dict[str, Any] = {
        "run": "it",
        "runs_dir": str(folder / "runs"),
        "model": {"name": str(model), "quant": shape.quant, "dtype": "fp32"},
        "data": {
            "train": str(folder / "data.jsonl"),
            "cache_dir": str(folder / "cache"),
            "untrained_tokens": "allow",
        },
        "train": {
            "steps": STEPS,
            "micro_batch": shape.micro_batch,
            "global_batch": shape.ranks * shape.micro_batch * shape.passes,
            "sequence_length": tokens,
            "activation_checkpointing": shape.recompute,
        },
        "checkpoint": {"every": STEPS, "save_at_start": False, "resume": "never"},
        "log": {"trackers": []},
    }
    (folder / "it.yaml").write_text(json.dumps(tree))
    return folder / "it.yaml"


def predicted(shape: Shape, config: Path) -> tuple[float, float]:
    """The plan's range on this machine at this moment."""
    machine = config.with_name("machine.json")
    dist_lora("doctor", "--nproc", shape.ranks, "--deadline", 30, "--out", machine)
    low, high = json.loads(dist_lora("plan", config, "--measured", machine, "--json"))["step_s"]
    return low, high


def row_of(shape: Shape, model: Path, folder: Path) -> Row:
    """Predict, train, and predict again; repeated if the machine has changed in between."""
    config = config_of(shape, model, folder)
    tokens = shape.ranks * shape.micro_batch * shape.passes * shape.sequence_length
    before = predicted(shape, config)
    for _ in range(TRIES):
        dist_lora("train", config, "--nproc", shape.ranks)
        lines = [json.loads(line) for line in (folder / "runs" / "it" / "metrics.jsonl").read_text().splitlines()]
        assert all(line["tokens"] >= 0.98 * tokens for line in lines), "the steps are not full"
        after = predicted(shape, config)
        ratios = [max(pair) / min(pair) for pair in zip(before, after, strict=True)]
        row = Row(
            shape,
            (min(before[0], after[0]), max(before[1], after[1])),
            statistics.median(line["step_s"] for line in lines[WARM:]),
            max(ratios) <= STEADY,
        )
        if row.is_steady:
            break
        before = after
    return row


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Predicted and measured step times.")
    parser.add_argument("--json", type=Path, help="keep the rows in a file")
    parser.add_argument("--only", type=int, nargs="*", help="some of the shapes, from 1")
    given = parser.parse_args()
    rows = []
    print(
        "| model | base | ranks | tokens per micro-batch | micro-batches | activations | predicted, s | measured, s | |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        wide = Path(name) / "wide"
        save_wide(wide)
        for i, shape in enumerate(SHAPES, start=1):
            if given.only and i not in given.only:
                continue
            row = row_of(shape, wide if shape.is_wide else SMOLLM2, Path(name) / str(i))
            rows.append(row)
            low, high = row.predicted_s
            print(
                f"| {shape.title} | {shape.quant} | {shape.ranks} | {shape.micro_batch} x {shape.sequence_length} | "
                f"{shape.passes} | {'recomputed' if shape.recompute else 'kept'} | {low:.2f} to {high:.2f} "
                f"(x {high / low:.2f}) | {row.measured_s:.2f} | "
                f"{'inside' if row.is_inside else 'outside'}{'' if row.is_steady else ', not steady'} |",
                flush=True,
            )
    print(f"\n{sum(row.is_inside for row in rows)} of {len(rows)} inside")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
