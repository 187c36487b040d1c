"""The file system of the runs' folder: free space, measured speed, and whether renaming and locks work."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from dist_lora.doctor.findings import Answer
from dist_lora.text import gib

CHUNK_BYTES = 2**22
MOST_BYTES, MOST_S = 2**28, 3.0  # written at most, and for how long
LEAST_FREE_BYTES = 10 * 2**30
SLOW_BYTES_PER_S = 50e6


def examine_disk(folder: Path) -> Answer:
    """The file system of ``folder``, which need not exist; the files written to measure it are removed.

    Raises:
        OSError: it can't be written or read.
    """
    parent = _nearest(folder)
    answer = Answer(facts={"folder": str(folder)})
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
    except OSError as error:
        answer.add(
            "fault",
            "disk",
            f"{parent} can't be written: {error.strerror or error}",
            "Set runs_dir to a writable folder, or ask for permission to write there.",
        )
        return answer
    try:
        _measure(scratch, folder, answer)
        _try_rename(scratch, answer)
        _try_lock(scratch, folder, answer)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return answer


def _nearest(folder: Path) -> Path:
    """The folder, or its first parent that exists."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))


def _measure(scratch: Path, folder: Path, answer: Answer) -> None:
    free = shutil.disk_usage(scratch).free
    num_bytes = min(MOST_BYTES, free // 4)
    write_s, written = _write(scratch / "file", num_bytes)
    read_s = _read(scratch / "file")
    rates = {"write_bytes_per_s": written / write_s, "read_bytes_per_s": written / read_s}
    answer.facts |= {"free_bytes": free, **rates}
    write, read = rates.values()
    answer.add(
        "ok",
        "disk",
        f"{folder}: {gib(free)} free; writes {write / 1e9:.2f} GB/s with fsync, reads {read / 1e9:.2f} GB/s "
        f"(one process, {written / 2**20:.0f} MiB)",
    )
    if free < LEAST_FREE_BYTES:
        answer.add(
            "warning",
            "disk",
            f"{gib(free)} are free in {folder}",
            "Free up space, or set runs_dir elsewhere: `dist-lora plan` shows how much a run's checkpoints need.",
        )
    if min(write, read) < SLOW_BYTES_PER_S:
        answer.add(
            "warning",
            "disk",
            f"{folder} writes {write / 1e6:.0f} MB/s and reads {read / 1e6:.0f} MB/s",
            "Put runs_dir and the model on a faster disk; loading the base reads all of it.",
        )


def _write(file: Path, num_bytes: int) -> tuple[float, int]:
    """Seconds, and the bytes that were written and fsynced in them."""
    chunk = os.urandom(CHUNK_BYTES)
    written = 0
    started_s = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        while written < num_bytes and time.perf_counter() - started_s < MOST_S:
            written += out.write(chunk)
        os.fsync(out.fileno())
    return time.perf_counter() - started_s, written


def _read(file: Path) -> float:
    """Seconds to read a file from disk, after the system was advised to drop it from the page cache."""
    with file.open("rb", buffering=0) as content:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started_s = time.perf_counter()
        while content.read(CHUNK_BYTES):
            pass
        return time.perf_counter() - started_s


def _try_rename(scratch: Path, answer: Answer) -> None:
    (scratch / "old").mkdir()
    (scratch / "old" / "inside").write_text("new")
    (scratch / "over").write_text("old")
    error: OSError | None = None
    try:
        os.rename(scratch / "old", scratch / "new")
        os.replace(scratch / "new" / "inside", scratch / "over")
    except OSError as caught:
        error = caught
    if error is None and (scratch / "over").read_text() == "new" and not (scratch / "old").exists():
        answer.facts["rename"] = True
        return
    answer.facts["rename"] = False
    answer.add(
        "fault",
        "disk",
        f"a folder or file can't be renamed in {scratch.parent}: {error or 'the old one is still visible'}",
        "Checkpoints are published by renaming: set runs_dir to another file system.",
    )


def _try_lock(scratch: Path, folder: Path, answer: Answer) -> None:
    """A lock that is held must be refused to a second open file of the same path."""
    todo = (
        "Two runs of the same name would write to the same folder: set runs_dir to another file system (Lustre: mount it with "
        "-o flock; NFS: version 4, or with its lock daemon)."
    )
    holds = False
    with (scratch / "lock").open("a+") as first, (scratch / "lock").open("a+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            answer.add("fault", "disk", f"flock doesn't work in {folder}: {error.strerror or error}", todo)
        else:
            with contextlib.suppress(OSError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                answer.add("fault", "disk", f"flock in {folder} grants the same lock twice", todo)
                answer.facts["flock"] = False
                return
            holds = True
    answer.facts["flock"] = holds
    if holds and answer.facts.get("rename"):
        answer.add("ok", "disk", f"renaming and flock work in {folder}")
