"""The disk of the runs' folder: room, measured speed, and whether what a run relies on works there."""

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
MOST_BYTES, MOST_S = 2**28, 3.0  # what is written at most, and for how long
LEAST_FREE_BYTES = 10 * 2**30
SLOW_BYTES_PER_S = 50e6


def examine_disk(folder: Path) -> Answer:
    """The disk on which ``folder`` lies, or will lie; what is written for it is taken away again.

    Raises:
        OSError: the disk refuses to be written or read.
    """
    there = _nearest(folder)
    answer = Answer(facts={"folder": str(folder)})
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".doctor-", dir=there))
    except OSError as error:
        answer.add(
            "fault",
            "disk",
            f"{there} can't be written: {error.strerror or error}",
            "Set runs_dir to a folder that can, or ask for the right to write there.",
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
    """The folder, or the first above it that is there."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.is_dir()), Path("/"))


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
            "Make room, or set runs_dir elsewhere: `dist-lora plan` says what a run's checkpoints take.",
        )
    if min(write, read) < SLOW_BYTES_PER_S:
        answer.add(
            "warning",
            "disk",
            f"{folder} writes {write / 1e6:.0f} MB/s and reads {read / 1e6:.0f} MB/s",
            "Put runs_dir and the model on a faster disk; loading the base reads all of it.",
        )


def _write(file: Path, num_bytes: int) -> tuple[float, int]:
    """Seconds, and the bytes that were written in them and brought to the disk."""
    chunk = os.urandom(CHUNK_BYTES)
    written = 0
    started_s = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        while written < num_bytes and time.perf_counter() - started_s < MOST_S:
            written += out.write(chunk)
        os.fsync(out.fileno())
    return time.perf_counter() - started_s, written


def _read(file: Path) -> float:
    """Seconds to read a file from the disk, as far as the system can be made to forget it."""
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
        f"a folder or file can't be renamed in {scratch.parent}: {error or 'the old one is still seen'}",
        "Checkpoints are published by a renaming: set runs_dir to another file system.",
    )


def _try_lock(scratch: Path, folder: Path, answer: Answer) -> None:
    """A lock that is held must be refused to another opening of the same file."""
    todo = (
        "Two runs of one name would write into one folder: set runs_dir to another file system (Lustre: mount it with "
        "-o flock; NFS: version 4, or with its lock daemon)."
    )
    holds = False
    with (scratch / "lock").open("a+") as first, (scratch / "lock").open("a+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            answer.add("fault", "disk", f"flock does not work in {folder}: {error.strerror or error}", todo)
        else:
            with contextlib.suppress(OSError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                answer.add("fault", "disk", f"flock in {folder} lets two hold one lock", todo)
                answer.facts["flock"] = False
                return
            holds = True
    answer.facts["flock"] = holds
    if holds and answer.facts.get("rename"):
        answer.add("ok", "disk", "renaming and flock work there")
