"""A run's folder: who may write in it, and whether all nodes see it."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, RunInUse, SaveError, cannot_write
from dist_lora.files import lock, write_whole
from dist_lora.run_folder.log_file import close_log, open_log
from dist_lora.run_folder.status import StatusWriter, note_closed, note_opened
from dist_lora.world.world import World

PROBED_S = 1.0
SEEN_S = 10.0  # a network file system may hide a new file for as long as it caches that there was none


def open_run_folder(config: Config, world: World) -> Path:
    """``runs_dir/run``, made if needed, locked by the first rank for as long as this process lives.

    All ranks call it.

    Raises:
        RunInUse: another process is writing there.
        ConfigError: a node can't see the folder.
        SaveError: the folder can't be made.
    """
    folder = config.runs_dir / config.run

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        note_opened(folder)
        _check_writable(folder / "checkpoints")
        open_log(folder)
        StatusWriter(folder).begin()

    def refused(error: OSError) -> SaveError:
        return cannot_write(
            f"{folder}: the run's folder can't be written: {error.strerror or error}. Set runs_dir to a writable folder.",
            error,
        )

    world.on_first("the run's folder", take, os_error=refused)
    note_opened(folder)
    _check_shared(folder, world)
    return folder


def _check_writable(folder: Path) -> None:
    """Raise ``OSError`` if a folder of an earlier attempt can't be written: better now than at the first save."""
    if folder.exists() and not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _check_shared(folder: Path, world: World) -> None:
    """Raise on all ranks if a node doesn't see what the first one writes: checkpoints would be scattered over nodes."""
    if world.num_nodes == 1:
        return

    def refused(error: OSError) -> SaveError:
        return cannot_write(f"{folder}: the run's folder can't be written: {error.strerror or error}", error)

    def look(probe: Path) -> None:
        deadline = time.monotonic() + SEEN_S
        while world.local_rank == 0 and not probe.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"runs_dir: {folder} is not shared by all nodes: a file that rank 0 wrote there is not visible on "
                    f"{socket.gethostname()} (rank {world.world_rank}) after {SEEN_S:.0f} s. Set runs_dir to a file "
                    "system that all nodes share."
                )
            time.sleep(0.1)

    with world.probe(folder, "the run's folder", os_error=refused) as probe:
        world.agree_on("the run's folder on every node", lambda: look(probe))


_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_locks: list[TextIO] = []  # open for as long as the process lives: closing a lock's file releases it


def _lock(folder: Path) -> None:
    file = (folder / "lock").open("a+")
    try:
        _lock_in_time(file)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise RunInUse(
            f"{folder}: {owner} is writing this run now. Wait for it, stop it, or name another: run=NAME"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        raise ConfigError(
            f"runs_dir: {folder}: its file system gives no locks ({error.strerror}), by which two processes are kept from writing one "
            "run. Mount it with them (Lustre: -o flock), or set runs_dir to another"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks.append(file)


def _lock_in_time(file: TextIO) -> None:
    """Lock a file that may be locked for a moment: `dist-lora status` and `runs` find out so whether a run is at work."""
    deadline = time.monotonic() + PROBED_S

    def give_up() -> None:
        if time.monotonic() > deadline:
            raise BlockingIOError

    lock(file.fileno(), on_wait=give_up)


def close_run_folder() -> None:
    """Give back the locks that this process has, and close its log: it goes on after the run."""
    close_log()
    note_closed()
    while _locks:
        _locks.pop().close()


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved config to the run's folder; one rank calls it, once all of the config is accepted.

    Raises:
        SaveError: it can't be written.
    """
    path = folder / "config.yaml"
    try:
        write_whole(path, dump_config(config))
    except OSError as error:
        raise cannot_write(
            f"{path}: can't be written: {error.strerror or error}. Set runs_dir elsewhere.", error
        ) from error
