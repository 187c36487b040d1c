"""The library in a script of a user's own, under torchrun and alone, with a format, a metric and a callback of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from dist_lora import api
from dist_lora.checkpoint.manifest import read_manifest
from dist_lora.errors import OwnCodeError
from tests import ROOT
from tests.e2e.runs import environment, losses, run_each_rank, write_config, write_lines

EXAMPLE = Path(__file__).with_name("library_example.py")
METRIC = "eval_share_of_words"


def run_example(folder: Path, model: Path, *, num_ranks: int) -> subprocess.CompletedProcess[str]:
    """The example on 12 questions of which a third is held out; its run and its merged model lie in ``folder``."""
    write_lines(folder / "train.jsonl", [{"q": f"say {i}", "a": f"{i} and {i % 3}"} for i in range(12)])
    config = write_config(
        folder / "config.yaml",
        run="it",
        runs_dir=str(folder / "runs"),
        model={"name": str(model)},
        lora={"rank": 4},
        data={"train": str(folder / "train.jsonl"), "eval": 0.3, "cache_dir": str(folder / "cache")},
        train={"steps": 2, "global_batch": 4, "micro_batch": 1, "sequence_length": 64},
        optim={"lr": 1e-2, "warmup_steps": 0},
        checkpoint={"every": 1},
        eval={"every": 2, "max_new_tokens": 8},
        log={"trackers": []},
    )
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [*(starter if num_ranks > 1 else [sys.executable]), str(EXAMPLE), str(config), str(folder / "merged")],
        cwd=folder, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tiny_llama, tmp_path_factory) -> tuple[Path, str]:
    """The folder of the example on two ranks under torchrun, and what it printed."""
    folder = tmp_path_factory.mktemp("library")
    ended = run_example(folder, tiny_llama("llama31"), num_ranks=2)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


def lines_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / "it" / name).read_text().splitlines()]


@pytest.mark.slow
def test_the_example_trains_evaluates_and_merges_on_two_ranks_under_torchrun(done) -> None:
    folder, printed = done
    told = re.fullmatch(r"best loss (\S+), (\S+), (\d+) matrices merged\n", printed)
    assert told is not None, printed
    assert float(told[1]) == min(line["loss"] for line in lines_of(folder, "metrics.jsonl"))
    (evaluation,) = lines_of(folder, "evaluations.jsonl")
    assert math.isclose(float(told[2]), evaluation[METRIC], abs_tol=1e-12)
    assert int(told[3]) == 14
    AutoModelForCausalLM.from_pretrained(folder / "merged")


@pytest.mark.slow
def test_the_hash_of_its_module_is_kept_with_the_run_and_the_checkpoint(done) -> None:
    folder = done[0] / "runs" / "it"
    expected = hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    named = {"data.format library_example:as_chat": expected, "eval.metrics library_example:share_of_words": expected}
    assert json.loads((folder / "summary.json").read_text())["own_code"] == named
    assert read_manifest(folder / "checkpoints" / "step-00000002").progress["own_code"] == named
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["format"] == "library_example:as_chat"


def test_the_example_is_short_and_stands_on_the_page() -> None:
    text = EXAMPLE.read_text()
    assert text in (ROOT / "docs" / "library.md").read_text()
    statements = [line for line in text.splitlines() if line.strip() and '"""' not in line]
    assert len(statements) <= 31


def test_a_callback_that_raises_ends_all_ranks_and_is_named_once(config) -> None:
    codes, ended = run_each_rank("train", config, "run=raises", "train.callbacks=[tests.own:RaisesAtTwo]")
    assert codes == [2, 2]
    assert len(re.findall("error: ", ended.stderr)) == 1
    assert re.search(
        r"^error: train\.callbacks: tests\.own:RaisesAtTwo\.on_step raised ZeroDivisionError: two is too much "
        r"\(.*tests/own\.py:\d+\)$",
        ended.stderr,
        re.MULTILINE,
    ), ended.stderr
    assert [step for step, _ in losses(config.parent / "runs" / "raises")] == [1, 2]


def test_code_that_cannot_be_used_is_refused_by_all_ranks_before_the_base_is_opened(config) -> None:
    names = ("data.format=nowhere:f", "eval.metrics=[tests.own:one_argument]", "train.callbacks=[tests.own:Misspelt]")
    codes, ended = run_each_rank("train", config, "run=refused", "model.name=./none", *names)
    assert codes == [2, 2]
    error = ended.stderr[ended.stderr.index("error: ") :]
    for told in (
        "data.format: nowhere:f: there is no module nowhere",
        "eval.metrics: tests.own:one_argument takes",
        "train.callbacks: tests.own:Misspelt: on_stpe is no hook (nearest: on_step)",
    ):
        assert error.count(told) == 1, error
    assert "model.name" not in error


def test_a_single_process_raises_what_is_wrong_and_the_next_call_goes_on(config, monkeypatch, capsys) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = api.load(config, "run=of-a-script", "train.steps=2", "checkpoint.every=1")

    class Fails(api.Callback):
        def on_step(self, line: dict) -> None:
            raise OSError("no network")

    with pytest.raises(OwnCodeError, match=r"Fails\.on_step raised OSError: no network") as caught:
        api.train(alone, callbacks=[Fails()])
    assert isinstance(caught.value.__cause__, OSError) and "error: " not in capsys.readouterr().err
    run = api.train(alone)
    assert run.summary["steps"] == 2 and (run.adapter / "adapter_model.safetensors").is_file()
    assert api.train(alone) == run, "a run that is done is left alone"
    answers = api.generate(run.adapter, ["say 1", [{"role": "user", "content": "say 2"}]], max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    gathered = api.gather(run.folder, out=config.parent / "gathered")
    weights = "adapter_model.safetensors"
    assert (gathered / weights).read_bytes() == (run.adapter / weights).read_bytes()
