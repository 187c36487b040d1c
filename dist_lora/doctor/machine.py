"""One host: its CPUs and memory, and its GPUs as the driver and torch see them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_lora.config.schema import MachineSection
from dist_lora.doctor.findings import Answer, hosts_by
from dist_lora.layout.machine import is_called
from dist_lora.supervision.out_of_memory import read_counters
from dist_lora.text import count, gib

SHM = Path("/dev/shm")
LEAST_SHM_BYTES = 2**30  # NCCL's buffers between GPUs of a node without a direct link
LEAST_HOST_BYTES_PER_RANK = 4 * 2**30  # Python, torch, CUDA's libraries, and what loading needs
USED_BYTES = 2**30  # of a GPU, before a run: more than a context of this process
ASK_GPUS = ("index", "name", "driver_version", "memory.total", "memory.free")


@dataclass(frozen=True)
class HostFacts:
    """Bytes and cores of this host, as far as this process may use them."""

    cores: int
    usable_cores: float
    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    shm_bytes: int | None


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as its driver describes it."""

    index: int
    name: str
    driver: str
    total_bytes: int
    free_bytes: int


def read_host(root: Path = Path("/")) -> HostFacts:
    """What this process may use of its host."""
    memory = psutil.virtual_memory()
    cores = os.cpu_count() or 1
    usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _quota_cores(root)
    shm = shutil.disk_usage(SHM).total if SHM.is_dir() else None
    return HostFacts(
        cores,
        min(usable, quota or usable),
        int(memory.total),
        int(memory.available),
        read_counters(root).limit_bytes,
        shm,
    )


def _quota_cores(root: Path) -> float | None:
    """The CPU quota of the cgroup (v2) in cores, or None."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def examine_host(facts: HostFacts, *, ranks: int) -> Answer:
    """CPUs, memory and shared memory, for ``ranks`` processes of a run on this host."""
    answer = Answer(facts=asdict(facts))
    limit = "" if facts.limit_bytes is None else f", its cgroup is limited to {gib(facts.limit_bytes)}"
    answer.add(
        "ok",
        "processors",
        f"{facts.usable_cores:g} of {count(facts.cores, 'core')} {'is' if facts.usable_cores == 1 else 'are'} usable ({platform.machine()})",
    )
    answer.add("ok", "host memory", f"{gib(facts.total_bytes)}, {gib(facts.available_bytes)} of it available{limit}")
    if facts.usable_cores < ranks:
        answer.add(
            "warning",
            "processors",
            f"{count(ranks, 'rank shares', 'ranks share')} {facts.usable_cores:g} core{'' if facts.usable_cores == 1 else 's'}",
            "Give the job at least one core per rank (Slurm: --cpus-per-task), or start fewer ranks.",
        )
    usable = min(facts.available_bytes, facts.limit_bytes or facts.available_bytes)
    if usable < ranks * LEAST_HOST_BYTES_PER_RANK:
        answer.add(
            "warning",
            "host memory",
            f"{gib(usable)} are available to {count(ranks, 'rank')}, and each needs {gib(LEAST_HOST_BYTES_PER_RANK)} to load",
            "Request more memory (Slurm: --mem), end what else runs here, or start fewer ranks.",
        )
    if facts.shm_bytes is None:
        answer.add("note", "shared memory", f"{SHM} doesn't exist")
    elif facts.shm_bytes < LEAST_SHM_BYTES and ranks > 1:
        answer.add(
            "warning",
            "shared memory",
            f"{SHM} has {gib(facts.shm_bytes)}, and the ranks of a node may pass data through it",
            "Make it larger: docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir of medium Memory.",
        )
    else:
        answer.add("ok", "shared memory", f"{SHM} has {gib(facts.shm_bytes)}")
    return answer


# GPUs


def ask_driver(command: Sequence[str] = ("nvidia-smi",), *, timeout_s: float = 20) -> list[GpuFacts] | None:
    """The GPUs that the driver reports; None where there is no such driver or it doesn't answer."""
    try:
        output = subprocess.run(
            [*command, f"--query-gpu={','.join(ASK_GPUS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=timeout_s, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(ASK_GPUS) and cells[0].isdigit():
            total, free = (int(cell) * 2**20 if cell.isdigit() else 0 for cell in cells[3:])
            gpus.append(GpuFacts(int(cells[0]), cells[1], cells[2], total, free))
    return gpus


def examine_gpus(driver: Sequence[GpuFacts] | None, *, num_seen: int, build: Mapping[str, Any]) -> Answer:
    """The GPUs of a host, and whether torch can use them.

    Args:
        driver: from ``ask_driver``.
        num_seen: how many torch sees.
        build: from ``torch_build``.
    """
    answer = Answer(facts={"gpus": [asdict(gpu) for gpu in driver or ()], "gpus_of_torch": num_seen, **build})
    toolkit = f"torch {build['torch']}, CUDA {build['cuda'] or '-'}, NCCL {build['nccl'] or '-'}"
    if driver is None and not num_seen:
        answer.add("note", "GPUs", f"none: runs use the CPU ({toolkit})")
        return answer
    for gpu in driver or ():
        answer.add(
            "ok",
            "GPUs",
            f"{gpu.index}: {gpu.name}, {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free, driver {gpu.driver}",
        )
        if gpu.total_bytes - gpu.free_bytes > USED_BYTES:
            answer.add(
                "warning",
                "GPUs",
                f"{gib(gpu.total_bytes - gpu.free_bytes)} of GPU {gpu.index} are already in use",
                "Find the process with nvidia-smi and end it, or exclude this GPU by CUDA_VISIBLE_DEVICES.",
            )
    if driver is None:
        answer.add("note", "GPUs", f"torch sees {num_seen}; there is no nvidia-smi here for details ({toolkit})")
        return answer
    _compare_with_torch(answer, driver, num_seen=num_seen, toolkit=toolkit)
    _compare_types(answer, driver)
    return answer


def _compare_with_torch(answer: Answer, driver: Sequence[GpuFacts], *, num_seen: int, toolkit: str) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not num_seen and driver:
        why = f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else toolkit
        answer.add(
            "fault",
            "GPUs",
            f"the driver reports {count(len(driver), 'GPU')} but torch sees none: {why}",
            "Unset CUDA_VISIBLE_DEVICES."
            if visible is not None
            else "Install torch's build for CUDA (pip install torch from download.pytorch.org/whl/cuXXX) that the driver supports.",
        )
    elif num_seen < len(driver) and visible is None:
        answer.add(
            "warning",
            "GPUs",
            f"the driver reports {count(len(driver), 'GPU')} but torch sees {num_seen}",
            "Check the kernel's log (dmesg | grep -i xid): a GPU may have fallen off the bus.",
        )
    else:
        answer.add("ok", "GPUs", f"torch sees {num_seen} of {len(driver)} ({toolkit})")


def examine_capabilities(capabilities: Sequence[tuple[int, int]], *, dtype: str) -> Answer:
    """Whether all of a host's GPUs compute in bf16; ``dtype`` is the config's, or ``auto``."""
    answer = Answer()
    older = [f"{major}.{minor}" for major, minor in capabilities if (major, minor) < (8, 0)]
    if older:
        text = f"{count(len(older), 'GPU is', 'GPUs are')} of compute capability {' and '.join(sorted(set(older)))}: no bf16"
        if dtype == "bf16":
            answer.add("fault", "GPUs", f"{text}, which model.dtype asks for", "Set model.dtype=fp32 (or auto).")
        else:
            answer.add("note", "GPUs", f"{text}; runs compute in fp32")
    return answer


def compare_with_config(driver: Sequence[GpuFacts], section: MachineSection, *, num_seen: int) -> Answer:
    """Whether a host has the GPUs of the config's section ``machine``; no findings where it sets none."""
    answer = Answer()
    other = [gpu for gpu in driver if section.gpu is not None and not is_called(section.gpu, gpu.name, gpu.total_bytes)]
    if section.gpu is not None and not driver and num_seen:  # a container without nvidia-smi, or ROCm
        answer.add("note", "machine", f"machine.gpu: {section.gpu} can't be compared: the driver's tool is not here")
    elif other or (section.gpu is not None and not driver):
        own = f"{other[0].name} of {gib(other[0].total_bytes)}" if other else "no GPU"
        answer.add(
            "warning",
            "machine",
            f"machine.gpu: the config names {section.gpu}, but this host has {own}",
            "The plan was made for other GPUs: set machine.gpu to this host's, and plan again.",
        )
    if section.gpus_per_node not in (None, num_seen):
        answer.add(
            "warning",
            "machine",
            f"machine.gpus_per_node: the config names {section.gpus_per_node}, but torch sees {num_seen}",
            "Start on a node with as many, or set machine.gpus_per_node, and plan again.",
        )
    if section.gpu is not None and not answer.findings:
        answer.add("ok", "machine", f"the GPUs match the config: {num_seen} x {section.gpu}")
    return answer


def _compare_types(answer: Answer, driver: Sequence[GpuFacts]) -> None:
    types = {(gpu.name, gpu.total_bytes) for gpu in driver}
    if len(types) > 1:
        names = ", ".join(sorted(f"{name} of {gib(size)}" for name, size in types))
        answer.add(
            "warning",
            "GPUs",
            f"of different types: {names}",
            "A step waits for the slowest, and the smallest must hold its shard: exclude the others by "
            "CUDA_VISIBLE_DEVICES, or plan for the smallest.",
        )


def torch_build() -> dict[str, Any]:
    """What torch was built for."""
    nccl = None
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip, "nccl": nccl}


def compare_gpus(kinds: Mapping[str, Sequence[str]]) -> Answer:
    """Whether all hosts have the same GPUs and drivers.

    Args:
        kinds: by host, a description of each GPU.
    """
    answer = Answer()
    hosts_of = hosts_by((host, tuple(gpus)) for host, gpus in kinds.items())
    if len(hosts_of) > 1:
        differences = "; ".join(
            f"{', '.join(gpus) or 'none'} on {', '.join(hosts)}" for gpus, hosts in hosts_of.items()
        )
        answer.add(
            "warning",
            "GPUs",
            f"nodes have different GPUs or drivers: {differences}",
            "A step waits for the slowest: ask the scheduler for nodes of one type (Slurm: --constraint).",
        )
    return answer
