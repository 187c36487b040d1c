"""A rank that is killed while the user's judge runs takes it along, and the same command asks it again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import Process, run

# It sleeps until there is a file beside it, and says which process it is and whose.
JUDGE = """
import json, os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
if not (here / "go").exists():
    (here / "new").write_text(f"{os.getppid()} {os.getpid()}")
    (here / "new").rename(here / "processes")
    time.sleep(600)
print(json.dumps({"step": int(os.environ["DIST_LORA_STEP"])}))
"""
DEADLINE_S = 240.0


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.turn(of=2, among="whole runs")
def test_a_rank_that_is_killed_in_a_judge_takes_it_along_and_the_run_goes_on_to_the_same_bytes(
    config, whole, tmp_path
) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    judge = f"{sys.executable} {tmp_path}/judge.py {tmp_path}"
    arguments = ("train", config, "run=judged", f"eval.command={judge}", "eval.every=4", "--nproc", 2)
    started = Process(*arguments)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not (tmp_path / "processes").exists():
            assert time.monotonic() < deadline and started.wait(0.05) is None, started.stderr()
        leash, process = map(int, (tmp_path / "processes").read_text().split())
        os.kill(parent_of(leash), signal.SIGKILL)
        assert started.wait(DEADLINE_S / 2) == 1
        told = started.stderr()
    finally:
        started.close()
    assert "error: rank 0 of 2 was killed by SIGKILL" in told
    while is_there(leash) or is_there(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "go").touch()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    folder = whole.parent / "judged"
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 4, "eval_step": 4.0}, {"step": 8, "eval_step": 8.0}]
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert "advice    8 steps are few for LoRA" in done.stderr and "step 8: eval_step 8.0000" in done.stderr
