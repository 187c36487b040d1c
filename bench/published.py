"""Compares the plan's memory and speed with figures published by other projects, from ``published.yaml`` with sources.

    python -m bench.published [--sources]

The error is the plan's figure over theirs, minus one. For speed the plan has a range: the error is 0 if it contains
theirs, else that of the nearer end. Products in another format than bf16 are not ours: such a speed isn't judged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dist_lora.config.schema import Config
from dist_lora.plan.hardware import GPUS, find_gpu
from dist_lora.plan.plan import Machines, Plan, make_plan
from dist_lora.text import GIB

FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Figure:
    """One published figure and our plan of the same run."""

    tree: dict[str, Any]
    plan: Plan

    @property
    def published_gib(self) -> float:
        """Their memory per GPU."""
        number, unit = self.tree["memory"].split()
        return float(number) * {"GiB": 1.0, "GB": 1e9 / GIB}[unit]

    @property
    def published_tokens_per_s(self) -> float:
        """Theirs, of all GPUs."""
        if "tokens_per_s_a_gpu" in self.tree:
            return float(self.tree["tokens_per_s_a_gpu"]) * int(self.tree["machines"]["gpus"])
        return float(self.tree["tokens_per_s"])

    @property
    def memory_gib(self) -> float:
        """Ours per GPU, counted as the source counts it."""
        of_plan = self.plan.memory.device if self.tree["counts"] == "tensors" else self.plan.device_bytes
        return of_plan / GIB

    @property
    def memory_error(self) -> float:
        """The plan's over theirs, minus one."""
        return self.memory_gib / self.published_gib - 1

    @property
    def speed_error(self) -> float:
        """By how much the nearer end of our range misses theirs; 0 if the range contains it."""
        slow, fast = self.plan.speed.tokens_per_s
        nearest = min(max(self.published_tokens_per_s, slow), fast)
        return nearest / self.published_tokens_per_s - 1


def read_figures(path: Path = FILE) -> tuple[list[Figure], dict[str, dict[str, str]]]:
    """All figures with their plans, and the sources by name."""
    tree = yaml.safe_load(path.read_text())
    return [Figure(figure, plan_of(figure)) for figure in tree["figures"]], tree["sources"]


def plan_of(figure: dict[str, Any]) -> Plan:
    """Our plan of the same run, in bf16 where theirs is in another format."""
    wanted, machines = figure["config"], figure["machines"]
    micro, passes = wanted["micro_batch"], wanted.get("passes", 1)
    model = {"name": wanted["model"], "quant": wanted.get("quant", "none")}
    if "shape" in wanted:
        model["shape"] = wanted["shape"]
    config = Config.model_validate(
        {
            "run": "it",
            "model": model,
            "lora": {"rank": wanted["rank"], "targets": wanted.get("targets", "all")},
            "data": {"train": "unused"},
            "train": {
                "micro_batch": micro,
                "global_batch": micro * passes * machines["gpus"],
                "sequence_length": wanted["sequence_length"],
                "activation_checkpointing": wanted["recompute"],
            },
            "parallel": {
                "engine": wanted.get("engine", "auto"),
                "offload": wanted.get("offload", "none"),
                "adapters": wanted.get("adapters", "auto"),
            },
        }
    )
    if "gpu_gib" in machines:
        gpu = replace(GPUS["h100-80gb"], name="a GPU of any size", memory_gb=machines["gpu_gib"])
    else:
        gpu = find_gpu(machines["gpu"])
    return make_plan(config, Machines(1, machines["gpus"], gpu))


def name_of(figure: Figure) -> str:
    """The run in short."""
    wanted, machines = figure.tree["config"], figure.tree["machines"]
    on = machines.get("gpu", "")
    stored = figure.tree.get("format", wanted.get("quant", "bf16").replace("none", "bf16"))
    return (
        f"{wanted['model']} {stored} r{wanted['rank']}, {wanted['micro_batch']} x "
        f"{wanted['sequence_length']}, {machines['gpus']} x {on}".rstrip(" x")
    )


def memory_cells(figure: Figure) -> list[str]:
    """Theirs, ours and the error; empty if they published none."""
    if "memory" not in figure.tree:
        return ["", "", ""]
    is_estimate = " (estimate)" if figure.tree.get("is_estimate") else ""
    return [f"{figure.tree['memory']}{is_estimate}", f"{figure.memory_gib:.1f} GiB", f"{figure.memory_error:+.0%}"]


def speed_cells(figure: Figure) -> list[str]:
    """Like ``memory_cells``."""
    if "tokens_per_s" not in figure.tree and "tokens_per_s_a_gpu" not in figure.tree:
        return ["", "", ""]
    slow, fast = figure.plan.speed.tokens_per_s
    error = f"{figure.speed_error:+.0%}" if figure.speed_error else "inside"
    if "format" in figure.tree:
        error = f"{figure.tree['format']}: not judged"
    return [f"{figure.published_tokens_per_s:,.0f}", f"{slow:,.0f} to {fast:,.0f}", error]


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="The plan compared with published figures.")
    parser.add_argument("--sources", action="store_true", help="print quotations, assumptions and differences too")
    given = parser.parse_args()
    figures, sources = read_figures()
    print(
        "| source | run | memory per GPU | planned | error | tokens/s | planned | error |\n|---|---|---|---|---|---|---|---|"
    )
    for figure in figures:
        cells = [figure.tree["source"], name_of(figure), *memory_cells(figure), *speed_cells(figure)]
        print(f"| {' | '.join(cells)} |")
    if given.sources:
        for figure in figures:
            tree, source = figure.tree, sources[figure.tree["source"]]
            print(
                f"\n{name_of(figure)}\n  {source['where']}\n  {tree['quotation']}\n  setting: {source['setting'].strip()}"
            )
            print(f"  assumed: {tree['assumed']}\n  other than ours: {tree['other']}")


if __name__ == "__main__":
    main()
