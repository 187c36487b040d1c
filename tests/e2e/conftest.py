"""What the end-to-end tests share: a config, the run that nothing interrupted, and ways to start commands."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import Done, run, write_config, write_lines


@pytest.fixture(scope="session")
def config(tiny_llama, tmp_path_factory) -> Path:
    """A config for a tiny model and 24 chats; its run is called whole."""
    folder = tmp_path_factory.mktemp("run")
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 5 + 1)}]}
        for i in range(24)
    ]
    return write_config(
        folder / "config.yaml",
        run="whole",
        runs_dir=str(folder / "runs"),
        model={"name": str(tiny_llama("llama31"))},
        lora={"rank": 4},
        data={"train": str(write_lines(folder / "train.jsonl", chats)), "cache_dir": str(folder / "cache")},
        train={"steps": 8, "global_batch": 4, "micro_batch": 1, "sequence_length": 64},
        optim={"lr": 1e-2, "warmup_steps": 2},
        checkpoint={"every": 2},
        log={"trackers": []},
    )


@pytest.fixture(scope="session")
def whole(config) -> Path:
    """The folder of a run on two ranks that nothing interrupted."""
    done = run("train", config, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "whole"


@pytest.fixture
def here(capfd, monkeypatch) -> Iterator[Callable[..., Done]]:
    """``here("train", ...)`` runs a command of one process in this one, which has its imports behind it."""
    from dist_lora.cli import main

    logger = logging.getLogger("dist_lora")
    before = logger.level, logger.handlers[:]

    def start(*arguments: object) -> Done:
        logger.handlers = []  # the command makes its own, to the stderr of now
        monkeypatch.setattr(sys, "argv", ["dist-lora", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
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
