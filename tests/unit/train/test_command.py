"""The command's resources are given back wherever a rank fails, and a signal ends it as such even then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_lora.config.schema import Config
from dist_lora.errors import RankError
from dist_lora.train import command
from dist_lora.train.signals import StopRequest
from dist_lora.world.world import World

# A rank has lost another one, and asks why for some seconds, in which the launcher stops it.
STOPPED_WHILE_IT_REPORTS = """
import os, signal, sys, threading
from dist_lora import cli
from dist_lora.run_folder.status import StatusWriter
from dist_lora.train import command

def lose_a_rank(*_, **__):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    raise RuntimeError("Connection closed by peer")

command.train = lose_a_rank
StatusWriter.end = lambda self, error: print("status:", type(error).__name__, file=sys.stderr)
cli.main()
"""


@pytest.mark.slow
def test_a_signal_while_an_error_is_reported_ends_as_a_stop_with_its_status(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run: it\nmodel: {name: 3.2-1b}\ndata: {train: x.jsonl}\ntrain: {steps: 1}\n")
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IT_REPORTS, "train", config, "--nproc", "1"],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr and "status: StopNow" in done.stderr


def test_the_meter_is_closed_where_another_rank_fails_while_it_opens(tmp_path: Path, monkeypatch) -> None:
    closed: list[bool] = []
    world = World.alone()
    config = Config.model_validate(
        {"run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x.jsonl"}, "train": {"steps": 1}}
    )

    def refuse(stage: str, error: object) -> None:
        raise RankError("rank 1 failed")

    meter = SimpleNamespace(close=lambda: closed.append(True), leave_terminal=lambda: None)
    monkeypatch.setattr(command, "Meter", lambda *_, **__: meter)
    monkeypatch.setattr(world, "agree", refuse)
    parts = {"progress": SimpleNamespace(step=0), "saver": SimpleNamespace(last=None)}
    run = SimpleNamespace(config=config, callbacks=None, num_steps=1, **parts)
    with pytest.raises(RankError, match="rank 1 failed"), StopRequest({}) as stop:
        command._train(cast(Any, run), tmp_path, world, stop, lambda device, dtype: None)
    world.closing.close()  # as ``joined`` does, once the error is told
    assert closed == [True]
