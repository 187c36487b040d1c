"""The work behind ``dist-lora plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, PlanError
from dist_lora.plan.hardware import GIB, GPUS, Gpu, find_gpu
from dist_lora.plan.report import Machines, Plan, make_plan, sweep
from dist_lora.plan.table import lines_of, sweep_lines

DEFAULT_GPU = "h100-80gb"


@dataclass(frozen=True)
class Fleets:
    """The machines that a user asks for, as typed."""

    num_nodes: Sequence[int]
    gpus_per_node: int
    gpus: Sequence[str]
    gpu_gib: float | None
    host_gib: float | None

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
        if faults:
            raise ConfigError("\n".join(faults))
        host_bytes = None if self.host_gib is None else int(self.host_gib * GIB)
        return [Machines(n, self.gpus_per_node, gpu, host_bytes) for gpu in self._gpus() for n in self.num_nodes]

    def single(self) -> Machines:
        """The machines, where only one kind and number was asked for.

        Raises:
            ConfigError: there are several.
        """
        machines = self.machines()
        if len(machines) > 1:
            raise ConfigError("--gpu and --nodes: several of them are for --sweep")
        return machines[0]

    def _gpus(self) -> list[Gpu]:
        if self.gpu_gib is not None:
            # Its speed is taken for that of the default: only its memory is known.
            return [replace(GPUS[DEFAULT_GPU], name=f"GPU of {self.gpu_gib:g} GiB", memory_gb=self.gpu_gib / 0.985)]
        return [find_gpu(name) for name in self.gpus or [DEFAULT_GPU]]


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
