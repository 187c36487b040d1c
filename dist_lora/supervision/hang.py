"""Hang detection: a rank that hangs ends the run, is reported with host, step and phase, and all ranks write their stacks.

Every rank has a ``HangWatch``, a thread that looks at the rank's own notes (``Progress``) and publishes what it saw as a
heartbeat, under the rank's own key: not by a collective, so it works whatever the other ranks do. Two ranks of each of
the first nodes read all heartbeats and judge. A rank that waits in a collective makes no progress either; it is
distinguished from the rank that it waits for by the number of collectives started: the rank that hangs has started the
fewest.

What counts as progress depends on the kind of the phase (see ``progress.Kind``). A part of a step without progress for
``parallel.hang_timeout`` hangs. Other work on the host may wait three times as long without a sign of life, since a file
system may block a process for that long; while it computes, reads or writes, or says that it makes progress, it may take
hours. Only what can't be observed from outside isn't watched: downloads, compilers, another job's lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from dist_lora.errors import EXIT_FAILED, HangError
from dist_lora.supervision.local_ranks import note_hang
from dist_lora.supervision.out_of_memory import counted_kills, read_counters
from dist_lora.supervision.store_watch import MAX_TICK_S, TICK_S, StoreWatch
from dist_lora.text import count
from dist_lora.world.progress import Kind, Note
from dist_lora.world.world import World

LONG_TIMES, LONG_EXTRA_S = 3.0, 2.0  # how much longer work on the host may wait without a sign of life
COMPUTED_S = 0.05  # of a thread's CPU time: a sign of life in a long phase
STACKS_S = 3.0  # how long the ranks have to write their stacks
REPORTED_S = 10.0  # and to wait until the hang is reported
BACKSTOP_S = 30.0  # how much later than any hang is found a collective times out
HEAR_S = 1.0  # how often a rank checks whether a hang was found
JUDGES_PER_NODE, JUDGING_NODES = 2, 8  # enough that some are alive, few enough for the store to answer all
LATE_PERIODS = 3  # an older heartbeat says nothing about the present
OF_A_STEP: tuple[Kind, ...] = ("paced", "host")


def limit_s(kind: Kind, timeout_s: float) -> float:
    """How long a phase of ``kind`` may make no progress."""
    if kind == "unseen":
        return float("inf")
    return timeout_s if kind in OF_A_STEP else LONG_TIMES * timeout_s + LONG_EXTRA_S


def collective_timeout_s(timeout_s: float) -> float:
    """The timeout of collectives: late enough that a hang is found and reported before."""
    return limit_s("long", timeout_s) + BACKSTOP_S


@dataclass(frozen=True)
class Heartbeat:
    """What a rank publishes about itself, every ``HangWatch.period_s``."""

    world_rank: int
    host: str
    process: int
    number: int  # of the heartbeat
    text: str = ""  # what it is doing; of several threads, the one without progress
    kind: Kind = "unseen"
    still_s: float = 0.0
    hangs: bool = False  # it has made no progress for too long, and doesn't wait for another rank
    waits: bool = False  # it waits for another rank, on the store
    collectives: int = 0  # started so far
    is_done: bool = False

    def has_news_since(self, before: Heartbeat) -> bool:
        """Whether it has to be published at once, and not when the next is due."""
        return (self.hangs, self.waits, self.kind) != (before.hangs, before.waits, before.kind)


class Stillness:
    """How long each note of a rank hasn't changed."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Note, tuple[float, ...], float]] = {}

    def look(self, notes: Sequence[Note], *, elapsed_s: float, collectives: int) -> list[tuple[Note, float]]:
        """The notes and their seconds without a change; ``elapsed_s`` have passed since the last look."""
        looked = []
        for note in notes:
            before = self._seen.get(note.thread)
            # Not for a paced phase: waiting for a GPU may be a busy loop.
            computed_s, transferred = 0.0, 0.0
            if note.kind in ("host", "long"):
                computed_s, transferred = _cpu_s(note.thread), _transferred(note.native_thread)
            mark: tuple[float, ...] = (note.count, collectives if note.kind == "paced" else 0, transferred, computed_s)
            still_s = 0.0
            if before is not None and before[0] is note and _is_same(before[1], mark):
                mark, still_s = before[1], before[2] + elapsed_s
            self._seen[note.thread] = (note, mark, 0.0 if note.waits else still_s)
            looked.append((note, self._seen[note.thread][2]))
        self._seen = {note.thread: self._seen[note.thread] for note in notes}
        return looked


def _is_same(before: tuple[float, ...], now: tuple[float, ...]) -> bool:
    return before[:-1] == now[:-1] and now[-1] - before[-1] < COMPUTED_S


def _cpu_s(thread: int) -> float:
    """CPU seconds of a thread of this process; 0 where the system doesn't say."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    with contextlib.suppress(OSError):  # it has just ended
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return 0.0


def _transferred(native_thread: int) -> float:
    """Bytes that a thread of this process has read and written, in files and elsewhere; 0 where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path(f"/proc/self/task/{native_thread}/io").read_text().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    return 0.0


def collectives_started() -> int:
    """How many collectives this rank has started, in all of its process groups.

    All ranks are in the same number of groups of a kind and call the same collectives, so these numbers can be compared.
    """
    if not dist.is_initialized():
        return 0
    total = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            total += group._get_sequence_number_for_group()
    return total


def ranks_that_hang(heartbeats: Sequence[Heartbeat], silent: Collection[int]) -> list[int]:
    """The ranks that all others wait for; none while one of them makes progress, however slowly.

    Args:
        heartbeats: the last of each rank.
        silent: ranks whose heartbeats have stopped.
    """
    if silent:
        return sorted(silent)
    active = [heartbeat for heartbeat in heartbeats if not (heartbeat.is_done or heartbeat.waits)]
    fewest = min((heartbeat.collectives for heartbeat in active), default=0)
    return [heartbeat.world_rank for heartbeat in active if heartbeat.hangs and heartbeat.collectives == fewest]


def describe_hang(
    heartbeats: Sequence[Heartbeat],
    hanging: Collection[int],
    *,
    silent: Collection[int],
    judge: Heartbeat,
    stacks: Path,
    on_gpu: bool = False,
) -> str:
    """The message of a hang.

    Args:
        heartbeats: the last of each rank; a silent rank's may be older than what it hangs in.
        judge: the current one of the rank that found the hang.
        on_gpu: collectives are NCCL's, which count as started once they are enqueued: a rank may be behind unseen.
    """
    named = [_describe_rank(heartbeats[rank], len(heartbeats), is_silent=rank in silent) for rank in sorted(hanging)]
    shown = "; ".join(named[:4]) + (f"; and {len(named) - 4} more" if len(named) > 4 else "")
    others = ""
    if len(hanging) < len(heartbeats):
        others = "The other ranks wait"
        if silent and judge.text:
            others += f" (rank {judge.world_rank} in {judge.text})"
        others += ". "
    elif len(heartbeats) > 1 and on_gpu:
        others = (
            "All have enqueued the same collectives, so which GPU or link the others wait for isn't known here: look for Xid "
            "errors in dmesg, and start again with NCCL_DEBUG=INFO. "
        )
    elif len(heartbeats) > 1:
        others = "No rank is ahead of the others: check the network between them. "
    return (
        f"{shown}. {others}The run ends; the Python stacks of the ranks are in {stacks}. "
        "The same command resumes from the last checkpoint; if such a pause is expected, raise parallel.hang_timeout."
    )


def _describe_rank(heartbeat: Heartbeat, world_size: int, *, is_silent: bool) -> str:
    host, text = heartbeat.host, heartbeat.text
    rank = f"rank {heartbeat.world_rank} of {world_size} on {host}" if world_size > 1 else f"this run (on {host})"
    if is_silent:
        last_seen = f" (last reported: {text})" if text else ""
        return (
            f"{rank} doesn't respond{last_seen}: process {heartbeat.process} is stopped, gone, disconnected, or stuck in a "
            "call that never releases the GIL"
        )
    return f"{rank} hangs: {text}, without progress for {heartbeat.still_s:.0f} s"


@dataclass(frozen=True)
class HangReport:
    """What the judge that found a hang publishes to all ranks."""

    judge_rank: int  # it reports the hang to the user
    message: str
    stacks: str  # the folder for the stacks of the ranks
    num_responding: int  # ranks that are expected to write their stacks
    has_silent: bool  # a rank doesn't respond


class HangWatch(threading.Thread):
    """Watches the progress of this rank and the others; where one hangs, writes stacks, reports it once, and ends.

    Args:
        report: shows the user an error; called on one rank only.
    """

    def __init__(
        self,
        world: World,
        *,
        timeout_s: float,
        report: Callable[[HangError], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(name="hang-watch", daemon=True)
        self._world, self._timeout_s, self._report, self._end = world, timeout_s, report, end
        self.period_s = min(max(timeout_s / 10, 0.5), 10.0)
        self._stopped = threading.Event()
        self._store_watch = StoreWatch(limit_s=timeout_s + 2 * self.period_s, when_silent=self._end_without_store)
        self._stillness = Stillness()
        self._heartbeat = Heartbeat(world.world_rank, socket.gethostname(), os.getpid(), 0)
        self._heartbeats: dict[int, Heartbeat] = {}  # as this judge last read them
        self._silent_s: dict[int, float] = {}
        self._stacks_file: TextIO | None = None
        self._memory = read_counters()

    def stop(self) -> None:
        """Stop watching: this rank is done."""
        self._stopped.set()
        self._store_watch.stop()
        if threading.current_thread() is not self and self.is_alive():
            self.join(5 * TICK_S)
        faulthandler.cancel_dump_traceback_later()
        self._close_stacks_file()

    def leave(self) -> None:
        """Stop, and tell the others that this rank is done."""
        self.stop()
        if self._world.store is not None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                self._publish(Heartbeat(self._world.world_rank, self._heartbeat.host, os.getpid(), -1, is_done=True))

    def run(self) -> None:
        """See the class."""
        last_s = time.monotonic()
        due_s = hear_s = 0.0  # until the next heartbeat and judgement, and until the next look for a hang report
        if self._world.store is not None:
            self._store_watch.start()
        try:
            with self._store_watch.asking():
                self._publish(self._heartbeat)  # at once: so that a rank killed before its first tick is named too
            while not self._stopped.wait(TICK_S):
                now_s = time.monotonic()
                elapsed_s, last_s = min(now_s - last_s, MAX_TICK_S), now_s
                due_s -= elapsed_s
                hear_s -= elapsed_s
                before = self._heartbeat
                self._look(elapsed_s, is_next=due_s <= 0)
                if due_s <= 0 or self._heartbeat.has_news_since(before):
                    with self._store_watch.asking():
                        self._publish(self._heartbeat)
                    self._arm()
                report = None
                with self._store_watch.asking():
                    if hear_s <= 0 or self._heartbeat.hangs:
                        report, hear_s = self._published_report(), HEAR_S
                    if report is None and (due_s <= 0 or self._heartbeat.hangs):
                        report = self._judge()
                if report is not None:
                    self._finish(report)
                    return
                if due_s <= 0:
                    due_s = self.period_s
        except (RuntimeError, dist.DistError):
            return  # the store is gone, and the run with it: a rank that waits for another will notice too

    def _look(self, elapsed_s: float, *, is_next: bool) -> None:
        collectives = collectives_started()
        seen = self._stillness.look(self._world.progress.notes(), elapsed_s=elapsed_s, collectives=collectives)
        values = {
            **asdict(self._heartbeat),
            "number": self._heartbeat.number + is_next,
            "collectives": collectives,
            "hangs": False,
            "waits": any(note.waits for note, _ in seen),
        }
        late = [(still_s - limit_s(n.kind, self._timeout_s), n, still_s) for n, still_s in seen if not n.waits]
        latest = max(late, key=lambda entry: entry[0], default=None)
        if latest is not None and latest[0] >= 0:
            _, note, still_s = latest
            values |= {"text": note.text, "kind": note.kind, "still_s": still_s, "hangs": True}
        elif seen:
            note, still_s = seen[0]
            values |= {"text": note.text, "kind": note.kind, "still_s": still_s}
        # Of two threads one may hang while the other waits for what a third rank does: then this rank isn't waiting.
        values["waits"] = values["waits"] and not values["hangs"]
        self._heartbeat = Heartbeat(**values)

    def _publish(self, heartbeat: Heartbeat) -> None:
        if self._world.store is not None:
            self._world.store.set(_heartbeat_key(heartbeat.world_rank), json.dumps(asdict(heartbeat)))

    def gone(self) -> str:
        """Which ranks of this host have exited, and whether the kernel killed processes for lack of memory; or empty."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._read_heartbeats()
        gone = [
            f"the process of rank {last.world_rank} of {self._world.world_size} on {last.host} no longer exists "
            f"(last reported: {last.text or 'starting'})"
            for last in self._heartbeats.values()
            if last.host == self._heartbeat.host and not last.is_done and not _is_alive(last.process)
        ]
        kills = counted_kills(self._memory, read_counters())
        return (f"{'; '.join(gone)}. " if gone else "") + (f"{kills} " if kills else "")

    # To judge

    def _published_report(self) -> HangReport | None:
        store = self._world.store
        if store is None or not store.check([_HANG_KEY]):
            return None
        return HangReport(**json.loads(store.get(_HANG_KEY)))

    def _judge(self) -> HangReport | None:
        """The report, where a rank hangs and this rank was the first to find it."""
        world = self._world
        if world.local_rank >= JUDGES_PER_NODE or world.world_rank // world.local_size >= JUDGING_NODES:
            return None
        silent = self._read_heartbeats()
        late_s = LATE_PERIODS * self.period_s
        if not silent and any(silent_s > late_s for silent_s in self._silent_s.values()):
            return None  # a heartbeat is old: the next one comes soon, or the rank has been silent for too long
        hanging = ranks_that_hang(list(self._heartbeats.values()), silent)
        if not hanging:
            return None
        stacks = self._world.stacks or Path(tempfile.gettempdir()) / f"dist-lora-stacks-{os.getpid()}"
        unknown = "an unknown host"
        last = [self._heartbeats.get(r, Heartbeat(r, unknown, 0, 0)) for r in range(self._world.world_size)]
        report = HangReport(
            judge_rank=self._world.world_rank,
            message=describe_hang(
                last,
                hanging,
                silent=silent,
                judge=self._heartbeat,
                stacks=stacks,
                on_gpu=self._world.device.type == "cuda",
            ),
            stacks=str(stacks),
            num_responding=sum(not heartbeat.is_done for heartbeat in last) - len(silent),
            has_silent=bool(silent),
        )
        store = self._world.store
        if store is not None:
            if store.add("hang/reports", 1) != 1:
                return None  # another judge was faster: its report is read in a moment
            store.set(_HANG_KEY, json.dumps(asdict(report)))
        return report

    def _read_heartbeats(self) -> set[int]:
        """Read all heartbeats; returns the ranks that have been silent for longer than they may be."""
        store = self._world.store
        if store is None:
            self._heartbeats = {0: self._heartbeat}
            return set()
        ranks = range(self._world.world_size)
        published = [r for r in ranks if r in self._heartbeats or store.check([_heartbeat_key(r)])]
        silent = set()
        for rank, text in zip(published, store.multi_get([_heartbeat_key(r) for r in published]), strict=True):
            last, before = Heartbeat(**json.loads(text)), self._heartbeats.get(rank)
            self._heartbeats[rank] = last
            is_new = last.is_done or last != before
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + self._since_judged_s()
            kind: Kind = last.kind if last.kind in OF_A_STEP and not last.waits else "long"
            if self._silent_s[rank] > limit_s(kind, self._timeout_s) + 2 * self.period_s:
                silent.add(rank)
        self._judged_s = time.monotonic()
        return silent

    _judged_s = 0.0

    def _since_judged_s(self) -> float:
        return min(time.monotonic() - self._judged_s, 2 * self.period_s)

    # To end

    def _finish(self, report: HangReport) -> None:
        """Write this rank's stacks, have the hang reported once, and end this process."""
        store = self._world.store
        with contextlib.suppress(OSError):
            self._write_stacks(Path(report.stacks))
        error = HangError(report.message)
        if store is None:
            self._report(error)
            self._end(EXIT_FAILED)
            return
        try:
            store.add("hang/written", 1)
            if report.judge_rank == self._world.world_rank:
                least_s = STACKS_S if report.has_silent else 0.0
                _wait(lambda: store.add("hang/written", 0) >= report.num_responding, least_s=least_s, most_s=STACKS_S)
                note_hang(os.environ)
                if self._world.fail(error):
                    self._report(error)
                # This process may host the store: it must not end before the others have read the report.
                _wait(lambda: store.add("hang/heard", 0) >= report.num_responding - 1, most_s=STACKS_S)
            else:
                _wait(lambda: self._world.failure_elsewhere() is not None, most_s=REPORTED_S)
                store.add("hang/heard", 1)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone, and so is the rank that reports
        self._end(EXIT_FAILED)

    def _end_without_store(self, silent_s: float) -> None:
        """Report, once per host, that the store can't be reached, and end this process.

        The run's folder may be behind the same network: what is written there has a few seconds.
        """
        last = threading.Timer(STACKS_S, self._end, (EXIT_FAILED,))
        last.daemon = True
        last.start()
        world, heartbeat = self._world, self._heartbeat
        if world.local_rank == 0:
            self._report(
                HangError(
                    f"rank {world.world_rank} of {world.world_size} on {heartbeat.host} (in: {heartbeat.text or 'starting'}) "
                    f"has had no answer from the store at {world.store_address} for {silent_s:.0f} s: that host, or the "
                    "network to it, is gone. The same command resumes from the last checkpoint; if such a pause is "
                    "expected, raise parallel.hang_timeout."
                )
            )
        with contextlib.suppress(OSError):
            self._write_stacks(world.stacks or Path(tempfile.gettempdir()) / f"dist-lora-stacks-{os.getpid()}")
        last.cancel()
        self._end(EXIT_FAILED)

    def _write_stacks(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        faulthandler.cancel_dump_traceback_later()
        with (folder / _stacks_name(self._world.world_rank)).open("a") as file:
            file.write(stacks_of_this_process(self._heartbeat, self._world.world_size))

    def _arm(self) -> None:
        """Have the interpreter write the stacks by itself where this thread doesn't run again in time.

        A call that never releases the GIL stops this thread too.
        """
        folder = self._world.stacks
        if folder is None:
            return
        if self._stacks_file is None:
            try:
                folder.mkdir(exist_ok=True)
                self._stacks_file = (folder / _stacks_name(self._world.world_rank)).open("a")
            except OSError:
                return
        kind: Kind = self._heartbeat.kind if self._heartbeat.kind in OF_A_STEP else "long"
        after_s = limit_s(kind, self._timeout_s) + 2 * self.period_s
        faulthandler.dump_traceback_later(after_s, file=self._stacks_file)

    def _close_stacks_file(self) -> None:
        """Close it, and remove it where it is empty: a run that ended well leaves no stacks."""
        file, self._stacks_file = self._stacks_file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            path = Path(file.name)
            is_empty = os.fstat(file.fileno()).st_size == 0
            file.close()
            if is_empty:
                path.unlink()
                path.parent.rmdir()  # refused while it holds other ranks' files


_HANG_KEY = "hang"


def _heartbeat_key(world_rank: int) -> str:
    return f"heartbeat/{world_rank}"


def _stacks_name(world_rank: int) -> str:
    return f"rank-{world_rank:05d}.txt"


def _is_alive(process: int) -> bool:
    """Whether a process of this host is alive; a zombie isn't."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True


def _wait(is_so: Callable[[], bool], *, least_s: float = 0.0, most_s: float) -> None:
    started_s = time.monotonic()
    while (past_s := time.monotonic() - started_s) < most_s and (past_s < least_s or not is_so()):
        time.sleep(0.05)


def stacks_of_this_process(heartbeat: Heartbeat, world_size: int) -> str:
    """The Python stacks of all threads of this process but the calling one, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    lines = [
        f"rank {heartbeat.world_rank} of {world_size} on {heartbeat.host}, process {heartbeat.process}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {heartbeat.text or 'starting'}, without progress for "
        f"{heartbeat.still_s:.0f} s, {count(heartbeat.collectives, 'collective')} started"
        f"{', waits for another rank' if heartbeat.waits else ''}\n"
    ]
    for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main):
        lines.append(f"\nthread {names.get(ident, ident)}, most recent call last:\n")
        lines += traceback.format_stack(frame)
    return "".join(lines) + "\n"
