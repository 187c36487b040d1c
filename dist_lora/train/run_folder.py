"""A run's folder: who may write in it, and whether its config is still the one it began with."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

import yaml

from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, SaveError
from dist_lora.parallel.world import World

SEEN_S = 10.0  # a network file system may hide a new file for as long as it remembers that there was none

# What may differ from one start of a run to the next. Everything else decides its numbers.
MAY_CHANGE = ("runs_dir", "parallel", "checkpoint", "log", "eval", "train.steps", "train.epochs", "train.micro_batch",
              "train.activation_checkpointing", "data.cache_dir", "data.untrained_tokens", "model.attention")  # fmt: skip


def open_run_folder(config: Config, world: World) -> Path:
    """``runs_dir/run``, made if need be, locked by the first rank for as long as this process lives.

    All ranks call it.

    Raises:
        ConfigError: another process is writing there, the run began with another config, or a node can't see the folder.
        SaveError: the folder can't be made.
    """
    folder = config.runs_dir / config.run
    error: Exception | None = None
    if world.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
            _check_config(folder, config)
        except OSError as caught:
            error = SaveError(
                f"{folder}: the run's folder can't be written: {caught.strerror or caught}. "
                "Set runs_dir to a folder that can."
            )
        except ConfigError as caught:
            error = caught
    world.agree("the run's folder", error)
    _check_shared(folder, world)
    return folder


def _check_shared(folder: Path, world: World) -> None:
    """Raise on all ranks where a node doesn't see what the first one writes: its checkpoints would be in pieces."""
    if world.num_nodes == 1:
        return
    key, probe = "run_folder/probe", folder / f".probe-{uuid.uuid4().hex}"
    error: Exception | None = None
    if world.is_first:
        try:
            probe.touch()
        except OSError as caught:
            error = SaveError(f"{folder}: the run's folder can't be written: {caught.strerror or caught}")
        world.share(key, probe.name.encode())
    elif world.local_rank == 0:
        probe = folder / world.fetch(key).decode()
        deadline = time.monotonic() + SEEN_S
        while not probe.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not probe.exists():
            error = ConfigError(
                f"runs_dir: {folder} is not one folder for all nodes: what rank 0 has written there is not seen on "
                f"{socket.gethostname()} (rank {world.world_rank}) after {SEEN_S:.0f} s. Set runs_dir to a file system "
                "that all nodes share."
            )
    try:
        world.agree("the run's folder on every node", error)
    finally:
        if world.is_first:
            probe.unlink(missing_ok=True)


_locks: list[TextIO] = []  # open for as long as the process lives: closing a lock's file gives it back


def _lock(folder: Path) -> None:
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise ConfigError(
            f"{folder}: {owner} is writing this run now. Wait for it, stop it, or name another: run=NAME"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.append(lock)


def _check_config(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    resolved = dump_config(config)
    if path.exists() and any((folder / "checkpoints").glob("step-*")):
        before, now = flat(yaml.safe_load(path.read_text())), flat(yaml.safe_load(resolved))
        changed = [
            f"  {key}: the run has {before.get(key)!r}, the config says {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not _may_change(key)
        ]
        if changed:
            raise ConfigError(
                f"{folder} holds checkpoints of a run with other settings:\n"
                + "\n".join(changed)
                + "\nName another run (run=NAME), or delete the folder to begin anew."
            )
    aside = path.with_suffix(".partial")
    aside.write_text(resolved)
    os.replace(aside, path)


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their full names: ``{"lora.rank": 16}`` of ``{"lora": {"rank": 16}}``."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}.{name}".strip(".")).items()}
