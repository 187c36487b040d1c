"""The work behind ``dist-lora plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lora.config.schema import Config, MachineSection
from dist_lora.errors import ConfigError, PlanError
from dist_lora.plan.hardware import DEFAULT_GPU, Gpu, find_gpu, gpus_here, measured_gpu, of_memory
from dist_lora.plan.measured import Measured, read_measured
from dist_lora.plan.plan import Machines, Plan, make_plan, sweep
from dist_lora.plan.table import lines_of, sweep_lines
from dist_lora.text import GIB

DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Fleets:
    """The machines that a user asks for, as typed; ``assumed`` says what nobody asked for."""

    num_nodes: Sequence[int]
    gpus_per_node: int
    gpus: Sequence[str]
    gpu_gib: float | None
    host_gib: float | None
    measured: Measured | None = None  # what a file of ``dist-lora doctor --out`` holds, in the place of ``gpus``
    measured_in: Path | None = None  # that file
    here: Gpu | None = None  # that of this machine, where nobody says another
    assumed: str = ""

    @staticmethod
    def of(
        section: MachineSection,
        num_nodes: Sequence[int] | None,
        gpus_per_node: int | None,
        gpus: Sequence[str] | None,
        gpu_gib: float | None,
        host_gib: float | None,
        measured: Path | None,
    ) -> Fleets:
        """What a user left out is that of the measured machines, else the config's, else that of this machine, else assumed.

        Raises:
            ConfigError: the file of measured machines is none.
        """
        if measured is not None:
            found = read_measured(measured)
            size = found.ranks_per_node if gpus_per_node is None else gpus_per_node
            return Fleets(num_nodes or [found.num_nodes], size, gpus or [], gpu_gib, host_gib, found, measured)
        size = section.gpus_per_node if gpus_per_node is None else gpus_per_node
        if not gpus and gpu_gib is None and section.gpu is not None:
            gpus = [section.gpu]
        here, assumed = None, ""
        if not gpus and gpu_gib is None:
            there = gpus_here()
            here = min(there, key=lambda gpu: gpu.memory_bytes, default=None)
            size = len(there) or None if size is None else size
            if here is None:
                assumed = f"assuming {DEFAULT_GPUS_PER_NODE if size is None else size} x {DEFAULT_GPU}"
        elif size is None:
            assumed = f"assuming {DEFAULT_GPUS_PER_NODE} GPUs a node"
        return Fleets(
            num_nodes or [section.nodes or 1],
            DEFAULT_GPUS_PER_NODE if size is None else size,
            gpus or [],
            gpu_gib,
            host_gib,
            here=here,
            assumed=assumed,
        )

    def machines(self) -> list[Machines]:
        """Every kind of GPU on every number of nodes.

        Raises:
            ConfigError: no node, no GPU, or one of a name that is not known.
        """
        faults = [f"--nodes: found {n}, expected 1 or more" for n in self.num_nodes if n < 1]
        if self.gpus_per_node < 1:
            faults.append(f"--gpus-per-node: found {self.gpus_per_node}, expected 1 or more")
        for name, gib in (("--gpu-gib", self.gpu_gib), ("--host-gib", self.host_gib)):
            if gib is not None and not 0 < gib < 1e6:
                faults.append(f"{name}: found {gib:g}, expected GiB above 0")
        if self.gpus and self.gpu_gib is not None:
            faults.append("--gpu and --gpu-gib: both say what a GPU holds; give one of them")
        if self.measured is not None and (self.gpus or self.gpu_gib is not None):
            faults.append("--measured and --gpu or --gpu-gib: both say what a GPU is; give one of them")
        if faults:
            raise ConfigError("\n".join(faults))
        if self.measured is not None:
            return [self._as_measured(self.measured)]
        host_bytes = None if self.host_gib is None else int(self.host_gib * GIB)
        return [
            Machines(n, self.gpus_per_node, gpu, host_bytes, self.assumed)
            for gpu in self._gpus()
            for n in self.num_nodes
        ]

    def single(self) -> Machines:
        """The machines, where only one kind and number was asked for.

        Raises:
            ConfigError: there are several.
        """
        machines = self.machines()
        if len(machines) > 1:
            raise ConfigError("--gpu and --nodes: several of them are for --sweep")
        return machines[0]

    def _as_measured(self, found: Measured) -> Machines:
        """The measured machines; a run on others would wait on links and processors that nobody has measured."""
        if self.gpus_per_node != found.ranks_per_node or list(self.num_nodes) != [found.num_nodes]:
            asked = f"{' and '.join(map(str, self.num_nodes))} x {self.gpus_per_node}"
            raise ConfigError(
                f"--measured: {self.measured_in} holds {found.num_nodes} x {found.ranks_per_node} ranks (nodes x ranks a node), and "
                f"{asked} are asked for. Measure with as many: dist-lora doctor --nproc N --out FILE, or under the "
                "launcher that starts the run"
            )
        host_bytes = found.host_bytes if self.host_gib is None else int(self.host_gib * GIB)
        return Machines(found.num_nodes, found.ranks_per_node, measured_gpu(found), host_bytes)

    def _gpus(self) -> list[Gpu]:
        if self.gpu_gib is not None:
            return [of_memory(self.gpu_gib, name=f"GPU of {self.gpu_gib:g} GiB")]
        if not self.gpus:
            return [self.here or find_gpu(DEFAULT_GPU)]
        return [find_gpu(name) for name in self.gpus]


def plan(config: Config, fleets: Fleets, *, is_sweep: bool, as_json: bool) -> None:
    """Print the plan.

    Raises:
        PlanError: it does not fit; all has been printed.
        ConfigError: see ``Fleets`` and ``make_plan``.
    """
    if is_sweep:
        machines = fleets.machines()
        plans = sweep(config, machines)
        if as_json:
            print(json.dumps([each.to_json() for each in plans]))
        else:
            print("\n".join(sweep_lines(plans)))
        if not plans:
            raise PlanError(f"{config.model.name} fits {' or '.join(map(str, machines))} in no way that was tried")
        return
    found = make_plan(config, fleets.single())
    print(json.dumps(found.to_json()) if as_json else "\n".join(lines_of(found)))
    refuse_what_does_not_fit(found)


def refuse_what_does_not_fit(found: Plan) -> None:
    """Raise ``PlanError``, with both numbers, where a plan does not fit."""
    if not found.fits:
        raise PlanError(_why(found))


def _why(found: Plan) -> str:
    there = found.machines.gpu.memory_bytes
    if found.device_bytes > there:
        return (
            f"{found.config.model.name} needs {found.device_bytes / GIB:.1f} GiB of each GPU, and {there / GIB:.1f} GiB "
            "are there"
        )
    assert found.machines.host_bytes is not None
    return (
        f"{found.config.model.name} needs {found.host_bytes / GIB:.1f} GiB of each node's host memory, and "
        f"{found.machines.host_bytes / GIB:.1f} GiB are there. Start fewer ranks on a node, or leave offload out"
    )
