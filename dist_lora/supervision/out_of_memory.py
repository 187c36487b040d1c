"""Out of memory, on a GPU or on the host: what was requested and held, what helps, and what the kernel counted.

No torch at import: the process that starts the ranks reads the kernel's counters too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_lora.errors import DistLoraError, OutOfMemory
from dist_lora.text import gib
from dist_lora.world.allocator import EXPANDABLE, has_expandable_segments

if TYPE_CHECKING:
    from dist_lora.config.schema import Config
    from dist_lora.world.world import World

NO_LIMIT_BYTES = 2**60  # cgroups v1 write a number of this size for no limit
FRAGMENTED = 0.03  # of a GPU's memory: free pieces within what is reserved that are worth a word
REQUESTED = re.compile(r"(?:tried|unable) to allocate ([\d.,]+ ?\w+)", re.IGNORECASE)

Where = Literal["device", "host"]


# When a rank can't get memory


def out_of_memory(error: BaseException, *, world: World | None, config: Config) -> OutOfMemory | None:
    """``error`` as the user's ``OutOfMemory``; None where it is another error."""
    where = _where(error)
    if where is None:
        return None
    requested = REQUESTED.search(str(error))
    held = _held_on_device(world) if where == "device" and world is not None else []
    held += held_on_host()
    phase = world.progress.where(error) if world is not None else ""
    helps = what_helps(config, where=where, phase=phase, is_on_gpu=world is not None and world.device.type == "cuda")
    return OutOfMemory(
        f"out of memory on the {'GPU' if where == 'device' else 'host'}: "
        + (f"{requested[1]} were requested; " if requested else "")
        + f"{'; '.join(held)}. What helps, the cheapest first: {'; '.join(helps)}."
    )


def _where(error: BaseException) -> Where | None:
    import torch

    text = str(error)
    if isinstance(error, DistLoraError):
        return None
    if isinstance(error, RuntimeError) and "out of memory" in text and _is_pinning(error):
        return "host"
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "out of memory" in text):
        return "device"
    is_host = (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )
    return "host" if is_host else None


def _is_pinning(error: BaseException) -> bool:
    """Whether the host refused pinned memory, which CUDA reports in the words of a GPU's: the innermost line asked for it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and re.search(r"pin_memory|is_pinned|\.pin\(", frames[-1].line or "") is not None


def _held_on_device(world: World) -> list[str]:
    import torch

    if world.device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(world.device)
    return [
        describe_device(
            torch.cuda.memory_stats(world.device), free_bytes=free, total_bytes=total, name=str(world.device)
        )
    ]


def describe_device(stats: Mapping[str, int], *, free_bytes: int, total_bytes: int, name: str) -> str:
    """What PyTorch's allocator holds on a GPU, by ``torch.cuda.memory_stats``, and what of it lies in pieces."""
    allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    text = (
        f"this rank's tensors take {gib(allocated)} of {gib(total_bytes)} on {name} ({gib(reserved)} are reserved for them, "
        f"{gib(free_bytes)} are free)"
    )
    pieces = stats.get("inactive_split_bytes.all.current", 0)
    if pieces > FRAGMENTED * total_bytes:
        text += (
            f"; {gib(pieces)} of what is reserved are free in pieces between tensors, after "
            f"{stats.get('num_alloc_retries', 0)} retries"
        )
        if not has_expandable_segments(os.environ):
            text += f": PYTORCH_ALLOC_CONF={EXPANDABLE}, the default, may join them"
    return text


def held_on_host() -> list[str]:
    """The host memory that this process holds, and what is available: one or two clauses."""
    import psutil

    memory = psutil.virtual_memory()
    held = f"this process holds {gib(psutil.Process().memory_info().rss)} of the host's {gib(memory.total)}"
    clauses = [f"{held}, {gib(memory.available)} are available"]
    limit = read_counters().limit_bytes
    if limit is not None:
        clauses.append(f"its cgroup is limited to {gib(limit)}")
    return clauses


def what_helps(config: Config, *, where: Where, phase: str, is_on_gpu: bool) -> list[str]:
    """Changes to the config that save memory on ``where``, the cheapest first; at least one."""
    train, changes = config.train, []
    # Activations; before the first pass there is only the base and its loading.
    if phase.startswith("step") or "evaluating" in phase:
        if "evaluating" in phase and (config.eval.batch or 0) > 1:
            changes.append(f"eval.batch={(config.eval.batch or 2) // 2}")
        if train.micro_batch > 1:
            changes.append(f"train.micro_batch={train.micro_batch // 2} (is {train.micro_batch})")
        if train.activation_checkpointing != "all":
            changes.append(f"train.activation_checkpointing=all (is {train.activation_checkpointing})")
        changes.append(f"train.sequence_length={max(2, train.sequence_length // 2)} (is {train.sequence_length})")
    base_shard, offload = config.parallel.base_shard, config.parallel.offload
    if base_shard == "gpu":
        changes.append("parallel.base_shard=node (is gpu)")
    elif base_shard == "auto" and where == "device" and is_on_gpu and _may_be_whole(config):
        changes.append("parallel.base_shard=node (is auto), if the base is whole on each GPU")
    if config.model.quant != "nf4":
        changes.append(f"model.quant=nf4 (is {config.model.quant})")
    if where == "device" and base_shard == "gpu" and offload == "none":
        changes.append("parallel.offload=optimizer (is none)")
    elif where == "device" and base_shard != "gpu" and offload != "all":
        changes.append(f"parallel.offload={'base' if offload == 'none' else 'all'} (is {offload})")
    if where == "host" and is_on_gpu and offload != "none":
        changes.append(f"parallel.offload=none (is {offload}, which keeps it in the host's memory)")
    changes.append("more GPUs, so that each holds less" if where == "device" else "more nodes, so that each holds less")
    return changes


def _may_be_whole(config: Config) -> bool:
    """Whether ``base_shard: auto`` may keep the whole base on each GPU."""
    section = config.parallel
    is_elsewhere = section.offload in ("base", "all") or section.engine in ("none", "zero3")
    return not is_elsewhere and section.adapters != "shard"


# What the kernel counted


@dataclass(frozen=True)
class Counters:
    """How many processes the kernel has killed for lack of memory, and how much memory there is.

    ``group_kills``: in this process's cgroup (a container, a batch job); ``host_kills``: on the whole host. None where
    the system doesn't say.
    """

    group_kills: int | None = None
    limit_bytes: int | None = None
    host_kills: int | None = None
    total_bytes: int | None = None


def read_counters(root: Path = Path("/")) -> Counters:
    """The current counters, from cgroups v1 or v2. Outside of Linux there are none."""
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
    """The folders of this process's cgroup and its parents, nearest first, and the files' names."""
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
    """The peak host memory of a process so far; None once it has ended."""
    kib = _field(Path(f"/proc/{process}/status"), "VmHWM:")
    return None if kib is None else kib * 1024


class Peaks:
    """The peak host memory of each process of a list, as their parent sees it.

    ``look`` reads the peaks so far; ``ended`` what the system keeps of processes that have been waited for: the largest
    peak of all children so far, so that a process's last moments count where they were the worst.
    """

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = list(processes)
        self.num_bytes = [0] * len(self._processes)
        self._most_of_ended = _most_of_ended_bytes()

    def look(self) -> None:
        """Read the peaks of those that are alive."""
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
    """That the kernel killed for lack of memory, where its counters have risen; else empty."""
    for now, then, where in (
        (after.group_kills, before.group_kills, "in this cgroup"),
        (after.host_kills, before.host_kills, "on this host"),
    ):
        if now is not None and then is not None and now > then:
            count = f"{now - then} process{'es' if now - then > 1 else ''}"
            return f"Memory ran out: the kernel killed {count} {where} for it during the run (oom_kill)."
    return ""


def describe_kill(before: Counters, after: Counters, peaks: Sequence[int]) -> str:
    """Why a rank may have been killed by SIGKILL, as far as the kernel's counters show it.

    Args:
        peaks: the peak memory of each rank, in bytes; 0 where it isn't known.
    """
    available = f"the host has {gib(after.total_bytes)}" if after.total_bytes else "the host's size is unknown"
    if after.limit_bytes is not None:
        available += f", this cgroup is limited to {gib(after.limit_bytes)}"
    held = f"The ranks held at most {', '.join(gib(peak) for peak in peaks)}; {available}."
    fact = counted_kills(before, after)
    if fact:
        return f"{fact} {held}"
    counted = after.group_kills is not None or after.host_kills is not None
    seen = "it counted no such kill during the run (oom_kill)" if counted else "whether it did isn't known here"
    return f"The kernel kills a process like this when the host's memory runs out, but {seen}. {held}"
