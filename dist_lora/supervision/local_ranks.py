"""Start the ranks of one machine and see them through: no launcher needed, one error shown and not N."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dist_lora.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from dist_lora.supervision.out_of_memory import Counters, Peaks, describe_kill, read_counters

POLL_S = 0.05
GRACE_S = 15.0  # what the others get to end by themselves when one has ended with an error
GRACE_LOST_S = 5.0  # and when it was killed or lost another: nobody will tell them, so they may wait for ever
GRACE_HANG_S = 2.0  # and when a rank was found to hang: it won't end by itself
TERM_S = 5.0  # and after they were asked to
PEAKS_S = 0.5  # how often the ranks' memory is looked at
EXIT_LOST_PEER = 113  # between a rank and us: it ends since another is gone, and doesn't know why


def run_ranks(arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run ``python -m dist_lora ARGUMENTS`` as ``num_ranks`` local ranks and return the exit code of the whole.

    The first rank to fail decides: its code is returned. Ranks print their own errors, and only the first; here
    is told only what no rank can tell of itself, that it was killed. TERM, INT and USR1 are passed on to the ranks,
    which save and end with 75.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []
    memory = read_counters()

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="dist-lora-") as folder:
        before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        try:
            for i in range(num_ranks):
                ranks.append(_start(arguments, num_ranks=num_ranks, local_rank=i, folder=Path(folder)))
            if asked:  # while they were started: not all of them have heard it
                pass_on(asked[-1], None)
            return _see_through(ranks, Path(folder), asked, memory)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end(ranks)


_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _start(arguments: Sequence[str], *, num_ranks: int, local_rank: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment |= {
        "RANK": str(local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "DIST_LORA_RENDEZVOUS": str(folder / "rendezvous"),
        "DIST_LORA_PARENT": str(os.getpid()),
    }
    # More threads than cores make every rank slower; what the user set stands.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # A session of its own: Ctrl-C reaches the ranks once, through us.
    return subprocess.Popen([sys.executable, "-m", "dist_lora", *arguments], env=environment, start_new_session=True)


def _see_through(ranks: list[subprocess.Popen[bytes]], folder: Path, asked: Sequence[int], memory: Counters) -> int:
    """Wait for all ranks, or for a while after the first failure; returns the exit code of the whole.

    ``asked``: the signals that were passed on, one by one. ``memory``: as it was counted before the ranks began.
    """
    failed: dict[int, int] = {}  # rank: exit code, in the order in which they ended
    peaks = Peaks([rank.pid for rank in ranks])
    running = set(range(len(ranks)))
    looked_s = 0.0
    deadline = float("inf")
    while True:
        if time.monotonic() - looked_s > PEAKS_S:
            looked_s = time.monotonic()
            peaks.look()
        codes = [rank.poll() for rank in ranks]
        ended = {i for i in running if codes[i] is not None}
        peaks.ended(ended)
        running -= ended
        new = {i: code for i, code in enumerate(codes) if code and i not in failed}
        failed |= new
        if new:
            is_told = all(code > 0 and code != EXIT_LOST_PEER for code in new.values())
            grace_s = GRACE_HANG_S if _hang_of(folder).exists() else GRACE_S if is_told else GRACE_LOST_S
            deadline = min(deadline, time.monotonic() + grace_s)
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if not failed:
        return EXIT_DONE
    if all(-code in asked or code == EXIT_STOPPED for code in failed.values()):
        if EXIT_STOPPED not in failed.values():  # they had not come so far as to listen to signals
            name = signal.Signals(asked[0]).name
            _say(f"stopped on {name}'s request: nothing is lost, and the same command goes on.")
        return EXIT_STOPPED
    # A rank that merely noticed another's end says less than the one that ended.
    cause = next((i for i, code in failed.items() if code != EXIT_LOST_PEER), next(iter(failed)))
    stuck = [i for i, rank in enumerate(ranks) if rank.poll() is None]
    return _tell(cause, failed[cause], folder, stuck, memory, peaks.num_bytes)


def leave_word(environment: Mapping[str, str], world_rank: int, text: str) -> bool:
    """Leave what a rank saw of another's end to the process that started it; False where no such process did."""
    if "DIST_LORA_PARENT" not in environment:
        return False
    with contextlib.suppress(OSError):
        _word_of(Path(environment["DIST_LORA_RENDEZVOUS"]).parent, world_rank).write_text(text)
    return True


def leave_hang(environment: Mapping[str, str]) -> None:
    """Let the process that started this rank know that a rank hangs and is told: there is nothing to wait for."""
    if "DIST_LORA_PARENT" in environment:
        with contextlib.suppress(OSError):
            _hang_of(Path(environment["DIST_LORA_RENDEZVOUS"]).parent).touch()


def _hang_of(folder: Path) -> Path:
    return folder / "hang"


def _word_of(folder: Path, world_rank: int) -> Path:
    return folder / f"word-of-{world_rank}"


def _tell(rank: int, code: int, folder: Path, stuck: Sequence[int], memory: Counters, peaks: Sequence[int]) -> int:
    """Tell what the rank could not tell of itself; returns the exit code.

    ``stuck``: the ranks that don't end. ``memory``: as counted before; ``peaks``: the most that each rank has held.
    """
    again = "The same command goes on from the last checkpoint."
    if code < 0:
        name = signal.Signals(-code).name
        why = f" {describe_kill(memory, read_counters(), peaks)}" if -code == signal.SIGKILL else ""
        _say(f"error: rank {rank} of {len(peaks)} was killed by {name}; the others are ended.{why} {again}")
        return EXIT_FAILED
    if code == EXIT_LOST_PEER:
        word = _word_of(folder, rank)
        seen = f" (rank {rank}: {word.read_text()})" if word.exists() else ""
        still = f"; still at work and now ended: rank {', '.join(map(str, stuck))}" if stuck else ""
        _say(f"error: the ranks lost their connection to each other{seen}{still}. {again}")
        return EXIT_FAILED
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + TERM_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
