"""Whole runs on one GPU, and on two: resumed to the byte, stopped, answered, and the same numbers over NCCL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.ranks.runs import chats_settings

pytestmark = pytest.mark.gpu

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def written(folder: Path, base: Path, *, num_steps: int = 8, **sections: dict[str, Any]) -> Path:
    """A config over 14 chats, in bf16 as GPUs have it."""
    settings = chats_settings(base, folder, num_steps=num_steps, dropout=0.1)
    settings["model"]["dtype"] = "auto"
    settings["runs_dir"] = str(folder / "runs")
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def dist_lora(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_lora", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def train(config: Path, *overrides: str, code: int = 0) -> str:
    done = dist_lora("train", config, *overrides)
    assert done.returncode == code, done.stderr
    return done.stderr


def stop(config: Path, *overrides: str, after: int) -> str:
    """Train, and ask the run to stop by SIGTERM once a step is done; returns what it said from then on."""
    command = [sys.executable, "-m", "dist_lora", "train", str(config), *overrides]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith(f"step {after}/"):
                run.send_signal(signal.SIGTERM)
                break
        rest = run.stderr.read()
        assert run.wait(120) == 75, rest
    return rest


@pytest.mark.parametrize("offload", ["none", "all"])
def test_with_deterministic_kernels_a_stopped_run_goes_on_to_the_bytes_of_a_straight_one(
    tiny_llama, tmp_path, offload
) -> None:
    """Dropout draws the same masks, and nothing is added by atomics."""
    config = written(
        tmp_path, tiny_llama("llama31"), num_steps=60, train={"deterministic": True}, log={"every": 1},
        parallel={"offload": offload},
    )  # fmt: skip
    train(config, "run=straight")
    assert "SIGTERM" in stop(config, "run=stopped", after=3)
    num_steps = len((tmp_path / "runs/stopped/metrics.jsonl").read_text().splitlines())
    assert 3 <= num_steps < 60, "it stopped within the run"
    train(config, "run=stopped")
    adapters = [tmp_path / "runs" / run / "adapter/adapter_model.safetensors" for run in ("straight", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_loss_and_answers_of_a_gpu_in_fp32_are_those_of_the_cpu(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    config = written(
        tmp_path, base, num_steps=40, model={"dtype": "fp32"}, eval={"exact_match": True, "max_new_tokens": 24}
    )
    train(config, f"data.eval={tmp_path}/train.jsonl")
    asked = ["eval", config, f"data.eval={tmp_path}/train.jsonl", "--adapter", tmp_path / "runs/it/adapter", "--json"]
    on_gpu, on_cpu = dist_lora(*asked), dist_lora(*asked, CUDA_VISIBLE_DEVICES="")
    assert on_gpu.returncode == on_cpu.returncode == 0, on_gpu.stderr + on_cpu.stderr
    found, wanted = json.loads(on_gpu.stdout), json.loads(on_cpu.stdout)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    # A token of two that are nearly as likely may be the other one: no more than one answer in all.
    assert abs(found["exact_match"]["correct"] - wanted["exact_match"]["correct"]) <= 1


def losses(folder: Path, run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


@two_gpus
@pytest.mark.parametrize(("engine", "base_shard"), [("fsdp2", "node"), ("fsdp2", "gpu"), ("zero3", "world")])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_two_gpus_have_the_losses_of_one(tiny_llama, tmp_path, engine, base_shard, quant) -> None:
    config = written(tmp_path, tiny_llama("llama31"), model={"dtype": "fp32", "quant": quant}, lora={"dropout": 0.0})
    one = dist_lora("train", config, "run=one", "--nproc", 1)
    placed = f"parallel.engine={engine}", f"parallel.base_shard={base_shard}"
    two = dist_lora("train", config, "run=two", *placed, "--nproc", 2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-3)


@two_gpus
def test_two_ranks_on_one_gpu_are_refused_in_seconds(tiny_llama, tmp_path) -> None:
    config = written(tmp_path, tiny_llama("llama31"))
    done = dist_lora("train", config, "--nproc", torch.cuda.device_count() + 1)
    assert done.returncode == 2, done.stderr
    assert "several ranks have the same GPU" in done.stderr
    assert done.stderr.count("error:") == 1
