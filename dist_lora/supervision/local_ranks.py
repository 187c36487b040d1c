"""Start the ranks of one machine and supervise them: no launcher needed, and one error is shown instead of N."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dist_lora.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from dist_lora.supervision.out_of_memory import Counters, Peaks, describe_kill, read_counters
from dist_lora.supervision.told import tell

POLL_S = 0.05
GRACE_S = 15.0  # how long the others have to end by themselves once one has ended with an error
GRACE_STOPPED_S = 120.0  # and if it has stopped on request: the first rank may still close its trackers
GRACE_LOST_S = 5.0  # and if it was killed or lost another: nothing notifies them, so they may wait forever
GRACE_HANG_S = 2.0  # and if a rank was found to hang: it won't end by itself
TERM_S = 5.0  # and after SIGTERM
PEAKS_S = 0.5  # how often the ranks' memory is sampled
EXIT_LOST_PEER = 113  # between a rank and its parent: it ends since another is gone, and doesn't know why


def run_ranks(arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run ``python -m dist_lora ARGUMENTS`` as ``num_ranks`` local ranks and return the exit code of the run.

    That of the first rank to fail. Only the first to fail prints its error; reported here is only what a rank can't
    report itself: that it was killed. TERM, INT, USR1 and HUP are passed on to the ranks, which save and end with 75; a HUP
    that is ignored (by nohup) stays so.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    passed_on: list[int] = []
    memory = read_counters()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="dist-lora-") as folder:
        heard = [number for number in _PASSED_ON if not is_ignored(number)]
        before = {number: signal.signal(number, pass_on) for number in heard}
        try:
            for i in range(num_ranks):
                ranks.append(_start(arguments, num_ranks=num_ranks, local_rank=i, folder=Path(folder)))
            if passed_on:  # while they were started: not all of them have got it
                pass_on(passed_on[-1], None)
            return _supervise(ranks, Path(folder), passed_on, memory)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _end(ranks)


_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def is_ignored(number: int) -> bool:
    """Whether a hangup, and only that, was ignored when this process began: ``nohup`` asks for it."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


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
    # More threads than cores make every rank slower; the user's own setting is kept.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # A session of its own: Ctrl-C reaches the ranks once, through us.
    return subprocess.Popen([sys.executable, "-m", "dist_lora", *arguments], env=environment, start_new_session=True)


def _supervise(ranks: list[subprocess.Popen[bytes]], folder: Path, passed_on: Sequence[int], memory: Counters) -> int:
    """Wait for all ranks, or for a while after the first failure; returns the exit code of the run.

    ``passed_on``: the signals that were passed on, one by one. ``memory``: the counters before the ranks began.
    """
    failed: dict[int, int] = {}  # rank: exit code, in the order in which they ended
    peaks = Peaks([rank.pid for rank in ranks])
    running = set(range(len(ranks)))
    sampled_s = 0.0
    deadline = float("inf")
    while True:
        if time.monotonic() - sampled_s > PEAKS_S:
            sampled_s = time.monotonic()
            peaks.look()
        codes = [rank.poll() for rank in ranks]
        ended = {i for i in running if codes[i] is not None}
        peaks.ended(ended)
        running -= ended
        new = {i: code for i, code in enumerate(codes) if code and i not in failed}
        failed |= new
        if new:
            deadline = min(deadline, time.monotonic() + _grace_s(new.values(), folder))
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if not failed:
        return EXIT_DONE
    if all(-code in passed_on or code == EXIT_STOPPED for code in failed.values()):
        if EXIT_STOPPED not in failed.values():  # they ended before they handled signals
            name = signal.Signals(passed_on[0]).name
            tell(f"interrupted by {name}: nothing is lost, and the same command resumes the run.")
        return EXIT_STOPPED
    cause = cause_of(failed)
    stuck = [i for i, rank in enumerate(ranks) if rank.poll() is None]
    return _report(cause, failed[cause], folder, stuck, memory, peaks.num_bytes)


def _grace_s(codes: Collection[int], folder: Path) -> float:
    """How long the others have to end once ranks have ended with these codes."""
    if _hang_note(folder).exists():
        return GRACE_HANG_S
    if all(code == EXIT_STOPPED for code in codes):
        return GRACE_STOPPED_S
    return GRACE_S if all(code > 0 and code != EXIT_LOST_PEER for code in codes) else GRACE_LOST_S


def cause_of(failed: Mapping[int, int]) -> int:
    """The rank that ended the run, of those that failed, in the order in which they did, with their exit codes.

    A rank that only noticed another's end knows less than the one that ended, and NCCL's watchdog aborts the process of a
    rank whose collective another has left.
    """
    for consequences in ((EXIT_LOST_PEER, -signal.SIGABRT), (EXIT_LOST_PEER,)):
        causes = [rank for rank, code in failed.items() if code not in consequences]
        if causes:
            return causes[0]
    return next(iter(failed))


def note_lost_peer(environment: Mapping[str, str], world_rank: int, text: str) -> bool:
    """Leave a rank's error about a lost peer to the process that started it; False where a launcher started it."""
    if "DIST_LORA_PARENT" not in environment:
        return False
    with contextlib.suppress(OSError):
        _lost_peer_note(Path(environment["DIST_LORA_RENDEZVOUS"]).parent, world_rank).write_text(text)
    return True


def note_hang(environment: Mapping[str, str]) -> None:
    """Tell the process that started this rank that a hang is being reported: there is nothing to wait for."""
    if "DIST_LORA_PARENT" in environment:
        with contextlib.suppress(OSError):
            _hang_note(Path(environment["DIST_LORA_RENDEZVOUS"]).parent).touch()


def _hang_note(folder: Path) -> Path:
    return folder / "hang"


def _lost_peer_note(folder: Path, world_rank: int) -> Path:
    return folder / f"word-of-{world_rank}"


def _report(rank: int, code: int, folder: Path, stuck: Sequence[int], memory: Counters, peaks: Sequence[int]) -> int:
    """Report what the rank couldn't report itself; returns the exit code.

    ``stuck``: the ranks that don't end. ``memory``: the counters before; ``peaks``: each rank's peak memory.
    """
    resume = "The same command resumes from the last checkpoint."
    if code < 0:
        name = signal.Signals(-code).name
        why = f" {describe_kill(memory, read_counters(), peaks)}" if -code == signal.SIGKILL else ""
        tell(f"error: rank {rank} of {len(peaks)} was killed by {name}; the other ranks were terminated.{why} {resume}")
        return EXIT_FAILED
    if code == EXIT_LOST_PEER:
        note = _lost_peer_note(folder, rank)
        seen = f" (rank {rank}: {note.read_text()})" if note.exists() else ""
        still = f"; still running, now terminated: rank {', '.join(map(str, stuck))}" if stuck else ""
        tell(f"error: the ranks lost their connection to each other{seen}{still}. {resume}")
        return EXIT_FAILED
    return code


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
