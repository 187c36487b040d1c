"""The commands as a user types them: train on two ranks, kill one, go on, and load the result in PEFT."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import ROOT, Process, check_learned, losses, run


def test_one_process_has_the_losses_of_two(config, whole) -> None:
    done = run("train", config, "run=alone", "--nproc", 1)
    assert done.returncode == 0, done.stderr
    alone = losses(whole.parent / "alone")
    assert [step for step, _ in alone] == list(range(1, 9))
    assert [loss for _, loss in alone] == pytest.approx([loss for _, loss in losses(whole)], abs=1e-5)


def test_the_adapter_loads_in_peft_with_every_key_in_its_place(whole) -> None:
    import yaml
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = yaml.safe_load((whole / "config.yaml").read_text())["model"]["name"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole / "adapter")
    ours = load_file(whole / "adapter" / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs)
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[key].float(), ours[key]) for key in ours)
    assert all(ours[key].any() for key in ours)


def test_a_run_whose_rank_was_killed_goes_on_to_the_bytes_of_an_uninterrupted_one(config, whole) -> None:
    folder = whole.parent / "killed"
    with contextlib.closing(Process("train", config, "run=killed", "--nproc", 2)) as started:
        while "\nstep 3/8" not in started.stderr():
            assert started.wait(0.02) is None, started.stderr()
        os.kill(started.ranks()[-1], signal.SIGKILL)
        assert started.wait(30) == 1, started.stderr()
        told = started.stderr()
    assert not (folder / "adapter").exists(), told
    assert "error: rank 1 of 2 was killed by SIGKILL" in told
    done = run("train", config, "run=killed", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_merged_model_has_the_logits_of_the_adapter_beside_its_base(whole, tmp_path) -> None:
    import yaml
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    done = run("merge", whole / "adapter", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "of the base's matrices changed" in done.stdout
    base = yaml.safe_load((whole / "config.yaml").read_text())["model"]["name"]
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, found = beside(ids).logits, AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_profile_tells_the_parts_of_one_step_and_changes_no_byte(config, whole) -> None:
    folder = whole.parent / "profiled"
    done = run("train", config, "run=profiled", "--nproc", 2, "--profile")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert [path.name for path in (folder / "profile").iterdir()] == ["step-00000003.json.gz"]
    log = (folder / "log.txt").read_text()
    table = log[log.index("profile of step 3 on rank 0") : log.index("trace for ui.perfetto.dev")].splitlines()
    shares = {line[:16].strip(): float(line[48:].split()[1].rstrip("%")) for line in table if line.count("%")}
    # All but dequantizing, of which an unquantized base has none; they are all of the step.
    assert shares.keys() >= {
        "frozen matmuls", "LoRA", "attention", "elementwise", "loss", "communication", "optimizer", "data", "host"
    }  # fmt: skip
    assert sum(shares.values()) == pytest.approx(100, abs=1)


def test_gathering_into_a_folder_of_something_else_is_refused_and_leaves_it_alone(whole, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run("gather", whole, "--out", tmp_path)
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_report_of_a_run_has_its_evaluations(config, here, tmp_path) -> None:
    done = here("train", config, "run=reported", "data.eval=0.25", "eval.every=3", "train.steps=8")
    assert done.returncode == 0, done.stderr
    folder, page = config.parent / "runs" / "reported", tmp_path / "page.html"
    done = run("report", folder, "--out", page)
    assert (done.returncode, done.stdout) == (0, f"{page}\n"), done.stderr
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [each["step"] for each in evaluations] == [3, 6, 8]
    told = page.read_text()
    assert all(f"<td>{each['eval_loss']:.4f}</td>" in told for each in evaluations)
    assert "exit code 0: done" in told
    assert "% of W by norm, most in layer" in told and "norm of dW by layer, % of W" in told
    assert "learned   In half of the " in (folder / "log.txt").read_text()


def test_a_run_records_what_it_has_learned_as_its_files_say_it(whole) -> None:
    check_learned(whole)


@pytest.mark.slow
def test_torchrun_leads_to_the_numbers_of_our_own_launcher(config, whole) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "dist_lora", "train", str(config), "run=torchrun"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(whole.parent / "torchrun") == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (whole.parent / "torchrun" / name).read_bytes() == (whole / name).read_bytes()


def test_evaluating_a_file_of_its_own_does_not_read_the_training_set(config, whole) -> None:
    data = config.parent / "train.jsonl"
    done = run("eval", config, f"data.eval={data}", "data.train=nowhere.jsonl", "--nproc", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target_tokens"] > 0
