"""What the end-to-end tests share: a model that learns anything small by heart within a few seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.commands import Call, caller, run

MakeBase = Callable[..., Path]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """``call("merge", adapter, "--out", folder)`` in this process: (exit code, stdout, stderr)."""
    return caller(monkeypatch, capfd)


@pytest.fixture(scope="session")
def make_base(tiny_llama, tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Copies of the tiny model for learning by heart.

    ``make_base(zero_rows=(), has_template=True, seed=0)``. Its frozen head is eight times as large as it was made, so that
    it can be sure of a token at all; ``zero_rows`` are ids whose rows of embedding and head are zero, as in a base that
    never saw them.
    """

    def make(*, zero_rows: tuple[int, ...] = (), has_template: bool = True, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("learner") / "base"
        shutil.copytree(tiny_llama("llama31", seed=seed), folder)
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] *= 8
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name][list(zero_rows)] = 0
        save_file(weights, file, metadata={"format": "pt"})
        if not has_template:
            (folder / "chat_template.jinja").unlink()
        return folder

    return make


def learn(folder: Path, base: Path, records: list[dict], *settings: str, num_ranks: int = 1) -> Path:
    """The run's folder of a training that learns ``records`` by heart."""
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = folder / "config.yaml"
    config.write_text(
        f"run: learnt\nruns_dir: {folder}/runs\nmodel: {{name: {base}}}\nlora: {{rank: 16}}\n"
        f"data: {{train: {folder}/data.jsonl, cache_dir: {folder}/cache}}\n"
        "train: {steps: 150, global_batch: 8, micro_batch: 8, sequence_length: 128}\n"
        "optim: {lr: 2e-2, warmup_steps: 5, schedule: linear}\n"
        "checkpoint: {every: 1000}\nlog: {trackers: [], every: 50}\n"
    )
    done = run("train", config, *settings, "--nproc", num_ranks)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "learnt"
