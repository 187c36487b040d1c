"""Memory that ran out, on a GPU or on the host: what was asked and held, what helps, and what the system counted.

No torch at the top: the process that starts the ranks reads the system's counters too.
"""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_lora.errors import DistLoraError, OutOfMemory
from dist_lora.text import gib

if TYPE_CHECKING:
    from dist_lora.config.schema import Config
    from dist_lora.world.world import World

NO_LIMIT_BYTES = 2**60  # control groups of version 1 write a number of this size for none
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.,]+ ?\w+)", re.IGNORECASE)

Where = Literal["device", "host"]


# What a rank says when it is refused memory


def out_of_memory(error: BaseException, *, world: World | None, config: Config) -> OutOfMemory | None:
    """What to tell the user of ``error`` where it says that memory ran out; None where it says something else."""
    where = _where(error)
    if where is None:
        return None
    asked = ASKED.search(str(error))
    held = _held_on_device(world) if where == "device" and world is not None else []
    held += held_on_host()
    phase = world.progress.where(error) if world is not None else ""
    helps = what_helps(config, where=where, phase=phase, is_on_gpu=world is not None and world.device.type == "cuda")
    return OutOfMemory(
        f"out of memory on the {'GPU' if where == 'device' else 'host'}: "
        + (f"{asked[1]} were asked for; " if asked else "")
        + f"{'; '.join(held)}. What helps, the cheapest first: {'; '.join(helps)}."
    )


def _where(error: BaseException) -> Where | None:
    import torch

    text = str(error)
    if isinstance(error, DistLoraError):
        return None
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "out of memory" in text):
        return "device"
    is_hosts = (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )
    return "host" if is_hosts else None


def _held_on_device(world: World) -> list[str]:
    import torch

    if world.device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(world.device)
    return [
        f"this rank's tensors take {gib(torch.cuda.memory_allocated(world.device))} of {gib(total)} on {world.device} "
        f"({gib(torch.cuda.memory_reserved(world.device))} are reserved for them, {gib(free)} are free)"
    ]


def held_on_host() -> list[str]:
    """What this process holds of the host's memory, and what there is: one or two clauses."""
    import psutil

    memory = psutil.virtual_memory()
    held = f"this process holds {gib(psutil.Process().memory_info().rss)} of the host's {gib(memory.total)}"
    clauses = [f"{held}, {gib(memory.available)} are available"]
    limit = read_counters().limit_bytes
    if limit is not None:
        clauses.append(f"its control group is limited to {gib(limit)}")
    return clauses


def what_helps(config: Config, *, where: Where, phase: str, is_on_gpu: bool) -> list[str]:
    """The changes of a config that save memory there, the cheapest first; at least one."""
    train, changes = config.train, []
    if phase.startswith("step") or "evaluating" in phase:  # what a pass holds; before it, only the base and its reading
        if "evaluating" in phase and (config.eval.batch or 0) > 1:
            changes.append(f"eval.batch={(config.eval.batch or 2) // 2}")
        if train.micro_batch > 1:
            changes.append(f"train.micro_batch={train.micro_batch // 2} (is {train.micro_batch})")
        if train.activation_checkpointing is False or (train.activation_checkpointing == "auto" and not is_on_gpu):
            changes.append("train.activation_checkpointing=true")
        changes.append(f"train.sequence_length={max(2, train.sequence_length // 2)} (is {train.sequence_length})")
    if config.model.quant != "nf4":
        changes.append(f"model.quant=nf4 (is {config.model.quant})")
    offload = config.parallel.offload
    if where == "device" and offload != "all":
        changes.append(f"parallel.offload={'base' if offload == 'none' else 'all'} (is {offload})")
    if where == "host" and is_on_gpu and offload != "none":
        changes.append(f"parallel.offload=none (is {offload}, which keeps it in the host's memory)")
    changes.append(
        "more GPUs, of which each keeps less" if where == "device" else "more nodes, of which each keeps less"
    )
    return changes


# What the system has counted


@dataclass(frozen=True)
class Counters:
    """How many processes the kernel has killed for want of memory, and how much there may be.

    ``group_kills``: in this process's control group (a container, a batch job); ``host_kills``: on the whole host. None
    where the system doesn't say.
    """

    group_kills: int | None = None
    limit_bytes: int | None = None
    host_kills: int | None = None
    total_bytes: int | None = None


def read_counters(root: Path = Path("/")) -> Counters:
    """The counters of now, by control groups of either version. Outside of Linux there are none."""
    folders, names = _group_folders(root)
    events, limit = names
    limits = [bytes_ for f in folders if (bytes_ := _number(f / limit)) is not None and bytes_ < NO_LIMIT_BYTES]
    total_kib = _field(root / "proc/meminfo", "MemTotal:")
    return Counters(
        group_kills=_field(folders[0] / events, "oom_kill") if folders else None,
        limit_bytes=min(limits, default=None),
        host_kills=_field(root / "proc/vmstat", "oom_kill"),
        total_bytes=None if total_kib is None else total_kib * 1024,
    )


def _group_folders(root: Path) -> tuple[list[Path], tuple[str, str]]:
    """The folders of this process's control group and of those above it, nearest first, and the files' names."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    mounted = root / "sys/fs/cgroup"
    path, top, names = "", mounted, ("memory.events", "memory.max")
    for _, controllers, group in (line for line in lines if len(line) == 3):
        if "memory" in controllers.split(","):
            path, top, names = group, mounted / "memory", ("memory.oom_control", "memory.limit_in_bytes")
            break
        if not controllers:
            path = group
    own = top / path.strip("/")
    folders = [own, *(above for above in own.parents if above.is_relative_to(top))]
    return [folder for folder in folders if (folder / names[0]).exists() or (folder / names[1]).exists()], names


def _field(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.split(maxsplit=1)[:1] == [name]:
                return int(line.split()[1])
    return None


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        return int(path.read_text())
    return None


def peak_bytes_of(process: int) -> int | None:
    """The most of the host's memory that a process has held so far; None once it has ended."""
    kib = _field(Path(f"/proc/{process}/status"), "VmHWM:")
    return None if kib is None else kib * 1024


class Peaks:
    """The most of the host's memory that each process of a list has held, as their parent sees it.

    ``look`` sees what they have held so far, ``ended`` what the system remembers of one that has been waited for: the
    most of all children so far, so that the last moments of a process count where they were the worst.
    """

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = list(processes)
        self.num_bytes = [0] * len(self._processes)
        self._most_of_ended = _most_of_ended_bytes()

    def look(self) -> None:
        """Look at those that live."""
        for i, process in enumerate(self._processes):
            self.num_bytes[i] = max(self.num_bytes[i], peak_bytes_of(process) or 0)

    def ended(self, numbers: Collection[int]) -> None:
        """These processes have just been waited for."""
        most = _most_of_ended_bytes()
        if numbers and most > self._most_of_ended:
            self._most_of_ended = most
            largest = max(numbers, key=lambda i: self.num_bytes[i])
            self.num_bytes[largest] = max(self.num_bytes[largest], most)


def _most_of_ended_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def counted_kills(before: Counters, after: Counters) -> str:
    """That memory ran out and the kernel killed for it, where its counters have risen; else empty."""
    for now, then, whose in (
        (after.group_kills, before.group_kills, "this control group"),
        (after.host_kills, before.host_kills, "this host"),
    ):
        if now is not None and then is not None and now > then:
            count = f"{now - then} process{'es' if now - then > 1 else ''}"
            return f"Memory ran out: the kernel has killed {count} of {whose} for it meanwhile (oom_kill)."
    return ""


def describe_kill(before: Counters, after: Counters, peaks: Sequence[int]) -> str:
    """Why a rank may have been killed by SIGKILL, as far as the system's counters show it.

    Args:
        peaks: the most that each rank has held, in bytes; 0 where it isn't known.
    """
    there = f"the host has {gib(after.total_bytes)}" if after.total_bytes else "the host's size is unknown"
    if after.limit_bytes is not None:
        there += f", this control group may take {gib(after.limit_bytes)}"
    held = f"The ranks held at most {', '.join(gib(peak) for peak in peaks)}; {there}."
    fact = counted_kills(before, after)
    if fact:
        return f"{fact} {held}"
    counted = after.group_kills is not None or after.host_kills is not None
    seen = "it has counted no such kill meanwhile (oom_kill)" if counted else "it doesn't say here whether it did"
    return f"The system kills a process so when the host's memory runs out, but {seen}. {held}"
