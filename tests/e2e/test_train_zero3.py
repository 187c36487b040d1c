"""Engine zero3 as a user starts it: by our launcher and by DeepSpeed's, killed and gone on, and without DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.runs import ROOT, Process, check_learned, command, losses, run

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def sharded(config, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], Path]:
    """A run under zero3 on two ranks, what it said, and the folder where it would have compiled anything."""
    compiled = tmp_path_factory.mktemp("compiled") / "extensions"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        command("train", config, "run=zero3", "parallel.engine=zero3", "eval.every=4", "data.eval=0.2", "eval.exact_match=true",
                "eval.max_new_tokens=4", "--nproc", 2),
        cwd=ROOT, env={**environment, "TORCH_EXTENSIONS_DIR": str(compiled)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "zero3", done, compiled


@pytest.fixture(scope="module")
def alone(config) -> Path:
    """The same run on one process, which needs no engine."""
    done = run("train", config, "run=alone-held-out", "data.eval=0.2", "eval.every=4", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    return config.parent / "runs" / "alone-held-out"


@pytest.mark.slow
def test_a_run_on_two_ranks_has_the_losses_and_the_adapter_of_one_process(sharded, alone) -> None:
    folder, _, _ = sharded
    assert [step for step, _ in losses(folder)] == list(range(1, 9))
    assert [loss for _, loss in losses(folder)] == pytest.approx([loss for _, loss in losses(alone)], abs=1e-5)
    found, wanted = load_file(folder / ADAPTER), load_file(alone / ADAPTER)
    assert found.keys() == wanted.keys()
    squares = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    assert squares**0.5 < 1e-4 * sum(float(tensor.square().sum()) for tensor in wanted.values()) ** 0.5
    summaries = [json.loads((run_folder / "summary.json").read_text()) for run_folder in (folder, alone)]
    assert [summary["frozen"] for summary in summaries] == [summaries[1]["frozen"]] * 2 and summaries[1]["frozen"] > 0


@pytest.mark.slow
def test_weights_sharded_by_elements_have_the_norms_of_the_whole(sharded) -> None:
    check_learned(sharded[0])


@pytest.mark.slow
def test_deepspeed_says_nothing_and_compiles_nothing(sharded) -> None:
    _, done, compiled = sharded
    assert done.stdout == ""
    noise = [line for line in done.stderr.splitlines() if "warn" in line.lower() or "deepspeed" in line.lower()]
    assert noise == []
    assert not compiled.exists()


@pytest.mark.turn(of=4, among="runs on ZeRO-3")
def test_a_killed_run_goes_on_to_the_bytes_of_one_that_was_not(config, sharded) -> None:
    whole, _, _ = sharded
    arguments = ("train", config, "run=zero3-killed", "parallel.engine=zero3", "data.eval=0.2", "eval.every=4",
                 "eval.exact_match=true", "eval.max_new_tokens=4", "--nproc", 2)  # fmt: skip
    with contextlib.closing(Process(*arguments)) as started:
        while "\nstep 3/8" not in started.stderr():
            assert started.wait(0.02) is None, started.stderr()
        os.kill(started.ranks()[-1], signal.SIGKILL)
        assert started.wait(30) == 1, started.stderr()
        told = started.stderr()
    folder = whole.parent / "zero3-killed"
    assert not (folder / "adapter").exists(), told
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.turn(of=4, among="runs on ZeRO-3")
def test_an_evaluation_prints_the_loss_that_a_process_without_engine_finds(config, sharded, here) -> None:
    folder, _, _ = sharded
    arguments = ("eval", config, "data.eval=0.2", "--adapter", folder / "adapter", "--json")
    done = run(*arguments, "parallel.engine=zero3", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    found, wanted = json.loads(done.stdout), json.loads(here(*arguments).stdout)
    for name in ("loss", "base_loss"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5)


@pytest.mark.turn(of=4, among="runs on ZeRO-3")
def test_the_deepspeed_launcher_leads_to_the_numbers_of_our_own(config, sharded) -> None:
    whole, _, _ = sharded
    launcher = Path(sys.executable).parent / "deepspeed"
    done = subprocess.run(
        [sys.executable, launcher, "--num_accelerators", "2", "--no_local_rank", "--module", "dist_lora", "train", str(config),
         "run=launched", "parallel.engine=zero3", "data.eval=0.2", "eval.every=4", "eval.exact_match=true", "eval.max_new_tokens=4"],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(whole.parent / "launched") == losses(whole)
    assert (whole.parent / "launched" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.turn(of=4, among="runs on ZeRO-3")
def test_a_deepspeed_that_breaks_under_recomputation_is_refused_by_its_version(config, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import deepspeed\n"
        "    deepspeed.__version__ = '0.19.2'\n"
    )  # fmt: skip
    done = subprocess.run(
        command("train", config, "run=old", "parallel.engine=zero3", "train.activation_checkpointing=true", "--nproc", 2),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("needs DeepSpeed 0.19.8 or newer, and 0.19.2 is installed") == 1
    assert "activation checkpointing" in done.stderr
