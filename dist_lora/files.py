"""Whole files or none: what is written survives a kill and a power cut, or was never there. Needs no torch.

What is read here is bounded, and never leaves the folder that it was asked of.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_lora.text import first_few

MOST_JSON_BYTES = 100_000_000
_WAIT_S = 0.1  # between two looks at a lock that another process holds


# Writing


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, fsynced, and rename it into place: a reader sees the former content or this one, whole.

    Raises:
        OSError: the system refuses; nothing is left, and the former file is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}.partial")  # two processes may write one status
    try:
        with new_file(aside) as append:
            append(data)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A function that appends to a file which is not there yet; fsynced at the end. Its folder is synced by who publishes it.

    Raises:
        OSError: it exists, or the system refuses.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        while left:  # one write may take fewer bytes: Linux stops at 2 GiB
            left = left[os.write(fd, left) :]

    try:
        yield append
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Fsync one file, or the names in one folder.

    Raises:
        OSError: the system refuses.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Fsync the files directly in a folder, and the folder.

    Raises:
        OSError: the system refuses.
    """
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        sync(path)


def swap_in(partial: Path, final: Path, *, former: Path) -> None:
    """Give a folder its final name, in place of the one that may lie there; undone on failure, fsynced.

    Between the two renames of a replacement a kill leaves the former one under the name ``former``.

    Args:
        former: where the replaced folder goes until it is removed, on the same file system.

    Raises:
        OSError: the system refuses; ``final`` is as it was.
    """
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)  # of a writer that was killed before it removed it
        os.rename(final, former)
    try:
        os.rename(partial, final)
        sync(final.parent)
    except OSError:
        if final.exists():
            os.rename(final, partial)
        if former.exists():
            os.rename(former, final)
        raise
    shutil.rmtree(former, ignore_errors=True)


def lock(fd: int, *, on_wait: Callable[[], object] | None = None) -> None:
    """Take the lock (flock) of an open file or folder, which closing it gives back; so does any end of the process.

    Args:
        on_wait: called ten times a second while another process holds it; without it, nobody waits.

    Raises:
        BlockingIOError: another process holds it, and there is no ``on_wait``.
        OSError: the file system has no locks.
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if on_wait is None:
                raise
        on_wait()
        time.sleep(_WAIT_S)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, as far as this machine can tell."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# Reading


def is_there(path: Path) -> bool:
    """Whether a file exists; a name that no file can have is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def links_out(folder: Path, names: Iterable[str]) -> list[str]:
    """``NAME (to TARGET)`` of each file of ``folder`` that is a link out of it: its maker may have pointed it anywhere.

    The hub's cache is made of such links, from ``snapshots/REVISION`` to ``blobs`` beside them: those are its own.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    targets = {name: (folder / name).resolve() for name in names}
    return [
        f"{name} (to {target})"
        for name, target in targets.items()
        if not any(target.is_relative_to(place) for place in inside)
    ]


def read_at_most(path: Path, num_bytes: int) -> bytes:
    """The first bytes of a file, one more than ``num_bytes`` where there are more: no memory for what is too long.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return file.read(min(num_bytes, os.fstat(file.fileno()).st_size) + 1)


def read_json(path: Path, *, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, no name in it twice.

    Raises:
        OSError: it can't be read.
        ValueError: it is longer than ``most_bytes``, not JSON, or no object: the message says which, and not where.
    """
    content = read_at_most(path, most_bytes)
    if len(content) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes:,} bytes")
    return parse_json(content)


def parse_json(content: bytes, *, what: str = "it") -> dict[str, Any]:
    """See ``read_json``; ``what`` the message is about."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("a JSON object was expected")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"named twice: {first_few(repeated)}")
    return dict(pairs)
