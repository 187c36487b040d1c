"""What contestants train on: GSM8K as dist_lora's config reads it, and the same documents as token ids for the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from bench.peers.turns import Job
from dist_lora.config.load import load_config
from dist_lora.train.build import open_base
from dist_lora.train.command import loader_of, tokens_of
from dist_lora.world.world import World

STEPS = 12  # batches that are written; a contestant takes fewer
ALPHA, LR = 32, 1e-4


@dataclass(frozen=True)
class Work:
    """A batch and how it is trained.

    ``full`` documents are GSM8K's one after the other, cut to ``tokens``; ``answers`` are its questions and answers, with a loss
    on the answers alone, and ``whole`` the same with a loss on both.
    """

    documents: Literal["full", "answers", "whole"] = "full"
    batch: int = 4
    tokens: int = 512
    ranks: int = 1
    lora_rank: int = 16
    quant: str = "none"
    layers: int | None = None
    base_shard: str = "auto"

    def prepare(self, *, gsm8k: Path, model: Path, folder: Path) -> Job:
        """Write its data, config and batches under ``folder``."""
        folder.mkdir(parents=True)
        if self.layers is not None:
            model = shortened(model, folder / "model", self.layers)
        rows = [json.loads(line) for line in (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        samples = self._full(rows) if self.documents == "full" else self._answers(rows)
        (folder / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        (folder / "config.yaml").write_text(json.dumps(self._config(model, folder)))
        batches = folder / "batches.json"
        batches.write_text(json.dumps(batches_of(folder / "config.yaml")))
        return Job("", str(model), str(batches), self.lora_rank, ALPHA, LR, self.quant, str(folder / "config.yaml"))

    def _full(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        texts, text = [], ""
        for row in rows:
            text += f"{row['question']}\n{row['answer']}\n\n"
            if len(text) > 6 * self.tokens:
                texts.append({"text": text})
                text = ""
        repeats = -(-STEPS * self.batch // len(texts))
        return (texts * repeats)[: STEPS * self.batch]

    def _answers(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"prompt": row["question"], "completion": row["answer"]} for row in rows[: STEPS * self.batch]]

    def _config(self, model: Path, folder: Path) -> dict[str, Any]:
        return {
            "run": "peers",
            "runs_dir": str(folder / "runs"),
            "model": {"name": str(model), "dtype": "fp32", "quant": self.quant},
            "lora": {"rank": self.lora_rank, "alpha": ALPHA},
            "data": {
                "train": str(folder / "train.jsonl"),
                "cache_dir": str(folder / "cache"),
                "train_on": "assistant" if self.documents == "answers" else "all",
            },
            "train": {
                "steps": STEPS,
                "global_batch": self.batch,
                "micro_batch": -(-self.batch // self.ranks),
                "sequence_length": self.tokens,
                "packing": False,  # every document is a sequence; they lie one after the other all the same
            },
            "optim": {"lr": LR, "schedule": "constant", "warmup_steps": 0},
            "parallel": {"base_shard": self.base_shard} if self.base_shard != "auto" else {},
            "checkpoint": {"resume": "never", "save_at_start": False},
            "log": {"trackers": []},
        }


def batches_of(config_file: Path) -> list[list[tuple[list[int], list[int]]]]:
    """Per step the documents of dist_lora's own loader: ids, and labels (-100 is no target)."""
    config, world = load_config(config_file), World.alone()
    tokens, _ = tokens_of(config, open_base(config, world), world)
    row_of = {int(sample): row for row, sample in enumerate(tokens.sample_ids)}
    loader = loader_of(config, tokens, world)
    steps = []
    for step in range(loader.steps_in_epoch(0)):
        documents = [tokens.document(row_of[sample]) for sample in loader.batch(step).sample_ids]
        steps.append(
            [
                (ids.tolist(), [int(i) if is_target else -100 for i, is_target in zip(ids, targets, strict=True)])
                for ids, targets in documents
            ]
        )
    return steps


def shortened(model: Path, folder: Path, layers: int) -> Path:
    """A copy of a model of one file with its first layers only."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    weights = load_file(model / "model.safetensors")
    for name in list(weights):
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= layers:
            del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_kind(job: Job, kind: str) -> Job:
    """The job, trained in another way."""
    return replace(job, kind=kind)
