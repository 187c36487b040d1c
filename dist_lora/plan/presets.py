"""The configs of the herd: a table of members, methods and machines, and the file for each combination.

``python -m dist_lora.plan.presets --write`` regenerates the files of ``configs/``, with the estimated needs of each.
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
from dist_lora.layout.setup import base_bytes_per_rank, parts_of
from dist_lora.layout.storage import FP32
from dist_lora.plan.hardware import Gpu, find_gpu
from dist_lora.plan.plan import Machines, Plan, fitting_plan, make_plan
from dist_lora.text import GIB, count, nearest_few

Method = Literal["lora", "qlora"]
WIDTH = 112  # of a comment
SCHEMA_LINE = "# yaml-language-server: $schema=schema.json\n"


@dataclass(frozen=True)
class Machine:
    """A number of nodes with a number of GPUs each, and the usual ``global_batch`` for that number of GPUs."""

    name: str
    num_nodes: int
    gpus_per_node: int
    gpu_name: str
    global_batch: int

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def gpu(self) -> Gpu:
        """The GPU that the estimates are for."""
        return find_gpu(self.gpu_name)

    def __str__(self) -> str:
        gpus = f"{count(self.gpus_per_node, 'GPU')} of {self.gpu.memory_gb:.0f} GB"
        return gpus if self.num_nodes == 1 else f"{count(self.num_nodes, 'node')} of {gpus}"


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

# By size: the machines that make sense for each method. Left out: what doesn't fit (the base in bf16 is 16 GB for 8B, 141 for
# 70B, 812 for 405B), and QLoRA where plain LoRA fits too, without the quantization's error.
SENSIBLE: dict[str, dict[Method, tuple[str, ...]]] = {
    "1b": {"lora": ("1x24gb", "2x24gb", "8x80gb"), "qlora": ("1x24gb",)},
    "3b": {"lora": ("1x24gb", "2x24gb", "8x80gb"), "qlora": ("1x24gb",)},
    "8b": {"lora": ("1x24gb", "2x24gb", "8x80gb", "4x8x80gb"), "qlora": ("1x24gb", "2x24gb")},
    "70b": {"lora": ("8x80gb", "4x8x80gb"), "qlora": ("2x24gb", "1x80gb", "8x80gb")},
    "405b": {"lora": ("8x141gb", "4x8x80gb"), "qlora": ("8x80gb", "4x8x80gb")},
}
# The files of configs/: LoRA and QLoRA for each size (but 3B, whose are those of 1B), one over several nodes for each of the
# large ones, and Guard.
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
# These offload the base to host memory and fetch it layer by layer.
ON_HOST = {("70b", "qlora", "2x24gb")}
# Nearly full with the base alone: sequences of 2,048 tokens instead of 4,096.
SHORT = {("405b", "lora", "8x141gb")}


@dataclass(frozen=True)
class Preset:
    """One of the configs: a member, a method and a machine."""

    member: Member
    method: Method
    machine: Machine

    @property
    def name(self) -> str:
        """Name of the run, and of the file without its suffix."""
        return f"{self.member.name}_{self.method}_{self.machine.name}"

    @property
    def size(self) -> str:
        """The size of the member, like ``8b``."""
        return size_of(self.member)

    @property
    def config(self) -> Config:
        """The settings of its file."""
        return self._config_with(self.micro_batch)

    def _config_with(self, micro_batch: int) -> Config:
        tree: dict[str, Any] = {}
        for section, key, value, _ in settings_of(self, micro_batch=micro_batch):
            (tree.setdefault(section, {}) if section else tree)[key] = value
        return Config.model_validate(tree)

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return min(self.machine.global_batch, 32) if self.size == "405b" else self.machine.global_batch

    @property
    def machines(self) -> Machines:
        """What its plan is for."""
        return Machines(self.machine.num_nodes, self.machine.gpus_per_node, self.machine.gpu)

    @cached_property
    def micro_batch(self) -> int:
        """Sequences per GPU at once, with which a step is the fastest by its plan, at best and at worst together.

        A larger one receives the base less often, and a smaller one leaves room to keep more layers' activations.
        """
        share = self.global_batch // self.machine.num_gpus
        seconds: dict[int, float] = {}
        for micro_batch in (1, 2, 4):
            if share % micro_batch == 0:
                tree = self._config_with(micro_batch).model_dump(mode="json")
                plan = fitting_plan(tree, self.machines, self.member.shape)
                if plan is not None and plan.speed is not None and not plan.is_tight:
                    seconds[micro_batch] = sum(plan.speed.step_s)
        return min(seconds, key=seconds.__getitem__, default=1)

    @cached_property
    def plan(self) -> Plan:
        """The plan of its run on its machine."""
        return make_plan(self.config, self.machines, shape=self.member.shape)


def size_of(member: Member) -> str:
    """The size of a member, like ``8b``."""
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


# The settings, with comments


def settings_of(preset: Preset, *, micro_batch: int) -> Iterator[tuple[str, str, Any, str]]:
    """(section, setting, value, comment) of each line of a file."""
    member, machine = preset.member, preset.machine
    big, nodes, gpus = preset.size in ("70b", "405b"), machine.num_nodes, machine.num_gpus
    yield "", "run", preset.name, (
        "results go to runs/ under this name, in a folder shared by all nodes"
        if nodes > 1
        else "results go to runs/ under this name; starting it again resumes"
    )  # fmt: skip
    yield "model", "name", member.name, "from the herd; a folder or a hub id (org/name) works too"
    if preset.method == "qlora":
        yield "model", "quant", "nf4", "linear layers in 4 bits per weight, with a scale per 64 weights"
        yield "model", "dtype", "bf16", "of all other weights, and of the computation: 2 bytes per number"
    else:
        yield "model", "dtype", "bf16", "2 bytes per weight"
    yield "lora", "rank", 16, "size of the adapters"
    yield "lora", "alpha", 32.0, "the adapters' output is scaled by alpha / rank = 2"
    yield "lora", "targets", "all", "an adapter on each of the seven linears of every layer"
    yield "data", "train", "train.jsonl", _sample_of(member)
    if member.guard:
        yield "data", "format", "guard", "Llama Guard 3's prompt; trained on is the verdict alone"
    yield "data", "eval", 0.02, "2 % of the samples are held out to measure the loss"
    yield "train", "epochs", 1.0, "one pass over the data"
    batch = preset.global_batch
    accumulation_steps = batch // (gpus * micro_batch)
    product = f"{count(gpus, 'GPU')} x {micro_batch}" + (
        f" x {count(accumulation_steps, 'accumulation step')}" if accumulation_steps > 1 else ""
    )
    yield "train", "global_batch", batch, "sequences per step, over all GPUs"
    yield "train", "micro_batch", micro_batch, f"sequences per GPU at once: {product} = {batch}"
    is_short = machine.gpu.memory_gb < 80 or (preset.size, preset.method, machine.name) in SHORT
    length = 2048 if is_short else 4096
    yield "train", "sequence_length", length, "tokens; short samples are packed into one sequence"
    yield (
        "train",
        "activation_checkpointing",
        "auto",
        "recompute the activations of as few layers as fit, instead of storing them",
    )
    yield "optim", "lr", 1e-4 if big else 2e-4, "peak learning rate"
    yield "optim", "warmup_steps", 10, "steps to reach it; then a cosine down to 0"
    yield from _parallel(preset)
    yield "machine", "gpu", machine.gpu_name, "used by plan, slurm and explain; train runs wherever it is started"
    yield "machine", "gpus_per_node", machine.gpus_per_node, "GPUs per node"
    yield "machine", "nodes", machine.num_nodes, "number of nodes"
    yield "checkpoint", "every", 25 if preset.size == "405b" else 50, "steps between checkpoints"


def _sample_of(member: Member) -> str:
    if member.guard:
        return 'per line {"messages": [...], "verdict": "unsafe", "violated": ["Privacy"]} or "safe"'
    if member.instruct:
        return 'one sample per line, as {"messages": [...]}'
    return 'one sample per line, as {"prompt": ..., "completion": ...} or {"text": ...}'


def _parallel(preset: Preset) -> Iterator[tuple[str, str, Any, str]]:
    machine = preset.machine
    if machine.num_gpus == 1:
        yield "parallel", "engine", "none", "one GPU holds the whole base"
        return
    if preset.size in ("1b", "3b", "8b"):
        yield "parallel", "base_shard", "auto", "the whole base on each GPU where it fits, else sharded by FSDP2"
        return
    yield "parallel", "engine", "fsdp2", "shard the base over the GPUs"
    if machine.num_nodes > 1 and (preset.size != "405b" or preset.method == "qlora"):
        yield "parallel", "base_shard", "node", "shard within each node, so that no base weights cross the network"
    elif machine.num_nodes > 1:
        yield "parallel", "base_shard", "world", "shard over all nodes: a single node can't hold it"
    if (preset.size, preset.method, machine.name) in ON_HOST:
        yield (
            "parallel",
            "offload",
            "base",
            "the base is kept in host memory, and each layer is fetched when it is used",
        )


# The file


def text_of(preset: Preset) -> str:
    """The config's file, without the line that tells editors its schema."""
    lines = list(_head(preset))
    opened = ""
    for section, key, value, comment in settings_of(preset, micro_batch=preset.micro_batch):
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
    """The size of the base, and how it is sharded."""
    machine, setup = preset.machine, preset.plan.setup
    weights = setup.shape.num_parameters()
    text = f"The base is {2 * weights / 1e9:.1f} GB in bf16 ({weights / 1e9:.3g} billion weights, 2 bytes each)"
    if preset.method == "qlora":
        parts = parts_of(setup)
        text += f", and {sum(part.num_bytes for part in parts) / 1e9:.1f} GB with its layers in NF4"
    share = f"{base_bytes_per_rank(setup) / 1e9:.1f} GB on each"
    if machine.num_gpus == 1:
        return f"{text}."
    if setup.base_ranks == 1:
        return f"{text}; whole on each of {machine.num_gpus} GPUs, which exchange only the adapters' gradients."
    if machine.num_nodes == 1:
        return f"{text}; sharded over {machine.num_gpus} GPUs, {share}."
    if setup.base_ranks == setup.local_size:
        return (
            f"{text}; replicated on every node and sharded within it, {share} of its GPUs: only the adapters' gradients "
            "cross the network."
        )
    return (
        f"{text}; sharded over all {machine.num_gpus} GPUs, {share}. Its weights cross the network in every forward "
        "and backward: use a fast network (InfiniBand, RoCE)."
    )


def costs_of(preset: Preset) -> Iterator[str]:
    """The estimated needs of a run: memory per GPU by kind, time per step, disk."""
    plan, gpu = preset.plan, preset.machine.gpu
    memory, setup, speed = plan.memory, plan.setup, plan.speed
    parts = {
        "base": memory.base,
        "adapters": memory.adapters,
        "gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "all-gathered base": memory.gathered,
        "activations": memory.activations,
        "logits": memory.loss,
        "workspace": memory.workspace,
        "CUDA and fragmentation": plan.reserve_bytes,
    }
    needed, available = plan.device_bytes / GIB, gpu.memory_bytes / GIB
    yield f"Memory per GPU, by arithmetic: {needed:.1f} of {available:.1f} GiB, peak {memory.when}:"
    entries = [f"{name} {size / GIB:.2f}".replace(" ", "\0") for name, size in parts.items() if size >= 0.005 * GIB]
    for line in textwrap.wrap(", ".join(entries), WIDTH - 2):
        yield "  " + line.replace("\0", " ")
    if setup.layout.base_on_host:
        yield f"  and {plan.host_bytes / GIB:.1f} GiB of host memory per node"
    assert speed is not None, f"{gpu.name} is in the table, with its speed"
    low, high = speed.tokens_per_s
    yield (
        f"A step on {gpu.name}: {_seconds(speed.step_s[0])} to {_seconds(speed.step_s[1])} s, "
        f"{_round(low)} to {_round(high)} tokens/s, at best bound by {speed.bound_by}"
    )
    keep = preset.config.checkpoint.keep
    yield (
        f"Disk: {_disk(memory.disk)} per checkpoint, of which {keep} are kept while another is written; "
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
    """A config by name, with or without its suffix.

    Raises:
        ConfigError: no config has that name; with the nearest names.
    """
    known = presets()
    plain = name.removeprefix("configs/").removesuffix(".yaml").lower()
    if plain in known:
        return known[plain]
    hint = nearest_few(plain, known, cutoff=0.5, otherwise=f"`dist-lora configs` lists all {len(known)}")
    raise ConfigError(f"configs show: no config is called {name} ({hint})")


def preset_rows() -> list[dict[str, Any]]:
    """Each config: name, model, method, machine and bytes per GPU."""
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
    """The list as a table, header first."""
    rows = [["name", "model", "method", "machine", "memory per GPU"]]
    for row in preset_rows():
        memory = f"{row['needed_bytes'] / GIB:.1f} of {row['gpu_bytes'] / GIB:.1f} GiB"
        rows.append([row["name"], row["model"], row["method"], row["machine"], memory])
    return rows


def write_configs(folder: Path) -> list[Path]:
    """Write the shipped configs and remove others of the table; ``configs show`` prints any of them."""
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
