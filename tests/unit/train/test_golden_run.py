"""The losses of a stored run come again: no upgrade of ours or of a library changes them unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dist_lora.checkpoint.write import versions_here
from dist_lora.world.world import World
from tests import ROOT
from tests.ranks.runs import metrics, train_command

GOLDEN = ROOT / "tests" / "golden" / "run" / "losses.json"
NUM_STEPS = 20


def size_of_weights(base: Path) -> float:
    """The sum of all weights' absolute values: of others it is another, whatever a processor does to last digits."""
    return sum(float(tensor.double().abs().sum()) for tensor in load_file(base / "model.safetensors").values())


def losses_of(base: Path, folder: Path) -> list[float]:
    """Train a tiny model on 24 chats, packed, with accumulation, clipping, a warm-up and a cosine."""
    chats = [[("user", f"Count to {i}."), ("assistant", " ".join(map(str, range(1, i % 7 + 2))))] for i in range(24)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
    (folder / "train.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {
        "run": "golden",
        "runs_dir": str(folder),
        "model": {"name": str(base), "dtype": "fp32"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"steps": NUM_STEPS, "global_batch": 4, "micro_batch": 2, "sequence_length": 96},
        "optim": {"lr": 5e-3, "warmup_steps": 3, "weight_decay": 0.01},
        "log": {"trackers": []},
    }
    assert train_command(World.alone(), settings) == ""
    return [line["loss"] for line in metrics(folder / "golden")]


def test_the_losses_of_the_stored_run_come_again(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31", seed=0)
    losses = losses_of(base, tmp_path)
    if os.environ.get("MAKE_GOLDEN_RUN"):
        made = {
            "losses": [round(loss, 7) for loss in losses],
            "versions": versions_here(),
            "weights": size_of_weights(base),
        }
        GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
        pytest.skip(f"{GOLDEN} was made anew")
    golden = json.loads(GOLDEN.read_text())
    made_by = f"made by {golden['versions']}, here are {versions_here()}"
    drawn = pytest.approx(golden["weights"], rel=1e-5)
    assert size_of_weights(base) == drawn, f"transformers draws other weights for the same seed: {made_by}"
    assert len(losses) == NUM_STEPS and losses[-1] < 0.5 * losses[0]
    assert losses == pytest.approx(golden["losses"], abs=1e-4), made_by
