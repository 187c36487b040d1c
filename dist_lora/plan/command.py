"""The work behind ``dist-lora plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, PlanError
from dist_lora.plan.hardware import DEFAULT_GPU, GPUS, Gpu, find_gpu, gpu_of_memory, gpus_here, measured_gpu
from dist_lora.plan.measured import Measured, read_measured
from dist_lora.plan.plan import Machines, Plan, make_plan, sweep
from dist_lora.plan.table import lines_of, sweep_lines
from dist_lora.text import GIB, count

DEFAULT_GPUS_PER_NODE = 8


def default_gpus_per_node(config: Config) -> int:
    """GPUs per node where neither config nor options set it."""
    return 1 if config.parallel.engine == "none" else DEFAULT_GPUS_PER_NODE


@dataclass(frozen=True)
class MachineRequest:
    """The machines that a user asks for, as typed; ``assumed`` says what was assumed."""

    num_nodes: Sequence[int]
    gpus_per_node: int
    gpus: Sequence[str]
    gpu_gib: float | None
    host_gib: float | None
    measured: Measured | None = None  # the contents of a file of ``dist-lora doctor --out``, in place of ``gpus``
    measured_in: Path | None = None  # that file
    here: Gpu | None = None  # this machine's GPU, if no other is given
    assumed: str = ""
    gpu_setting: str = "--gpu"  # what names the GPUs
    tflops: float | None = None  # of a GPU of which nothing but the memory is known

    @staticmethod
    def of(
        config: Config,
        num_nodes: Sequence[int] | None,
        gpus_per_node: int | None,
        gpus: Sequence[str] | None,
        gpu_gib: float | None,
        host_gib: float | None,
        measured: Path | None,
        tflops: float | None = None,
    ) -> MachineRequest:
        """What the user left out is taken from the measured machines, else the config, else this machine, else assumed.

        Raises:
            ConfigError: ``measured`` is not a file of measurements.
        """
        if measured is not None:
            machine = read_measured(measured)
            per_node = machine.ranks_per_node if gpus_per_node is None else gpus_per_node
            return MachineRequest(
                num_nodes or [machine.num_nodes],
                per_node,
                gpus or [],
                gpu_gib,
                host_gib,
                machine,
                measured,
                tflops=tflops,
            )
        section, default = config.machine, default_gpus_per_node(config)
        size = section.gpus_per_node if gpus_per_node is None else gpus_per_node
        gpu_setting = "--gpu"
        if not gpus and gpu_gib is None and section.gpu is not None:
            gpus, gpu_setting = [section.gpu], "machine.gpu"
        here, assumed = None, ""
        if not gpus and gpu_gib is None:
            local_gpus = gpus_here()
            here = min(local_gpus, key=lambda gpu: gpu.memory_bytes, default=None)
            size = len(local_gpus) or None if size is None else size
            if here is None:
                assumed = f"assuming {default if size is None else size} x {DEFAULT_GPU}"
        elif size is None:
            assumed = f"assuming {count(default, 'GPU')} per node"
        return MachineRequest(
            num_nodes or [section.nodes or 1],
            default if size is None else size,
            gpus or [],
            gpu_gib,
            host_gib,
            here=here,
            assumed=assumed,
            gpu_setting=gpu_setting,
            tflops=tflops,
        )

    def machines(self) -> list[Machines]:
        """Every type of GPU on every number of nodes.

        Raises:
            ConfigError: no node, no GPU, or an unknown name.
        """
        faults = [f"--nodes: found {n}, expected 1 or more" for n in self.num_nodes if n < 1]
        if self.gpus_per_node < 1:
            faults.append(f"--gpus-per-node: found {self.gpus_per_node}, expected 1 or more")
        for name, gib in (("--gpu-gib", self.gpu_gib), ("--host-gib", self.host_gib)):
            if gib is not None and not 0 < gib < 1e6:
                faults.append(f"{name}: found {gib:g}, expected GiB above 0")
        if self.gpus and self.gpu_gib is not None:
            faults.append("--gpu and --gpu-gib: both set the memory of a GPU; give one of them")
        if self.tflops is not None and not 0 < self.tflops < 1e6:
            faults.append(f"--tflops: found {self.tflops:g}, expected TFLOPS above 0")
        knows_speed = self.gpu_gib is None and (self.here is None or self.here.tflops is not None)
        if self.tflops is not None and knows_speed:
            faults.append(
                "--tflops: the speed of this type of GPU is known; give it with --gpu-gib, for one that --gpu doesn't know"
            )
        if self.measured is not None and (self.gpus or self.gpu_gib is not None):
            faults.append("--measured and --gpu or --gpu-gib: both set the type of GPU; give one of them")
        if faults:
            raise ConfigError("\n".join(faults))
        if self.measured is not None:
            return [self._measured_machines(self.measured)]
        host_bytes = None if self.host_gib is None else int(self.host_gib * GIB)
        return [
            Machines(n, self.gpus_per_node, gpu, host_bytes, self.assumed, self._options(gpu, n))
            for gpu in self._gpus()
            for n in self.num_nodes
        ]

    def _options(self, gpu: Gpu, num_nodes: int) -> tuple[str, ...]:
        """The options of ``dist-lora plan`` that name these machines alone."""
        named: dict[str, object] = {"--nodes": num_nodes, "--gpus-per-node": self.gpus_per_node}
        if self.measured is not None:
            named["--measured"] = self.measured_in
        elif self.gpu_gib is not None:
            named["--gpu-gib"] = f"{self.gpu_gib:g}"
        elif gpu.name in GPUS:  # else it is what this machine has
            named["--gpu"] = gpu.name
        for option, value in (("--tflops", self.tflops), ("--host-gib", self.host_gib)):
            if value is not None:
                named[option] = f"{value:g}"
        return tuple(str(part) for pair in named.items() for part in pair)

    def single(self) -> Machines:
        """The machines, if only one type and number was asked for.

        Raises:
            ConfigError: there are several.
        """
        machines = self.machines()
        if len(machines) > 1:
            raise ConfigError("--gpu, --nodes: several values are for --sweep only")
        return machines[0]

    def _measured_machines(self, measured: Measured) -> Machines:
        """The measured machines; a run on others would depend on links and devices that weren't measured."""
        if self.gpus_per_node != measured.ranks_per_node or list(self.num_nodes) != [measured.num_nodes]:
            asked = f"{' and '.join(map(str, self.num_nodes))} x {self.gpus_per_node}"
            raise ConfigError(
                f"--measured: {self.measured_in} was measured on {measured.num_nodes} x {measured.ranks_per_node} ranks (nodes x ranks per node), and "
                f"{asked} were requested. Measure with as many: dist-lora doctor --nproc N --out FILE, or under the "
                "launcher that starts the run"
            )
        host_bytes = measured.host_bytes if self.host_gib is None else int(self.host_gib * GIB)
        gpu = measured_gpu(measured)
        options = self._options(gpu, measured.num_nodes)
        return Machines(measured.num_nodes, measured.ranks_per_node, gpu, host_bytes, options=options)

    def _gpus(self) -> list[Gpu]:
        if self.gpu_gib is not None:
            return [gpu_of_memory(self.gpu_gib, name=f"GPU of {self.gpu_gib:g} GiB", tflops=self.tflops)]
        if not self.gpus:
            here = self.here or find_gpu(DEFAULT_GPU)
            return [here if self.tflops is None else replace(here, tflops=self.tflops)]
        return [find_gpu(name, given_by=self.gpu_setting) for name in self.gpus]


def plan(config: Config, request: MachineRequest, *, is_sweep: bool, as_json: bool) -> None:
    """Print the plan.

    Raises:
        PlanError: the run doesn't fit; the plan has been printed.
        ConfigError: see ``MachineRequest`` and ``make_plan``.
    """
    if is_sweep:
        machines = request.machines()
        plans = sweep(config, machines)
        if as_json:
            print(json.dumps([plan.to_json() for plan in plans]))
        else:
            print("\n".join(sweep_lines(plans)))
        if not plans:
            raise PlanError(
                f"{config.model.name} doesn't fit on {' or '.join(map(str, machines))} with any of the settings tried"
            )
        return
    planned = make_plan(config, request.single())
    print(json.dumps(planned.to_json()) if as_json else "\n".join(lines_of(planned)))
    check_fits(planned)


def check_fits(planned: Plan) -> None:
    """Raise ``PlanError``, with the needed and the available bytes, if a plan doesn't fit."""
    if planned.fits:
        return
    model, available = planned.config.model.name, planned.machines.gpu.memory_bytes
    if planned.device_bytes > available:
        raise PlanError(
            f"{model} needs {planned.device_bytes / GIB:.1f} GiB per GPU, and {available / GIB:.1f} GiB are available"
        )
    assert planned.machines.host_bytes is not None
    raise PlanError(
        f"{model} needs {planned.host_bytes / GIB:.1f} GiB of host memory per node, and "
        f"{planned.machines.host_bytes / GIB:.1f} GiB are available. Start fewer ranks per node, or set parallel.offload=none"
    )
