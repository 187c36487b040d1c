"""A rank that hangs ends the run: found by its notes, named with host, step and phase, with the stacks of all ranks.

Every rank has a ``HangWatch``, a thread that looks at the rank's own notes (``Progress``) and publishes what it saw as a
beat, under a key of the rank's own: no collective, so that it goes on whatever the others do. Two ranks of each of the first nodes read
the beats of all and judge. Who waits in a collective stands still as well, and is told apart from the rank that it waits
for by how many collectives each has started: the one that hangs has started the fewest.

What counts as getting on depends on the kind of the phase (see ``progress.Kind``). A part of a step that stands still
for ``parallel.hang_timeout`` hangs. Other work of the host gets three times as long for a single wait without a sign
of life, since a file system may keep a process waiting that long; while it computes, reads or writes, or says that it
gets on, it may take hours. Not watched at all is only what shows nothing from outside: downloads, compilers, another job's lock.
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
from dist_lora.supervision.local_ranks import leave_hang
from dist_lora.supervision.out_of_memory import counted_kills, read_counters
from dist_lora.supervision.store_watch import MOST_A_TICK_S, TICK_S, StoreWatch
from dist_lora.world.progress import Kind, Note
from dist_lora.world.world import World

LONG_TIMES, LONG_EXTRA_S = 3.0, 2.0  # how much longer work of the host may wait without a sign of life
COMPUTED_S = 0.05  # of a thread's processor time: a sign of life in a long phase
STACKS_S = 3.0  # what the ranks are given to write down their stacks
TOLD_S = 10.0  # and to hear that it is told
BACKSTOP_S = 30.0  # how much later than any hang a collective gives up by itself
HEAR_S = 1.0  # how often a rank looks whether a hang was found
JUDGES_A_NODE, JUDGING_NODES = 2, 8  # enough that some live, few enough for the store to answer all
LATE_PERIODS = 3  # a beat that is older says nothing of now
OF_A_STEP: tuple[Kind, ...] = ("paced", "host")


def limit_s(kind: Kind, timeout_s: float) -> float:
    """How long a phase of ``kind`` may stand still."""
    if kind == "unseen":
        return float("inf")
    return timeout_s if kind in OF_A_STEP else LONG_TIMES * timeout_s + LONG_EXTRA_S


def collective_timeout_s(timeout_s: float) -> float:
    """When a collective gives up by itself: late enough that whatever hangs is found and named before."""
    return limit_s("long", timeout_s) + BACKSTOP_S


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself, every ``HangWatch.period_s``."""

    world_rank: int
    host: str
    process: int
    number: int  # of the beat
    text: str = ""  # what it is at; of its threads, the one that stands still
    kind: Kind = "unseen"
    still_s: float = 0.0
    hangs: bool = False  # it stands still for longer than it may, and does not wait for another rank
    waits: bool = False  # it waits for another rank, by the store
    collectives: int = 0  # that it has started
    is_done: bool = False

    def is_otherwise_than(self, before: Beat) -> bool:
        """Whether this one has to be known at once, and not when the next is due."""
        return (self.hangs, self.waits, self.kind) != (before.hangs, before.waits, before.kind)


class Stillness:
    """How long each note of a rank has not changed."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Note, tuple[float, ...], float]] = {}

    def look(self, notes: Sequence[Note], *, elapsed_s: float, collectives: int) -> list[tuple[Note, float]]:
        """The notes and their seconds without a change; ``elapsed_s`` have passed since the last look."""
        found = []
        for note in notes:
            before = self._seen.get(note.thread)
            # Not of a paced phase: whoever waits for a GPU may do so by looking at it again and again.
            computed_s, transferred = 0.0, 0.0
            if note.kind in ("host", "long"):
                computed_s, transferred = _processor_s(note.thread), _transferred(note.native_thread)
            mark: tuple[float, ...] = (note.count, collectives if note.kind == "paced" else 0, transferred, computed_s)
            still_s = 0.0
            if before is not None and before[0] is note and _is_same(before[1], mark):
                mark, still_s = before[1], before[2] + elapsed_s
            self._seen[note.thread] = (note, mark, 0.0 if note.waits else still_s)
            found.append((note, self._seen[note.thread][2]))
        self._seen = {note.thread: self._seen[note.thread] for note in notes}
        return found


def _is_same(before: tuple[float, ...], now: tuple[float, ...]) -> bool:
    return before[:-1] == now[:-1] and now[-1] - before[-1] < COMPUTED_S


def _processor_s(thread: int) -> float:
    """Seconds that a thread of this process has computed; 0 where the system doesn't say."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    with contextlib.suppress(OSError):  # it has just ended
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return 0.0


def _transferred(native_thread: int) -> float:
    """Bytes that a thread of this process has read and written, of files and others; 0 where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path(f"/proc/self/task/{native_thread}/io").read_text().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    return 0.0


def collectives_started() -> int:
    """How many collectives this rank has started, in all of its groups together.

    All ranks are in as many groups of a kind and call the same collectives, so that these numbers can be compared.
    """
    if not dist.is_initialized():
        return 0
    total = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            total += group._get_sequence_number_for_group()
    return total


def ranks_that_hang(beats: Sequence[Beat], silent: Collection[int]) -> list[int]:
    """The ranks that all others wait for; none while somebody gets on, however slowly.

    Args:
        beats: the last of each rank.
        silent: ranks whose beats have stopped coming.
    """
    if silent:
        return sorted(silent)
    at_work = [beat for beat in beats if not (beat.is_done or beat.waits)]
    fewest = min((beat.collectives for beat in at_work), default=0)
    return [beat.world_rank for beat in at_work if beat.hangs and beat.collectives == fewest]


def describe_hang(
    beats: Sequence[Beat], hanging: Collection[int], *, silent: Collection[int], judge: Beat, stacks: Path
) -> str:
    """The one message of a hang.

    Args:
        beats: the last of each rank; a silent rank's may be older than what it hangs in.
        judge: the rank that says so, as it is now.
    """
    named = [_describe_rank(beats[rank], len(beats), is_silent=rank in silent) for rank in sorted(hanging)]
    shown = "; ".join(named[:4]) + (f"; and {len(named) - 4} more" if len(named) > 4 else "")
    others = ""
    if len(hanging) < len(beats):
        others = "The other ranks wait"
        if silent and judge.text:
            others += f" (rank {judge.world_rank} in {judge.text})"
        others += ". "
    elif len(beats) > 1:
        others = "No rank is ahead of the others: look at the connection between them. "
    return (
        f"{shown}. {others}The run ends; the Python stacks of the ranks are in {stacks}. "
        "The same command goes on from the last checkpoint; where such a pause is to be expected, raise parallel.hang_timeout."
    )


def _describe_rank(beat: Beat, world_size: int, *, is_silent: bool) -> str:
    who = f"rank {beat.world_rank} of {world_size} on {beat.host}" if world_size > 1 else f"this run (on {beat.host})"
    at = f" (its last word: {beat.text})" if beat.text else ""
    if is_silent:
        return f"{who} gives no sign of life{at}: process {beat.process} is stopped, gone, cut off, or stuck in a call that lets nothing else run"
    return f"{who} hangs: {beat.text}, without progress for {beat.still_s:.0f} s"


class HangWatch(threading.Thread):
    """Looks whether this rank and the others get on; where one doesn't, writes down stacks, tells once, and ends.

    Args:
        tell: shows the user an error; called on one rank of all.
    """

    def __init__(
        self,
        world: World,
        *,
        timeout_s: float,
        tell: Callable[[HangError], None],
        end: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(name="hang-watch", daemon=True)
        self._world, self._timeout_s, self._tell, self._end = world, timeout_s, tell, end
        self.period_s = min(max(timeout_s / 10, 0.5), 10.0)
        self._stopped = threading.Event()
        self._reach = StoreWatch(limit_s=timeout_s + 2 * self.period_s, when_silent=self._end_unreached)
        self._stillness = Stillness()
        self._beat = Beat(world.world_rank, socket.gethostname(), os.getpid(), 0)
        self._beats: dict[int, Beat] = {}  # as this judge has last read them
        self._silent_s: dict[int, float] = {}
        self._stacks_file: TextIO | None = None
        self._memory = read_counters()

    def stop(self) -> None:
        """Stop watching: this rank is done."""
        self._stopped.set()
        self._reach.stop()
        if threading.current_thread() is not self and self.is_alive():
            self.join(5 * TICK_S)
        faulthandler.cancel_dump_traceback_later()
        self._close_stacks_file()

    def leave(self) -> None:
        """Stop, and let the others know that nothing more is to be expected of this rank."""
        self.stop()
        if self._world.store is not None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                self._publish(Beat(self._world.world_rank, self._beat.host, os.getpid(), -1, is_done=True))

    def run(self) -> None:
        """See the class."""
        last_s = time.monotonic()
        due_s = hear_s = 0.0  # until the next beat and judgement, and until this rank listens again
        if self._world.store is not None:
            self._reach.start()
        try:
            with self._reach.asking():
                self._publish(self._beat)  # at once: a rank that is killed before its first tick is named, too
            while not self._stopped.wait(TICK_S):
                now_s = time.monotonic()
                elapsed_s, last_s = min(now_s - last_s, MOST_A_TICK_S), now_s
                due_s -= elapsed_s
                hear_s -= elapsed_s
                before = self._beat
                self._look(elapsed_s, is_next=due_s <= 0)
                if due_s <= 0 or self._beat.is_otherwise_than(before):
                    with self._reach.asking():
                        self._publish(self._beat)
                    self._arm()
                verdict = None
                with self._reach.asking():
                    if hear_s <= 0 or self._beat.hangs:
                        verdict, hear_s = self._heard(), HEAR_S
                    if verdict is None and (due_s <= 0 or self._beat.hangs):
                        verdict = self._judge()
                if verdict is not None:
                    self._finish(verdict)
                    return
                if due_s <= 0:
                    due_s = self.period_s
        except (RuntimeError, dist.DistError):
            return  # the store is gone, and with it the run: whoever waits for another rank will see it too

    def _look(self, elapsed_s: float, *, is_next: bool) -> None:
        collectives = collectives_started()
        seen = self._stillness.look(self._world.progress.notes(), elapsed_s=elapsed_s, collectives=collectives)
        beat = {
            **asdict(self._beat),
            "number": self._beat.number + is_next,
            "collectives": collectives,
            "hangs": False,
            "waits": any(note.waits for note, _ in seen),
        }
        late = [(still_s - limit_s(n.kind, self._timeout_s), n, still_s) for n, still_s in seen if not n.waits]
        shown = max(late, key=lambda each: each[0]) if any(each[0] >= 0 for each in late) else None
        if shown is not None:
            beat |= {"text": shown[1].text, "kind": shown[1].kind, "still_s": shown[2], "hangs": True}
        elif seen:
            beat |= {"text": seen[0][0].text, "kind": seen[0][0].kind, "still_s": seen[0][1]}
        # Of two threads one may hang while the other waits for what a third rank does: then this rank is not waiting.
        beat["waits"] = beat["waits"] and not beat["hangs"]
        self._beat = Beat(**beat)

    def _publish(self, beat: Beat) -> None:
        if self._world.store is not None:
            self._world.store.set(_beat_key(beat.world_rank), json.dumps(asdict(beat)))

    def gone(self) -> str:
        """Which ranks of this host are not there any more, and whether the kernel killed for want of memory; or empty."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._read_beats()
        gone = [
            f"the process of rank {beat.world_rank} of {self._world.world_size} on {beat.host} is not there any more "
            f"(its last word: {beat.text or 'starting'})"
            for beat in self._beats.values()
            if beat.host == self._beat.host and not beat.is_done and not _is_there(beat.process)
        ]
        kills = counted_kills(self._memory, read_counters())
        return (f"{'; '.join(gone)}. " if gone else "") + (f"{kills} " if kills else "")

    # To judge

    def _heard(self) -> dict[str, Any] | None:
        store = self._world.store
        if store is None or not store.check([_HANG_KEY]):
            return None
        heard: dict[str, Any] = json.loads(store.get(_HANG_KEY))
        return heard

    def _judge(self) -> dict[str, Any] | None:
        """The verdict, where a rank hangs and this rank was the first to see it."""
        world = self._world
        if world.local_rank >= JUDGES_A_NODE or world.world_rank // world.local_size >= JUDGING_NODES:
            return None
        silent = self._read_beats()
        late_s = LATE_PERIODS * self.period_s
        if not silent and any(silent_s > late_s for silent_s in self._silent_s.values()):
            return None  # what a rank said of itself is old: it will speak, or be silent for too long
        hanging = ranks_that_hang(list(self._beats.values()), silent)
        if not hanging:
            return None
        stacks = self._world.stacks or Path(tempfile.gettempdir()) / f"dist-lora-stacks-{os.getpid()}"
        beats = [self._beats.get(rank, Beat(rank, "an unknown host", 0, 0)) for rank in range(self._world.world_size)]
        verdict = {
            "by": self._world.world_rank,
            "message": describe_hang(beats, hanging, silent=silent, judge=self._beat, stacks=stacks),
            "stacks": str(stacks),
            "expected": sum(not beat.is_done for beat in beats) - len(silent),
            "has_silent": bool(silent),
        }
        store = self._world.store
        if store is not None:
            if store.add("hang/verdicts", 1) != 1:
                return None  # another judge was faster: its verdict is heard in a moment
            store.set(_HANG_KEY, json.dumps(verdict))
        return verdict

    def _read_beats(self) -> set[int]:
        """Read all beats; returns the ranks that have not published for as long as they may be silent."""
        store = self._world.store
        if store is None:
            self._beats = {0: self._beat}
            return set()
        ranks = range(self._world.world_size)
        there = [r for r in ranks if r in self._beats or store.check([_beat_key(r)])]
        silent = set()
        for rank, text in zip(there, store.multi_get([_beat_key(r) for r in there]), strict=True):
            beat, before = Beat(**json.loads(text)), self._beats.get(rank)
            self._beats[rank] = beat
            is_new = beat.is_done or beat != before
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + self._since_judged_s()
            kind: Kind = beat.kind if beat.kind in OF_A_STEP and not beat.waits else "long"
            if self._silent_s[rank] > limit_s(kind, self._timeout_s) + 2 * self.period_s:
                silent.add(rank)
        self._judged_s = time.monotonic()
        return silent

    _judged_s = 0.0

    def _since_judged_s(self) -> float:
        return min(time.monotonic() - self._judged_s, 2 * self.period_s)

    # To end

    def _finish(self, verdict: dict[str, Any]) -> None:
        """Write down this rank's stacks, see to it that the hang is told once, and end this process."""
        store = self._world.store
        with contextlib.suppress(OSError):
            self._write_stacks(Path(verdict["stacks"]))
        error = HangError(verdict["message"])
        if store is None:
            self._tell(error)
            self._end(EXIT_FAILED)
            return
        try:
            store.add("hang/written", 1)
            if verdict["by"] == self._world.world_rank:
                least_s = STACKS_S if verdict["has_silent"] else 0.0
                _wait(lambda: store.add("hang/written", 0) >= verdict["expected"], least_s=least_s, most_s=STACKS_S)
                leave_hang(os.environ)
                if self._world.fail(error):
                    self._tell(error)
                # The store may live in this process: it must not end before the others have heard.
                _wait(lambda: store.add("hang/heard", 0) >= verdict["expected"] - 1, most_s=STACKS_S)
            else:
                _wait(lambda: self._world.failure_elsewhere() is not None, most_s=TOLD_S)
                store.add("hang/heard", 1)
        except (RuntimeError, dist.DistError):
            pass  # the store is gone: so is the rank that tells
        self._end(EXIT_FAILED)

    def _end_unreached(self, silent_s: float) -> None:
        """Tell, once on each host, that the store is out of reach, and end this process.

        The run's folder may be behind the same network: whatever is written there has a few seconds.
        """
        last = threading.Timer(STACKS_S, self._end, (EXIT_FAILED,))
        last.daemon = True
        last.start()
        world, beat = self._world, self._beat
        if world.local_rank == 0:
            self._tell(
                HangError(
                    f"rank {world.world_rank} of {world.world_size} on {beat.host} (at {beat.text or 'its start'}) has had no "
                    f"answer from {world.meets_at} for {silent_s:.0f} s, where the ranks hear of each other: that host, or "
                    "the network to it, is gone. The same command goes on from the last checkpoint; where such a pause is "
                    "to be expected, raise parallel.hang_timeout."
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
            file.write(stacks_of_this_process(self._beat, self._world.world_size))

    def _arm(self) -> None:
        """Have the interpreter write down the stacks by itself where this thread doesn't come back in time.

        A call that never gives back the interpreter's lock stops this thread too.
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
        kind: Kind = self._beat.kind if self._beat.kind in OF_A_STEP else "long"
        after_s = limit_s(kind, self._timeout_s) + 2 * self.period_s
        faulthandler.dump_traceback_later(after_s, file=self._stacks_file)

    def _close_stacks_file(self) -> None:
        """A run that ended well leaves no empty files."""
        file, self._stacks_file = self._stacks_file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            path = Path(file.name)
            is_empty = os.fstat(file.fileno()).st_size == 0
            file.close()
            if is_empty:
                path.unlink()
                path.parent.rmdir()  # refused while other ranks' files are there


_HANG_KEY = "hang"


def _beat_key(world_rank: int) -> str:
    return f"beat/{world_rank}"


def _stacks_name(world_rank: int) -> str:
    return f"rank-{world_rank:05d}.txt"


def _is_there(process: int) -> bool:
    """Whether a process of this host lives; one that has ended and whose parent has not looked yet does not."""
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


def stacks_of_this_process(beat: Beat, world_size: int) -> str:
    """The Python stacks of all threads of this process but the one that asks, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    lines = [
        f"rank {beat.world_rank} of {world_size} on {beat.host}, process {beat.process}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {beat.text or 'starting'}, without progress for {beat.still_s:.0f} s, "
        f"{beat.collectives} collectives started{', waits for another rank' if beat.waits else ''}\n"
    ]
    for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main):
        lines.append(f"\nthread {names.get(ident, ident)}, most recent call last:\n")
        lines += traceback.format_stack(frame)
    return "".join(lines) + "\n"
