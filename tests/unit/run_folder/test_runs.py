"""The list of runs: each in the state that it is in, by its own small files."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.run_folder.runs import list_runs, runs_table
from dist_lora.text import in_columns


def run_of(runs: Path, name: str, *, changed_s: float, quant: str = "none", **files: str) -> Path:
    """A run's folder with some of its files."""
    folder = runs / name
    folder.mkdir(parents=True)
    settings = {"run": name, "model": {"name": "3.1-8b", "quant": quant}, "data": {"train": "x.jsonl"}}
    (folder / "config.yaml").write_text(dump_config(Config.model_validate(settings)))
    for file, text in files.items():
        (folder / file.replace("_", ".")).write_text(text)
    for path in folder.iterdir():
        os.utime(path, (changed_s, changed_s))
    return folder


def steps(*losses: float) -> str:
    return "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1))


def evaluations(*losses: float) -> str:
    return "".join(json.dumps({"step": step, "eval_loss": loss}) + "\n" for step, loss in enumerate(losses, 1))


ATTEMPT = json.dumps({"num_steps": 9, "former_seconds": 0.0, "former_peak_bytes": []})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run in each state."""
    runs = tmp_path / "runs"
    run_of(
        runs,
        "done",
        changed_s=900,
        quant="nf4",
        status="0 final 3 0 - done\n",
        attempt_json=ATTEMPT,
        metrics_jsonl=steps(3.0, 2.0, 1.0) + '{"step": 4, "lo',
        evaluations_jsonl=evaluations(2.5, math.nan, 1.25, 1.5),
    )
    run_of(runs, "stopped", changed_s=800, status="75 again 2 1 - stopped at step 2/9\n", metrics_jsonl=steps(math.nan))
    run_of(runs, "failed", changed_s=700, status="2 final 0 1 - data.train: no such file\n")
    run_of(runs, "killed", changed_s=600, status="running again 0 0 - since 2026-01-01\n")
    run_of(runs, "new", changed_s=500)
    (run_of(runs, "old", changed_s=400) / "config.yaml").write_text("run: old\nlora: {variant: x}\n")
    os.utime(runs / "old" / "config.yaml", (400, 400))
    (runs / "not-a-run").mkdir()
    (runs / "report.html").touch()
    return runs


def test_each_run_is_in_its_state_and_the_last_changed_comes_first(runs: Path) -> None:
    rows = list_runs(runs)
    assert [(row.name, row.state, row.step) for row in rows] == [
        ("done", "done", 3), ("stopped", "stopped", 1), ("failed", "failed", 0), ("killed", "killed", 0),
        ("new", "not started", 0), ("old", "not started", 0),
    ]  # fmt: skip
    done, stopped, failed, killed, new, old = rows
    assert (done.num_steps, done.loss, done.eval_loss, done.best_eval_loss) == (9, 1.0, 1.5, 1.25)
    assert (done.model, done.quant, done.problem) == ("3.1-8b", "nf4", "")
    assert (stopped.problem, failed.problem) == ("stopped at step 2/9", "data.train: no such file")
    assert killed.problem == new.problem == ""
    assert "old/config.yaml" in old.problem and old.model == ""


def test_a_run_whose_lock_is_held_is_running(runs: Path) -> None:
    with (runs / "killed" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert {row.name: row.state for row in list_runs(runs)}["killed"] == "running"
    assert {row.name: row.state for row in list_runs(runs)}["killed"] == "killed"


def test_the_table_has_a_line_for_each_and_json_has_no_nan(runs: Path) -> None:
    rows = list_runs(runs)
    lines = list(in_columns([*runs_table(rows, now_s=960)]))
    assert lines[0].split() == ["run", "state", "step", "loss", "held-out", "best", "model", "changed"]
    assert lines[1].split() == [
        "done",
        "done",
        "3/9",
        "1.0000",
        "1.5000",
        "1.2500",
        "3.1-8b",
        "(nf4)",
        "1",
        "min",
        "ago",
    ]
    assert len(lines) == 7 and lines[2].endswith("stopped at step 2/9")
    stopped = json.loads(json.dumps(rows[1].to_json(), allow_nan=False))
    assert stopped["loss"] is None and stopped["state"] == "stopped"


def test_a_run_that_may_not_be_looked_into_hides_no_other(runs: Path, monkeypatch) -> None:
    names = {row.name for row in list_runs(runs)}
    hidden = sorted(names)[0]

    def with_denial(method: Any) -> Any:
        def asked(path: Path, *args: Any, **settings: Any) -> Any:
            if path.parent.name == hidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return method(path, *args, **settings)

        return asked

    for name in ("stat", "open"):
        monkeypatch.setattr(Path, name, with_denial(getattr(Path, name)))
    rows = {row.name: row for row in list_runs(runs)}
    assert rows.keys() == names and "can't be read: Permission denied" in rows[hidden].problem


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs_dir"):
        list_runs(tmp_path / "nothing")
