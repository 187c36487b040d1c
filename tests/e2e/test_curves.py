"""Curves and progress of real runs: TensorBoard's files, another tracker by one word, and a bar on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.runs import ROOT, command, run

# A tracker's package that writes down what it is asked to do.
FAKE_WANDB = """
import json, os
def _note(*what):
    with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class _Run:
    def log(self, values, step=None):
        if step == int(os.environ.get("FAKE_WANDB_FAILS_AT", 0)):
            raise ConnectionError("the server is gone")
        _note("log", step, values)
    def finish(self):
        _note("finish")
class config:
    @staticmethod
    def update(values, allow_val_change):
        _note("config", values)
def init(project, **more):
    if os.environ.get("FAKE_WANDB_REFUSES"):
        raise PermissionError("not logged in")
    _note("init", project, os.environ["RANK"])
    return _Run()
"""


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meter")
    samples = [{"prompt": f"say {i}", "completion": str(i) * (i % 3 + 1)} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    path = folder / "config.yaml"
    path.write_text(
        f"run: a\nruns_dir: {folder}/runs\nmodel: {{name: {tiny_llama('llama31')}}}\nlora: {{rank: 4}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: 0.2, cache_dir: {folder}/cache}}\n"
        "train: {steps: 5, global_batch: 4, micro_batch: 2, sequence_length: 64}\n"
        "optim: {lr: 1e-2, warmup_steps: 2, schedule: linear}\ncheckpoint: {every: 2}\neval: {every: 4}\n"
    )
    return path


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a fake wandb package writes to; it is on the path of the processes that a test starts."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), str(ROOT)]))
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def lines_of(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard's own reader shows of a tag."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_with_its_loss_also_after_a_resume(config) -> None:
    folder = config.parent / "runs" / "board"
    assert run("train", config, "run=board", "checkpoint.keep=9").returncode == 0
    first = lines_of(folder / "metrics.jsonl")
    assert curve(folder, "loss") == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in first]
    # As a machine's end leaves it: steps 3 to 5 are written down, and the newest checkpoint that is whole is of step 2.
    for lost in (4, 5):
        (folder / "checkpoints" / f"step-{lost:08d}" / "manifest.json").unlink()
    done = run("train", config, "run=board", "train.steps=8")
    assert done.returncode == 0 and "step-00000002: step 2 of 8" in done.stderr, done.stderr
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[:2] == first[:2] and lines[4]["loss"] != first[4]["loss"]  # another number of steps, another rate
    for tag in ("loss", "lr", "grad_norm", "tokens_per_s"):
        assert curve(folder, tag) == [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines]
    assert [step for step, _ in curve(folder, "eval_loss")] == [4, 8]


@pytest.mark.turn(of=2)
def test_another_tracker_is_one_word_and_is_finished_and_a_terminal_has_a_bar(config, fake_wandb) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    with subprocess.Popen(
        command("train", config, "run=other", "log.trackers=[wandb]", "--nproc", 2),
        cwd=ROOT, stderr=theirs, env={**os.environ, "TERM": "xterm-256color"},
    ) as started:  # fmt: skip
        os.close(theirs)
        shown = b""
        while piece := _read(ours):
            shown += piece
        assert started.wait(60) == 0, shown.decode()
    os.close(ours)

    metrics = lines_of(config.parent / "runs" / "other" / "metrics.jsonl")
    calls = lines_of(fake_wandb)
    assert calls[0] == ["init", "other", "0"]  # one rank alone, called as the run is
    assert calls[1][0] == "config" and calls[1][1]["lora.rank"] == 4 and calls[1][1]["optim.lr"] == 1e-2
    logged = [(step, values) for kind, *rest in calls if kind == "log" for step, values in [rest] if "loss" in values]
    assert logged == [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in metrics]
    assert [rest[0] for kind, *rest in calls if kind == "log" and "eval_loss" in rest[1]] == [4, 5]
    assert calls[-1] == ["finish"] and sum(kind == "finish" for kind, *_ in calls) == 1

    bar = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    last = metrics[-1]
    said = f"5/5 loss {last['loss']:.4f}  lr {last['lr']:.2e}  {last['tokens_per_s']:,.0f} tokens/s 0:00:00 left"
    assert said in bar
    assert re.search(r"[1-5]/5 loss \d\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tokens/s \d:\d\d:\d\d left", bar)
    assert "━" in bar and "step 1/5" not in bar


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's word for the end: nobody has the other side open
        return b""


@pytest.mark.turn(of=2, among="whole runs")
def test_a_tracker_whose_server_goes_away_costs_no_step(config, fake_wandb, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_WANDB_FAILS_AT", "3")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():  # as a launcher of one process does
        monkeypatch.setenv(name, value)
    done = run("train", config, "run=gone", "log.trackers=[tensorboard, wandb]")
    assert done.returncode == 0, done.stderr
    assert (
        "log.trackers: wandb failed at step 3 and is dropped: the server is gone. metrics.jsonl has all values"
        in done.stderr
    )
    assert len(lines_of(config.parent / "runs" / "gone" / "metrics.jsonl")) == 5
    assert len(curve(config.parent / "runs" / "gone", "loss")) == 5
    assert [rest[0] for kind, *rest in lines_of(fake_wandb) if kind == "log"] == [1, 2]


@pytest.mark.turn(of=2, among="whole runs")
def test_a_tracker_that_does_not_start_is_told_with_its_reason(config, fake_wandb, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_WANDB_REFUSES", "1")
    done = run("train", config, "run=refused", "log.trackers=[wandb]")
    assert done.returncode == 2
    assert "error: log.trackers: wandb couldn't be started: PermissionError: not logged in. Fix that" in done.stderr


def test_a_tracker_without_its_package_is_told_before_anything_else(here, config) -> None:
    code, _, err, _ = here(
        "train", config, "run=none", "log.trackers=[tensorboard, mlflow, comet_ml]", "model.name=./nowhere"
    )
    assert code == 2
    assert err == (
        "error: log.trackers: mlflow, comet_ml: not installed here. Install them (pip install mlflow comet-ml), "
        "or leave it out: log.trackers=[]\n"
    )
