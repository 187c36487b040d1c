"""The quickstart's table: it says the numbers that the commands wrote, and what to do when they are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import ROOT

SCRIPT = ROOT / "launch" / "quickstart_table.py"

BEFORE = {
    "loss": 2.25,
    "perplexity": 9.48,
    "exact_match": {"correct": 0, "total": 40},
    "tool_calls": {"wanted": 41, "valid": 7, "right_name": 3, "right_arguments": 1},
    "seconds": 20.0,
}
AFTER = {
    "loss": 0.0123,
    "perplexity": 1.01,
    "exact_match": {"correct": 39, "total": 40},
    "tool_calls": {"wanted": 41, "valid": 40, "right_name": 38, "right_arguments": 37},
    "seconds": 20.0,
}
SUMMARY = {
    "trainable": 4_884_480,
    "frozen": 134_515_008,
    "adapter_bytes": 19_577_000,
    "seconds": 151.7,
    "peak_bytes": [2**30, 3 * 2**29],
    "steps": 32,
    "loss_first": 2.4,
    "loss_last": 0.02,
}


def print_table(folder: Path, *, summary: str) -> subprocess.CompletedProcess[str]:
    (folder / "before.json").write_text(json.dumps(BEFORE), encoding="utf-8")
    (folder / "after.json").write_text(json.dumps(AFTER), encoding="utf-8")
    (folder / "run").mkdir()
    if summary:
        (folder / "run" / "summary.json").write_text(summary, encoding="utf-8")
    command = [sys.executable, SCRIPT, "--before", "before.json", "--after", "after.json", "--run", "run"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_table_shows_both_evaluations_and_the_summary(tmp_path: Path) -> None:
    done = print_table(tmp_path, summary=json.dumps(SUMMARY))
    assert done.returncode == 0, done.stderr
    for words in (
        "0 of 40",
        "39 of 40",
        "tool calls: valid │ 7 of 41 │ 40 of 41 │",
        "tool calls: right name │ 3 of 41 │ 38 of 41 │",
        "tool calls: right arguments │ 1 of 41 │ 37 of 41 │",
        "2.2500",
        "0.0123",
        "4,884,480 (3.5%)",
        "134,515,008",
        "19.6 MB",
        "32 steps in 152 s",
        "1.00, 1.50 GiB",
    ):
        assert words in " ".join(done.stdout.split())
    assert "dist-lora generate run/adapter\n" in done.stdout
    assert "dist-lora merge run/adapter --out run/merged\n" in done.stdout


def test_a_missing_summary_is_named_and_the_command_that_makes_it(tmp_path: Path) -> None:
    done = print_table(tmp_path, summary="")
    assert done.returncode == 1
    assert done.stderr == (
        "quickstart: can't read run/summary.json: No such file or directory. Run all of it: bash launch/quickstart.sh\n"
    )


def test_a_half_written_summary_is_named(tmp_path: Path) -> None:
    done = print_table(tmp_path, summary='{"trainable": ')
    assert done.returncode == 1
    assert done.stderr.startswith("quickstart: run/summary.json is not JSON (Expecting value")
