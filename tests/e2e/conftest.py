"""What the end-to-end tests share: a run that nothing interrupted, and a model that learns anything small by heart."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.runs import Done, chats_config, run

MakeBase = Callable[..., Path]


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


@pytest.fixture(scope="session")
def config(tiny_llama, made_once) -> Path:
    """A config for a tiny model and 24 chats, of all workers; its run is called whole."""
    return made_once("run", lambda folder: chats_config(folder, tiny_llama("llama31"))) / "config.yaml"


@pytest.fixture(scope="session")
def whole(config, made_once) -> Path:
    """The folder of a run on two ranks that nothing interrupted."""

    def train(_: Path) -> None:
        done = run("train", config, "--nproc", 2, is_executed=True)
        assert done.returncode == 0, done.stderr

    made_once("whole", train)
    return config.parent / "runs" / "whole"


@pytest.fixture
def here(capfd, monkeypatch) -> Iterator[Callable[..., Done]]:
    """``here("train", ...)`` runs a command of one process in this one, which has its imports behind it."""
    from dist_lora.cli import main
    from dist_lora.run_folder import folder

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("dist_lora")
    before = logger.level, logger.handlers[:]

    def start(*arguments: object) -> Done:
        logger.handlers = []  # the command makes its own, to the stderr of now
        monkeypatch.setattr(sys, "argv", ["dist-lora", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        while folder._locks:  # a process that ends gives them back
            folder._locks.pop().close()
        told = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, told.out, told.err)

    yield start
    logger.level, logger.handlers = before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB of its own: what is written to it can really fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
