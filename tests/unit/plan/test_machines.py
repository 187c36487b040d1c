"""For which machines a plan is made: what the command line says, else the config, else what is here, else an assumption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.schema import Config, MachineSection
from dist_lora.errors import ConfigError, PlanError
from dist_lora.plan import command
from dist_lora.plan.command import MachineRequest
from dist_lora.plan.explain import explain
from dist_lora.plan.hardware import GPUS, gpu_of_memory, gpus_here
from dist_lora.plan.plan import Machines, make_plan, sweep
from dist_lora.plan.table import lines_of, sweep_lines

NAMED = MachineSection(gpu="rtx4090-24gb", gpus_per_node=2, nodes=3)
H100 = GPUS["h100-80gb"]


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch) -> None:
    monkeypatch.setattr(command, "gpus_here", list)


def machines(section: MachineSection, *, nodes=None, size=None, gpu=None, gib=None, engine="auto") -> Machines:
    config = config_of(machine=section.model_dump(), parallel={"engine": engine})
    return MachineRequest.of(config, nodes, size, gpu, gib, None, None).single()


def config_of(**sections: Any) -> Config:
    tree = {"run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x.jsonl"}, "train": {"steps": 100}}
    return Config.model_validate(tree | sections)


def test_the_config_says_what_the_command_line_does_not() -> None:
    assert str(machines(NAMED)) == "3 nodes x 2 x rtx4090-24gb"
    assert str(machines(NAMED, nodes=[1])) == "2 x rtx4090-24gb"
    assert str(machines(NAMED, size=4, gpu=["h100-80gb"])) == "3 nodes x 4 x h100-80gb"
    assert str(machines(NAMED, gib=16)) == "3 nodes x 2 x GPU of 16 GiB"
    assert machines(NAMED).assumed == ""


def test_where_nobody_says_anything_it_is_the_gpus_that_are_here(monkeypatch) -> None:
    monkeypatch.setattr(command, "gpus_here", lambda: [GPUS["a100-80gb"], GPUS["a100-40gb"]])
    found = machines(MachineSection())
    assert str(found) == "2 x a100-40gb" and found.assumed == "", "the smallest must hold its share"
    assert str(machines(MachineSection(nodes=4))) == "4 nodes x 2 x a100-40gb"
    assert str(machines(MachineSection(), size=1)) == "1 x a100-40gb"
    assert str(machines(NAMED)) == "3 nodes x 2 x rtx4090-24gb"


def test_what_is_assumed_is_said() -> None:
    found = machines(MachineSection())
    assert (str(found), found.assumed) == ("8 x h100-80gb", "assuming 8 x h100-80gb")
    assert machines(MachineSection(), size=2).assumed == "assuming 2 x h100-80gb"
    assert machines(MachineSection(gpu="h200-141gb")).assumed == "assuming 8 GPUs per node"
    assert machines(MachineSection(), gib=16, size=1).assumed == ""
    assert machines(MachineSection(), engine="none").assumed == "assuming 1 x h100-80gb", "one process, one GPU"
    assert machines(MachineSection(gpu="h200-141gb"), engine="none").assumed == "assuming 1 GPU per node"
    plan = make_plan(config_of(), found)
    assert plan.to_json()["assumed"] == "assuming 8 x h100-80gb"
    assert "  machines  assuming 8 x h100-80gb: set the config's machine section" in "\n".join(lines_of(plan))
    assert "assuming" not in "\n".join(lines_of(make_plan(config_of(), machines(NAMED))))


def test_a_sweep_says_what_is_assumed_and_where_nothing_fits() -> None:
    assert next(sweep_lines(sweep(config_of(), [machines(MachineSection())]))).startswith("machines  assuming 8 x h100")
    request = MachineRequest.of(config_of(), None, 1, None, 0.5, None, None)
    with pytest.raises(PlanError, match=r"3\.2-1b doesn't fit on .* with any of the settings tried"):
        command.plan(config_of(), request, is_sweep=True, as_json=False)


def test_a_gpu_that_is_not_known_is_told_from_a_config_too() -> None:
    with pytest.raises(ConfigError, match=r"^machine.gpu: no GPU called rtx4091-24gb is known \(nearest: rtx4090-24gb"):
        machines(MachineSection(gpu="rtx4091-24gb"))


def fake_driver(folder: Path, text: str) -> list[str]:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    script.chmod(0o755)
    return [str(script)]


def test_the_driver_says_what_is_here(tmp_path: Path) -> None:
    found = gpus_here(fake_driver(tmp_path, "NVIDIA H100 80GB HBM3, 81559\nNVIDIA GeForce RTX 5080, 16303\n"))
    assert found[0] == H100
    assert found[1].name == "NVIDIA GeForce RTX 5080" and found[1].memory_bytes == pytest.approx(
        16303 * 2**20, rel=1e-6
    )
    assert found[1].tflops is None, "no other GPU's speed"
    assert gpus_here(fake_driver(tmp_path, "NVIDIA L40S, 46068\n")) == [GPUS["l40s-48gb"]]
    assert GPUS["l40s-48gb"].memory_bytes == pytest.approx(46068 * 2**20, rel=1e-3), "a sixteenth is ECC's"


def test_tflops_give_the_unknown_gpu_that_is_here_a_speed(monkeypatch) -> None:
    unknown = gpu_of_memory(16, name="NVIDIA GeForce RTX 5080")
    monkeypatch.setattr(command, "gpus_here", lambda: [unknown])
    request = MachineRequest.of(config_of(), None, None, None, None, None, None, 112)
    assert request.single().gpu == dataclasses.replace(unknown, tflops=112)
    assert request.single().options == ("--nodes", "1", "--gpus-per-node", "1", "--tflops", "112")


def test_without_a_driver_nothing_is_here(tmp_path: Path) -> None:
    assert gpus_here([str(tmp_path / "none")]) == []
    assert gpus_here(fake_driver(tmp_path, "Failed to initialize NVML: Driver/library version mismatch\n")) == []


def test_the_cost_is_hours_times_gpus_times_the_price() -> None:
    plan = make_plan(config_of(machine={"price_per_gpu_hour": 2.5}), Machines(2, 4, H100))
    low, high = plan.speed.step_s
    assert plan.cost == pytest.approx((100 * low / 3600 * 8 * 2.5, 100 * high / 3600 * 8 * 2.5))
    assert plan.to_json()["cost"] == plan.cost and json.dumps(plan.to_json())
    assert f"  cost: {plan.cost[0]:,.2f} to {plan.cost[1]:,.2f}, at 2.5 per GPU hour" in "\n".join(lines_of(plan))


def test_without_a_price_or_steps_nothing_is_said_to_cost_anything() -> None:
    assert make_plan(config_of(), Machines(1, 8, H100)).cost is None
    unknown = make_plan(config_of(train={}, machine={"price_per_gpu_hour": 2.5}), Machines(1, 8, H100))
    assert unknown.cost is None and "  cost: unknown, since the number of steps is unknown" in "\n".join(
        lines_of(unknown)
    )


def test_an_explanation_ends_with_the_machine_that_the_config_names() -> None:
    config = config_of(machine={"gpu": "rtx4090-24gb", "gpus_per_node": 2})
    needed = make_plan(config, Machines(1, 2, GPUS["rtx4090-24gb"])).device_bytes / 2**30
    assert explain(config).endswith(f"On 2 x rtx4090-24gb each GPU needs {needed:.1f} of 23.6 GiB: fits.")
    big = config_of(model={"name": "3.1-405b"}, machine={"gpu": "rtx4090-24gb", "gpus_per_node": 2})
    assert explain(big).endswith("doesn't fit; see `dist-lora plan` for what would.")
    assert "each GPU needs" not in explain(config_of())
