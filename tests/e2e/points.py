"""Points at which a run is killed from within, and what a run tells of its samples: armed in each rank.

A rank that reaches the point that ``DIST_LORA_AIM`` names sends SIGKILL to itself, to all ranks, to the launcher, or to
all of them. Most points lie at calls to the system, so that they are where the disk changes and not where the code has a
name for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Victim = Literal["rank", "ranks", "launcher", "all"]
VICTIMS: tuple[Victim, ...] = get_args(Victim)
INSIDE = ("step", "eval", "save", "rename", "deletion", "gathering", "loading", "tokenizing")

PARTIAL = re.compile(r"/checkpoints/\.step-\d+\.partial")
DELETED = re.compile(r"/checkpoints/\.step-\d+\.deleted")
GATHERED = re.compile(r"/\.?adapter(\.partial|\.replaced)?(/|$)")


@dataclass(frozen=True)
class Aim:
    """The ``nth`` time (from 1; never, where it is 0) that ``rank`` comes to a place, before what is done there or after it."""

    where: str
    nth: int
    rank: int
    is_after: bool
    victim: Victim

    def to_json(self) -> str:
        """For ``DIST_LORA_AIM``."""
        return json.dumps(asdict(self))


def arm() -> None:
    """Tell the samples of each step; kill where ``DIST_LORA_AIM`` says so, or, without it, count what comes by."""
    told, rank = Path(os.environ["DIST_LORA_TOLD"]), int(os.environ["RANK"])
    _tell_samples(told)
    if "DIST_LORA_AIM" not in os.environ:
        for where, lay in _PLACES.items():
            lay(_Trigger(Aim(where, 0, rank, False, "rank"), told))
        return
    aim = Aim(**json.loads(os.environ["DIST_LORA_AIM"]))
    if aim.rank == rank:
        _PLACES[aim.where](_Trigger(aim, told))


def came_by(told: Path) -> Counter[tuple[str, int]]:
    """How often each rank came to each place in a run without an aim: counts by (place, rank)."""
    found: Counter[tuple[str, int]] = Counter()
    for line in (told / "came").read_text().splitlines():
        where, rank = line.split()
        found[where, int(rank)] += 1
    return found


def doomed(victim: Victim, *, launcher: int, ranks: list[int], rank: int) -> list[int]:
    """The processes that are killed, ``rank`` last."""
    chosen = {"rank": [rank], "ranks": ranks, "launcher": [launcher], "all": [launcher, *ranks]}[victim]
    return sorted(chosen, key=lambda pid: pid == rank)


class _Trigger:
    """Counts how often a place is reached; the aimed time it kills."""

    def __init__(self, aim: Aim, told: Path) -> None:
        self._aim, self._told, self._count = aim, told, 0

    def around(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function that is done at the place."""
        self._count += 1
        if not self._aim.nth:
            _append(self._told / "came", f"{self._aim.where} {self._aim.rank}\n")
        is_now = self._count == self._aim.nth
        if is_now and not self._aim.is_after:
            self._strike()
        result = original(*arguments, **named)
        if is_now and self._aim.is_after:
            self._strike()
        return result

    def torn(self, original: Callable[..., Any], fd: int, data: memoryview) -> Any:
        """``os.write`` of a file, of which half is written when the process dies."""
        if self._count + 1 == self._aim.nth and not self._aim.is_after:
            original(fd, data[: len(data) // 2])
        return self.around(original, fd, data)

    def _strike(self) -> None:
        _append(self._told / "struck", f"{self._aim.where}\n")
        launcher = int(os.environ["DIST_LORA_PARENT"])
        ranks = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
        for pid in doomed(self._aim.victim, launcher=launcher, ranks=ranks, rank=os.getpid()):
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    _write(descriptor, text.encode())
    os.close(descriptor)


_write = os.write  # not the one that a trigger may lie on


def _tell_samples(told: Path) -> None:
    """Write down, in ``samples-RANK.jsonl``, what this rank is given for each step."""
    from dist_lora.data.loader import Loader

    rank, batch_of = int(os.environ["RANK"]), Loader.batch

    def batch(self: Loader, step: int) -> Any:
        made = batch_of(self, step)
        passes = [list(micro.sample_ids) for micro in made.micro_batches]
        line = {"step": step + 1, "all": list(made.sample_ids), "rank": passes}
        _append(told / f"samples-{rank}.jsonl", json.dumps(line) + "\n")
        return made

    Loader.batch = batch  # type: ignore[method-assign]


# Places


def _in_passes(trigger: _Trigger, *, of_training: bool) -> None:
    from dist_lora.train.build import Trainee

    run = Trainee.run

    def around(self: Trainee, batch: Any) -> Any:
        if self.model.training == of_training:
            return trigger.around(run, self, batch)
        return run(self, batch)

    Trainee.run = around  # type: ignore[method-assign]


def _in_loading(trigger: _Trigger) -> None:
    from dist_lora.base.stream import SliceReader

    read = SliceReader._read
    SliceReader._read = lambda *given, **named: trigger.around(read, *given, **named)  # type: ignore[method-assign]


def _in_tokenizing(trigger: _Trigger) -> None:
    from dist_lora.data import token_cache

    encode = token_cache.encode_sample
    token_cache.encode_sample = lambda *given, **named: trigger.around(encode, *given, **named)  # type: ignore[attr-defined]


def _at_calls(trigger: _Trigger, names: tuple[str, ...], is_here: Callable[[str, str], bool]) -> None:
    """At those calls of ``os`` whose path (the new one, of a renaming) is of the place."""
    for name in names:
        _at_call(trigger, name, is_here)


def _at_call(trigger: _Trigger, name: str, is_here: Callable[[str, str], bool]) -> None:
    original = getattr(os, name)

    def around(*given: Any, **named: Any) -> Any:
        source, target = path_of(given[0], named), ""
        if name in ("rename", "replace"):
            target = path_of(given[1], named)
        if not is_here(source, target):
            return original(*given, **named)
        return (trigger.torn if name == "write" else trigger.around)(original, *given, **named)

    setattr(os, name, around)


def path_of(given: Any, named: dict[str, Any]) -> str:
    """The path that a call to the system is about: of a name, or of an open file."""
    if isinstance(given, int):
        return os.readlink(f"/proc/self/fd/{given}")
    folder = named.get("dir_fd")
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd(), os.fspath(given))


def _in_a_save(trigger: _Trigger) -> None:
    _at_calls(trigger, ("mkdir", "write", "fsync"), lambda path, _: PARTIAL.search(path) is not None)


def _in_a_renaming(trigger: _Trigger) -> None:
    _at_calls(trigger, ("rename", "replace"), lambda path, _: "/runs/" in path or "/cache/" in path)


def _in_a_deletion(trigger: _Trigger) -> None:
    def is_here(path: str, new: str) -> bool:
        return DELETED.search(new or path) is not None or "/cache/" in path

    _at_calls(trigger, ("rename", "unlink", "rmdir"), is_here)


def _in_the_gathering(trigger: _Trigger) -> None:
    names = ("mkdir", "fsync", "rename", "unlink", "rmdir")
    _at_calls(trigger, names, lambda path, _: GATHERED.search(path) is not None)


_PLACES: dict[str, Callable[[_Trigger], None]] = {
    "step": lambda trigger: _in_passes(trigger, of_training=True),
    "eval": lambda trigger: _in_passes(trigger, of_training=False),
    "save": _in_a_save,
    "rename": _in_a_renaming,
    "deletion": _in_a_deletion,
    "gathering": _in_the_gathering,
    "loading": _in_loading,
    "tokenizing": _in_tokenizing,
}
