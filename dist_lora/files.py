"""Atomic writes, locks and bounded reads: a file is written completely and fsynced, or not at all. Needs no torch.

Reads are limited in size; ``links_out`` finds the links that lead out of a folder.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dist_lora.errors import ConfigError
from dist_lora.text import first_few

MAX_JSON_BYTES = 100_000_000
NO_SUCH_FOLDER = "no such folder"
_TEMPORARY = ".partial"
_WAIT_S = 0.1  # between two attempts to take a lock that another process holds


# Writing


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a temporary file, fsync it and rename it into place: a reader sees the old or the new content, complete.

    Several processes may write one file. A temporary file whose writer was killed is removed by the next write.

    Raises:
        OSError: the write failed, and the old file is unchanged; or the folder couldn't be fsynced, and the new file is
            in place. No temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with _locked_file(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, content: str) -> None:
    """``write_whole`` for a path that a user has named: a link's target is written, and so is a device or a pipe.

    Raises:
        OSError: see ``write_whole``.
    """
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
    else:
        write_whole(path.resolve(), content)


@contextmanager
def _locked_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked while it is open, so that ``_remove_abandoned`` of another process leaves it alone."""
    while True:
        with path.open("xb") as file:
            with suppress(OSError):  # a file system without locks, where nothing is removed either
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # else it was removed before it was locked
                yield file
                return


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of ``path`` that nobody has locked: their writers are gone."""
    for temporary in path.parent.iterdir():
        if temporary.name.startswith(f".{path.name}-") and temporary.suffix == _TEMPORARY:
            with suppress(OSError), temporary.open("r+b") as file:  # locked, or removed by another process
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A function that appends to a new file, which is fsynced at the end. Fsyncing its folder is the caller's job.

    Raises:
        OSError: the file exists already, or can't be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:  # one write may take fewer bytes: Linux stops at 2 GiB
            rest = rest[os.write(fd, rest) :]

    try:
        yield append
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Fsync one file, or the entries of one folder.

    Raises:
        OSError: fsync failed.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Fsync the files in a folder and in its subfolders, and all these folders.

    Raises:
        OSError: fsync failed.
    """
    for path in [*(path for path in folder.rglob("*") if path.is_file() or path.is_dir()), folder]:
        sync(path)


def swap_in(partial: Path, final: Path, *, former: Path) -> None:
    """Rename a folder to its final name, replacing an existing one; fsynced, and rolled back on failure.

    A kill between the two renames of a replacement leaves the old folder under the name ``former``.

    Args:
        former: where the replaced folder goes until it is removed, on the same file system.

    Raises:
        OSError: a rename failed; ``final`` is unchanged.
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
    """Take the lock (flock) of an open file or folder; closing it, or the end of the process, releases the lock.

    Args:
        on_wait: called ten times a second while another process holds the lock; without it, there is no wait.

    Raises:
        BlockingIOError: another process holds the lock, and ``on_wait`` is None.
        OSError: the file system doesn't support locks.
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
    """Whether a process holds the lock of a file, as far as this host can tell."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# Reading


def file_exists(path: Path) -> bool:
    """Whether a file exists; False for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def no_folder(path: Path) -> str | None:
    """What is wrong with a path that should be a folder, in words; None if it is one that can be listed."""
    try:
        os.scandir(path).close()
    except FileNotFoundError:
        return NO_SUCH_FOLDER
    except NotADirectoryError:
        return "is a file, not a folder" if file_exists(path) else "no such folder: a part of its path is a file"
    except OSError as error:
        return f"can't be opened: {error.strerror or error}"
    except ValueError as error:  # a NUL
        return f"can't be opened: {error}"
    return None


def refuse_file(path: Path, *, option: str, is_replaced: bool = False) -> None:
    """Raise ``ConfigError`` if no file can be written at ``path``, which ``option`` names: before hours of work for it.

    Args:
        is_replaced: what is there is replaced, or written to if it is a device or a pipe; else it is refused.
    """
    folder = path.absolute().parent
    if file_exists(path) and not is_replaced:
        raise ConfigError(f"{option}: {path} exists already. Name a new file, or remove that one")
    if no_folder(path) is None:
        raise ConfigError(f"{option}: {path} is a folder. Name a file in it")
    if file_exists(path) and not path.is_file():
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{option}: {path} can't be written. Name a file in a folder that can be written")
        return
    problem = no_folder(folder) or (None if os.access(folder, os.W_OK) else "can't be written")
    if problem is not None:
        raise ConfigError(f"{option}: {path}: its folder: {problem}. Name a file in a folder that can be written")


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder that can be listed, and there is nothing in it."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except (OSError, ValueError):
        return False


def links_out(folder: Path, names: Iterable[str]) -> list[str]:
    """``NAME (to TARGET)`` for each file of ``folder`` that links out of it: its author may have pointed it anywhere.

    Links of the hub's cache, from ``snapshots/REVISION`` to the neighbouring ``blobs``, are allowed.
    """
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    targets = {name: (folder / name).resolve() for name in names}
    return [
        f"{name} (to {target})"
        for name, target in targets.items()
        if not any(target.is_relative_to(parent) for parent in allowed)
    ]


def read_at_most(path: Path, num_bytes: int) -> bytes:
    """Up to ``num_bytes`` + 1 bytes of a file: one byte too many shows that it is too long, without reading all of it.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        return file.read(min(num_bytes, os.fstat(file.fileno()).st_size) + 1)


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; duplicate keys are an error.

    Raises:
        OSError: the file can't be read.
        ValueError: it is longer than ``max_bytes``, not JSON, or not an object; the message doesn't name the file.
    """
    content = read_at_most(path, max_bytes)
    if len(content) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes:,} bytes")
    return parse_json(content)


def parse_json(content: bytes, *, what: str = "it") -> dict[str, Any]:
    """See ``read_json``; ``what`` is the subject of the message."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("a JSON object was expected")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; for ``object_pairs_hook``, where Python would keep the last of two in silence.

    Raises:
        ValueError: a key stands twice.
    """
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    duplicates = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    raise ValueError(f"named twice: {first_few(duplicates)}")
