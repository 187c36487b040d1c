"""From a command until its first step begins, on two ranks: ``dist-lora train``, and ``from_pretrained`` with PEFT under FSDP2."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.contestant import Contestant
from bench.peers.environment import ROOT
from bench.peers.turns import Job
from bench.peers.work import Work

if TYPE_CHECKING:
    from bench.peers.__main__ import Settings


def start(settings: Settings) -> list[str]:
    """The row's line. The caches of files and tokens are warm: both have started once before."""
    work = Work(ranks=2, base_shard="node")
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name:
        job = work.prepare(gsm8k=settings.gsm8k, model=settings.model, folder=Path(name) / "work")
        seconds = [(ours_s(job, settings.threads), theirs_s(job, settings.threads)) for _ in range(settings.turns + 1)]
    ours, theirs = zip(*seconds[1:], strict=True)
    faster = statistics.median(peer / mine for mine, peer in zip(ours, theirs, strict=True))
    return [
        f"| from the command to the first step, 2 ranks | from_pretrained and PEFT | {statistics.median(ours):.1f} and "
        f"{statistics.median(theirs):.1f} (wall time) | **{faster:.2f}** | | | |"
    ]


def ours_s(job: Job, threads: int) -> float:
    """Seconds until the first step of ``dist-lora train`` begins: its line of metrics comes when the step ends."""
    began_s = time.time()
    command = [sys.executable, "-m", "dist_lora", "train", job.config, "train.steps=1", "--nproc", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    metrics = Path(job.config).parent / "runs" / "peers" / "metrics.jsonl"
    step_s: float = json.loads(metrics.read_text())["step_s"]
    return metrics.stat().st_mtime - step_s - began_s


def theirs_s(job: Job, threads: int) -> float:
    """Seconds until both ranks of the peer could begin a step."""
    with Contestant("fsdp2", job, 2, threads) as peer:
        return peer.start_s
