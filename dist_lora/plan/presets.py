"""The configs of the herd: one table of members, methods and machines, and the file that each of them makes.

``python -m dist_lora.plan.presets --write`` writes the files of ``configs/`` again, with what each of them costs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS, Member
from dist_lora.layout.memory import base_bytes_per_rank
from dist_lora.layout.storage import FP32, base_parts
from dist_lora.plan.hardware import Gpu, find_gpu
from dist_lora.plan.plan import Machines, Plan, make_plan
from dist_lora.text import GIB, nearest_few

Method = Literal["lora", "qlora"]
WIDTH = 112  # of a comment
SCHEMA_LINE = "# yaml-language-server: $schema=schema.json\n"


@dataclass(frozen=True)
class Machine:
    """So many nodes of so many GPUs; ``global_batch`` is what is common on so many."""

    name: str
    num_nodes: int
    gpus_per_node: int
    gpu_name: str
    global_batch: int

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def gpu(self) -> Gpu:
        """The GPU that the costs are reckoned for."""
        return find_gpu(self.gpu_name)

    def __str__(self) -> str:
        gpus = f"{self.gpus_per_node} GPU{'s' * (self.gpus_per_node > 1)} of {self.gpu.memory_gb:.0f} GB"
        return gpus if self.num_nodes == 1 else f"{self.num_nodes} nodes of {gpus}"


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("1x24gb", 1, 1, "rtx4090-24gb", 16),
        Machine("2x24gb", 1, 2, "rtx4090-24gb", 16),
        Machine("1x80gb", 1, 1, "h100-80gb", 16),
        Machine("8x80gb", 1, 8, "h100-80gb", 32),
        Machine("8x141gb", 1, 8, "h200-141gb", 32),
        Machine("4x8x80gb", 4, 8, "h100-80gb", 64),
    )
}

# By size: what makes sense on which machine. Left out: what does not fit (the base in bf16 is 16 GB of the 8B, 141 of the
# 70B, 812 of the 405B), and what a plain config already does there without the quantization's error.
SENSIBLE: dict[str, dict[Method, tuple[str, ...]]] = {
    "1b": {"lora": ("1x24gb", "2x24gb", "8x80gb"), "qlora": ("1x24gb",)},
    "8b": {"lora": ("1x24gb", "2x24gb", "8x80gb", "4x8x80gb"), "qlora": ("1x24gb", "2x24gb")},
    "70b": {"lora": ("8x80gb", "4x8x80gb"), "qlora": ("2x24gb", "1x80gb", "8x80gb")},
    "405b": {"lora": ("8x141gb", "4x8x80gb"), "qlora": ("8x80gb", "4x8x80gb")},
}
# The files of configs/: LoRA and QLoRA for each size, one over several nodes for each of the large ones, and Guard.
SHIPPED = (
    "3.2-1b-instruct_lora_1x24gb",
    "3.2-1b-instruct_qlora_1x24gb",
    "3.1-8b-instruct_lora_8x80gb",
    "3.1-8b-instruct_qlora_1x24gb",
    "3.1-70b-instruct_lora_8x80gb",
    "3.1-70b-instruct_lora_4x8x80gb",
    "3.1-70b-instruct_qlora_2x24gb",
    "3.1-405b-instruct_lora_8x141gb",
    "3.1-405b-instruct_lora_4x8x80gb",
    "3.1-405b-instruct_qlora_8x80gb",
    "guard-3-8b_lora_8x80gb",
)
# Of these the host keeps the base, and brings it in layer by layer.
ON_HOST = {("70b", "qlora", "2x24gb")}


@dataclass(frozen=True)
class Preset:
    """One of the configs: a member, a method and a machine."""

    member: Member
    method: Method
    machine: Machine

    @property
    def name(self) -> str:
        """Of the run, and of the file without its ending."""
        return f"{self.member.name}_{self.method}_{self.machine.name}"

    @property
    def size(self) -> str:
        """``8b`` and its like."""
        return size_of(self.member)

    @property
    def config(self) -> Config:
        """The settings of its file."""
        tree: dict[str, Any] = {}
        for section, key, value, _ in settings_of(self):
            (tree.setdefault(section, {}) if section else tree)[key] = value
        return Config.model_validate(tree)

    @cached_property
    def plan(self) -> Plan:
        """What its run needs of its machine."""
        machine = self.machine
        return make_plan(
            self.config, Machines(machine.num_nodes, machine.gpus_per_node, machine.gpu), shape=self.member.shape
        )


def size_of(member: Member) -> str:
    """``8b`` and its like, of a member."""
    return next(size for size in SENSIBLE if f"-{size}" in member.name)


def presets() -> dict[str, Preset]:
    """All configs by name, in the herd's order."""
    made = [
        Preset(member, method, MACHINES[machine])
        for member in MEMBERS.values()
        for method, machines in SENSIBLE[size_of(member)].items()
        for machine in machines
    ]
    return {preset.name: preset for preset in made}


# The settings, and why they are so


def settings_of(preset: Preset) -> Iterator[tuple[str, str, Any, str]]:
    """(section, setting, value, comment) of each line of a file."""
    member, machine = preset.member, preset.machine
    big, nodes, gpus = preset.size in ("70b", "405b"), machine.num_nodes, machine.num_gpus
    yield "", "run", preset.name, (
        "results go to runs/ under this name, in a folder that all nodes see"
        if nodes > 1
        else "results go to runs/ under this name; starting again with it goes on"
    )  # fmt: skip
    yield "model", "name", member.name, "from the herd; a folder or a hub id (org/name) works too"
    if preset.method == "qlora":
        yield "model", "quant", "nf4", "the layers' matrices in 4 bits a weight and a scale for each 64"
        yield "model", "dtype", "bf16", "of what is not quantized, and of what is computed: 2 bytes a number"
    else:
        yield "model", "dtype", "bf16", "2 bytes a weight"
    yield "lora", "rank", 16, "size of the adapters"
    yield "lora", "alpha", 32.0, "their output counts alpha / rank = 2 times"
    yield "lora", "targets", "all", "an adapter on each of the seven linears of every layer"
    yield "data", "train", "train.jsonl", _sample_of(member)
    yield "data", "eval", 0.02, "2 % of the samples are held out to measure the loss"
    yield "train", "epochs", 1.0, "once over the data"
    batch = min(machine.global_batch, 32) if preset.size == "405b" else machine.global_batch
    micro = 2 if machine.gpu.memory_gb >= 80 and not big else 1
    passes = batch // (gpus * micro)
    product = f"{gpus} GPU{'s' * (gpus > 1)} x {micro}" + (f" x {passes} passes" if passes > 1 else "")
    yield "train", "global_batch", batch, "sequences a step, over all GPUs"
    yield "train", "micro_batch", micro, f"sequences a GPU and pass: {product} = {batch}"
    length = 4096 if machine.gpu.memory_gb >= 80 and preset.size != "405b" else 2048
    yield "train", "sequence_length", length, "tokens; several short samples share a sequence"
    yield "train", "activation_checkpointing", True, "compute activations again in the backward instead of keeping them"
    yield "optim", "lr", 1e-4 if big else 2e-4, "peak learning rate"
    yield "optim", "warmup_steps", 10, "steps to reach it; then a cosine down to 0"
    yield from _parallel(preset)
    yield "machine", "gpu", machine.gpu_name, "what plan, slurm and explain go by; train runs wherever it is started"
    yield "machine", "gpus_per_node", machine.gpus_per_node, "GPUs of a node"
    yield "machine", "nodes", machine.num_nodes, "nodes"
    yield "checkpoint", "every", 25 if preset.size == "405b" else 50, "steps between checkpoints"


def _sample_of(member: Member) -> str:
    if member.guard:
        return 'one sample a line, as {"messages": [...]}: a chat, and the verdict as its answer'
    if member.instruct:
        return 'one sample a line, as {"messages": [...]}'
    return 'one sample a line, as {"prompt": ..., "completion": ...} or {"text": ...}'


def _parallel(preset: Preset) -> Iterator[tuple[str, str, Any, str]]:
    machine = preset.machine
    if machine.num_gpus == 1:
        yield "parallel", "engine", "none", "one GPU holds all of the base"
        return
    yield "parallel", "engine", "fsdp2", "split the base over the GPUs"
    if machine.num_nodes > 1 and (preset.size != "405b" or preset.method == "qlora"):
        yield "parallel", "base_shard", "node", "of each node, so that no weight of the base crosses the network"
    elif machine.num_nodes > 1:
        yield "parallel", "base_shard", "world", "of all nodes: no single node could hold it"
    if (preset.size, preset.method, machine.name) in ON_HOST:
        yield "parallel", "offload", "base", "the host's memory keeps the base, and each layer comes in when it is used"


# The file


def text_of(preset: Preset) -> str:
    """The config's file, but for the line that names its schema to editors."""
    lines = list(_head(preset))
    opened = ""
    for section, key, value, comment in settings_of(preset):
        if section != opened:
            lines.append(f"{section}:")
            opened = section
        setting = f"{'  ' * bool(section)}{key}: {_yaml(value)}"
        lines.append(f"{setting:31} # {comment}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.001 else f"{value:g}"
    return str(value)


def _head(preset: Preset) -> Iterator[str]:
    member, machine = preset.member, preset.machine
    method = "QLoRA (LoRA on a base in NF4)" if preset.method == "qlora" else "LoRA"
    yield f"# {member.title} with {method} on {machine}."
    yield from (f"# {line}" for line in textwrap.wrap(_base_of(preset), WIDTH))
    yield from (f"# {line}" for line in costs_of(preset))


def _base_of(preset: Preset) -> str:
    """How large the base is, and who holds what of it."""
    machine, setup = preset.machine, preset.plan.setup
    weights = setup.shape.num_parameters()
    told = f"The base is {2 * weights / 1e9:.1f} GB in bf16 ({weights / 1e9:.3g} billion weights, 2 bytes each)"
    if preset.method == "qlora":
        parts = base_parts(setup.shape, quant=setup.quant, item_bytes=setup.item_bytes)
        told += f", and {sum(part.num_bytes for part in parts) / 1e9:.1f} GB with its layers in NF4"
    share = f"{base_bytes_per_rank(setup) / 1e9:.1f} GB on each"
    if setup.base_ranks == 1:
        return f"{told}."
    if machine.num_nodes == 1:
        return f"{told}; split over {machine.num_gpus} GPUs, {share}."
    if setup.base_ranks == setup.local_size:
        return (
            f"{told}; each node holds all of it, {share} of its GPUs, so that only the adapters' gradients cross "
            "the network."
        )
    return (
        f"{told}; split over all {machine.num_gpus} GPUs, {share}. Its weights cross the network in every pass: a fast "
        "one (InfiniBand, RoCE) decides the speed."
    )


def costs_of(preset: Preset) -> Iterator[str]:
    """What a run needs, by arithmetic: memory a GPU by what it is, a step's time, disk."""
    plan, gpu = preset.plan, preset.machine.gpu
    memory, setup, speed = plan.memory, plan.setup, plan.speed
    parts = {
        "base": memory.base,
        "adapters": memory.adapters,
        "their gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "gathered": memory.gathered,
        "activations": memory.activations,
        "logits": memory.loss,
        "workspace": memory.workspace,
        "CUDA and gaps": plan.reserve_bytes,
    }
    needed, there = plan.device_bytes / GIB, gpu.memory_bytes / GIB
    yield f"Memory of a GPU, by arithmetic: {needed:.1f} of {there:.1f} GiB, fullest {memory.when}:"
    told = [f"{name} {size / GIB:.2f}".replace(" ", "\0") for name, size in parts.items() if size >= 0.005 * GIB]
    for line in textwrap.wrap(", ".join(told), WIDTH - 2):
        yield "  " + line.replace("\0", " ")
    if setup.layout.base_on_host:
        yield f"  and {plan.host_bytes / GIB:.1f} GiB of the host's for all GPUs of a node"
    low, high = speed.tokens_per_s
    yield (
        f"A step on {gpu.name}: {_seconds(speed.step_s[0])} to {_seconds(speed.step_s[1])} s, "
        f"{_round(low)} to {_round(high)} tokens/s, at best limited by {speed.wall}"
    )
    keep = preset.config.checkpoint.keep
    yield (
        f"Disk: {_disk(memory.disk)} a checkpoint, of which {keep} are kept and one more is written; "
        f"the adapter {_disk(FP32 * setup.trained_weights)}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _round(number: float) -> str:
    """Two digits: the range is wide."""
    return f"{float(f'{number:.2g}'):,.0f}"


def _disk(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


# The list


def find_preset(name: str) -> Preset:
    """A config by its name, with or without its ending.

    Raises:
        ConfigError: there is none; with the nearest names.
    """
    known = presets()
    plain = name.removeprefix("configs/").removesuffix(".yaml").lower()
    if plain in known:
        return known[plain]
    hint = nearest_few(plain, known, cutoff=0.5, otherwise=f"`dist-lora configs` lists all {len(known)}")
    raise ConfigError(f"configs show: no config is called {name} ({hint})")


def preset_rows() -> list[dict[str, Any]]:
    """Each config: name, model, method, machine and bytes a GPU."""
    rows = []
    for preset in presets().values():
        rows.append(
            {
                "name": preset.name,
                "model": preset.member.name,
                "method": preset.method,
                "machine": str(preset.machine),
                "needed_bytes": preset.plan.device_bytes,
                "gpu_bytes": preset.machine.gpu.memory_bytes,
                "host_bytes_a_node": preset.plan.host_bytes,
            }
        )
    return rows


def preset_table() -> list[list[str]]:
    """The list in words, its columns' names first."""
    rows = [["name", "model", "method", "machine", "memory a GPU"]]
    for row in preset_rows():
        memory = f"{row['needed_bytes'] / GIB:.1f} of {row['gpu_bytes'] / GIB:.1f} GiB"
        rows.append([row["name"], row["model"], row["method"], row["machine"], memory])
    return rows


def write_configs(folder: Path) -> list[Path]:
    """Write the files that people start from, and take away others of the table; ``configs show`` prints all."""
    written = []
    for preset in map(presets().__getitem__, SHIPPED):
        path = folder / f"{preset.name}.yaml"
        path.write_text(SCHEMA_LINE + text_of(preset), encoding="utf-8")
        written.append(path)
    for path in folder.glob("*_*lora_*.yaml"):
        if path not in written:
            path.unlink()
    return written


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m dist_lora.plan.presets --write")
    print(f"{len(write_configs(Path(__file__).resolve().parents[2] / 'configs'))} configs written")
