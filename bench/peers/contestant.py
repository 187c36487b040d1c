"""A contestant's processes, seen from the bench: started, asked for steps in turn, ended."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.environment import FOLDER, ROOT, peers_python
from bench.peers.turns import Job
from bench.peers.work import as_kind

# Its module; kinds that aren't named here are PEFT's
MODULES = {"ours": "ours", "products": "products", "torchtune": "tune", "trl": "sft"}


class Failed(Exception):
    """A contestant ended before its turn; the message is the end of what it printed."""


@dataclass(frozen=True)
class Turn:
    """One step: seconds of the slowest rank, of all ranks' processors, the loss of its tokens, peak bytes of a rank."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    loss: float


@dataclass
class Contestant:
    """``kind`` on ``ranks`` processes of ``threads`` threads; in a ``with`` it runs."""

    kind: str
    job: Job
    ranks: int = 1
    threads: int = 1
    turns: list[Turn] = field(default_factory=list)
    start_s: float = 0.0
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Contestant:
        module = MODULES.get(self.kind, "hf")
        python = sys.executable if self.kind in ("ours", "products") else str(peers_python())
        folder = tempfile.mkdtemp(dir=Path(self.job.batches).parent)
        job = json.dumps(dataclasses.asdict(as_kind(self.job, self.kind)))
        started_s = time.monotonic()
        for rank in range(self.ranks):
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": str(self.threads),
                "HF_HUB_OFFLINE": "1",
                "DS_ACCELERATOR": "cpu",
                "TOKENIZERS_PARALLELISM": "false",
            }
            if self.kind not in ("ours", "products"):
                environment["TORCH_EXTENSIONS_DIR"] = str(
                    FOLDER / "extensions"
                )  # DeepSpeed compiles one, for this torch
            if self.ranks > 1:
                environment |= _as_rank(rank, self.ranks, Path(folder))
            self._errors = Path(folder) / "errors"
            with self._errors.open("a") as errors:
                process = subprocess.Popen(
                    [python, "-m", f"bench.peers.{module}", job],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            self._processes.append(process)
        try:
            self._answers()
        except Failed:
            self.__exit__()
            raise
        self.start_s = time.monotonic() - started_s
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.stdin.close()  # type: ignore[union-attr]
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, request: str) -> list[dict[str, Any]]:
        """Every rank's answer to a request."""
        for process in self._processes:
            process.stdin.write(f"{request}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        return self._answers()

    def step(self) -> None:
        """Take a turn."""
        answers = self.ask("step")
        weights = [answer.get("targets", 1) for answer in answers]
        self.turns.append(
            Turn(
                max(answer["wall_s"] for answer in answers),
                sum(answer["cpu_s"] for answer in answers),
                max(answer["peak_bytes"] for answer in answers),
                sum(a.get("loss", 0.0) * w for a, w in zip(answers, weights, strict=True)) / sum(weights),
            )
        )
        print(f"{self.kind}: {self.turns[-1]}", file=sys.stderr)

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes]  # type: ignore[union-attr]
        if not all(lines):
            raise Failed(self._errors.read_text()[-2000:].strip())
        return [json.loads(line) for line in lines]


def _as_rank(rank: int, ranks: int, folder: Path) -> dict[str, str]:
    """What a launcher gives a rank."""
    port = folder / "port"
    if not port.exists():
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port.write_text(str(free.getsockname()[1]))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port.read_text(),
    }


def in_turn(contestants: list[Contestant], num_turns: int, *, limit_s: float) -> None:
    """Each takes a step that isn't counted, then ``num_turns``, one after the other (A B C, A B C, ...).

    After ``limit_s`` no further round begins, but one is always counted.
    """
    started_s = time.monotonic()
    for counted in range(num_turns + 1):
        if counted > 1 and time.monotonic() - started_s > limit_s:
            return
        for contestant in contestants:
            contestant.step()


def median(contestant: Contestant, value: str) -> float:
    """Of its counted turns."""
    return statistics.median(getattr(turn, value) for turn in contestant.turns[1:])


def ratio(ours: Contestant, peer: Contestant, value: str) -> float:
    """How many times ours the peer's is: the median over the pairs of turns."""
    pairs = zip(ours.turns[1:], peer.turns[1:], strict=True)
    return statistics.median(getattr(theirs, value) / getattr(mine, value) for mine, theirs in pairs)


def largest_difference(ours: Contestant, peer: Contestant) -> float:
    """Of the losses of the same steps, relative."""
    pairs = zip(ours.turns, peer.turns, strict=True)
    return max(abs(theirs.loss - mine.loss) / mine.loss for mine, theirs in pairs)
