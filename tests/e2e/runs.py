"""Starting the commands as a user types them, and reading what they left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
INJECT = Path(__file__).parent / "inject"


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    ended: float = 0.0  # seconds since 1970


def command(*arguments: object) -> list[str]:
    """``dist-lora ARGUMENTS`` for a process of its own."""
    return [sys.executable, "-m", "dist_lora", *map(str, arguments)]


def environment(fault: str | None = None) -> dict[str, str]:
    """This process's environment; with ``fault`` the ranks started in it begin with that function of ``faults.py``."""
    added = {"PYTHONPATH": os.pathsep.join([str(INJECT), str(ROOT)]), "DIST_LORA_FAULT": fault} if fault else {}
    return {**os.environ, **added}


def run(
    *arguments: object,
    fault: str | None = None,
    timeout_s: float = 300,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
) -> Done:
    """Run ``dist-lora ARGUMENTS`` in processes of its own to its end; ``env`` takes the place of this one's."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(fault) if env is None else env,
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, ended=time.time())


def run_each_rank(*arguments: object, fault: str | None = None, timeout_s: float = 120) -> tuple[list[int], Done]:
    """Run ``dist-lora ARGUMENTS`` as two ranks that nobody sees through: each has to end by itself.

    Returns the exit codes, and all that was printed with the largest of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DIST_LORA_RENDEZVOUS": f"{folder}/rendezvous"}
        ranks = [(arguments, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        return run_processes(ranks, fault=fault, timeout_s=timeout_s)


def run_processes(
    ranks: Sequence[tuple[Sequence[object], Mapping[str, str]]], *, fault: str | None = None, timeout_s: float = 120
) -> tuple[list[int], Done]:
    """Run ``dist-lora`` once for each of these arguments and added environments, at once, to the end of all.

    Returns the exit codes, and all that was printed with the largest of them.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        streams = [
            [files.enter_context((Path(folder) / f"{rank}.{name}").open("w+")) for name in ("out", "err")]
            for rank in range(len(ranks))
        ]
        processes = [
            subprocess.Popen(
                command(*arguments), cwd=ROOT, env=environment(fault) | dict(added), stdout=out, stderr=err
            )
            for (arguments, added), (out, err) in zip(ranks, streams, strict=True)
        ]
        try:
            codes = [process.wait(timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
        ended = time.time()
        out, err = ("".join(Path(pair[i].name).read_text() for pair in streams) for i in range(2))
    return codes, Done(max(codes), out, err, ended)


def run_under_torchrun(*arguments: object, fault: str | None = None, timeout_s: float = 300) -> Done:
    """Run ``dist-lora ARGUMENTS`` as two ranks that torchrun starts and sees through."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dist_lora",
         *map(str, arguments)],
        cwd=ROOT, env=environment(fault), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr, ended=time.time())


def free_port() -> int:
    """One that nobody listens on, of those that no connection of another test takes by chance (from 32768)."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def write_config(path: Path, **settings: object) -> Path:
    """A config file with these settings."""
    path.write_text(yaml.safe_dump(settings))
    return path


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats_config(folder: Path, model: Path) -> Path:
    """A config, in ``folder``, that trains ``model`` on 24 chats; its run is called whole."""
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 5 + 1)}]}
        for i in range(24)
    ]
    return write_config(
        folder / "config.yaml",
        run="whole",
        runs_dir=str(folder / "runs"),
        model={"name": str(model)},
        lora={"rank": 4},
        data={"train": str(write_lines(folder / "train.jsonl", chats)), "cache_dir": str(folder / "cache")},
        train={"steps": 8, "global_batch": 4, "micro_batch": 1, "sequence_length": 64},
        optim={"lr": 1e-2, "warmup_steps": 2},
        checkpoint={"every": 2},
        log={"trackers": []},
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def fill_the_disk(ballast: Path) -> None:
    """Write a file that takes the last byte of its file system."""
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
