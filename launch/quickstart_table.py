"""Prints what the quickstart's training changed, and what to do next.

    python launch/quickstart_table.py --before BEFORE.json --after AFTER.json --run runs/quickstart

BEFORE and AFTER are what ``dist-lora eval --json`` printed; the rest is read from the run's summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MB = 10**6
GIB = 2**30
OF_CALLS = ("valid", "right_name", "right_arguments")
NEXT_STEPS = """\
To chat with the result:  .venv/bin/dist-lora generate {run}/adapter
To see the curves:        .venv/bin/dist-lora report {run}    (or .venv/bin/tensorboard --logdir {runs})
To merge it:              .venv/bin/dist-lora merge {run}/adapter --out {run}/merged"""


def rows_of(before: dict[str, Any], after: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table's rows: what was measured, its value before, its value after the training."""
    share = summary["trainable"] / (summary["trainable"] + summary["frozen"])
    peaks = ", ".join(f"{peak / GIB:.2f}" for peak in summary["peak_bytes"])
    return [
        ("held-out requests answered exactly", _exact(before), _exact(after)),
        *((f"tool calls: {name.replace('_', ' ')}", _calls(before, name), _calls(after, name)) for name in OF_CALLS),
        ("held-out loss per trained token", f"{before['loss']:.4f}", f"{after['loss']:.4f}"),
        ("trainable weights", "", f"{summary['trainable']:,} ({share:.1%})"),
        ("frozen weights", "", f"{summary['frozen']:,}"),
        ("adapter file", "", f"{summary['adapter_bytes'] / MB:.1f} MB"),
        ("training", "", f"{summary['steps']} steps in {summary['seconds']:.0f} s"),
        ("peak memory per rank", "", f"{peaks} GiB"),
    ]


def _exact(evaluation: dict[str, Any]) -> str:
    match = evaluation["exact_match"]
    return f"{match['correct']} of {match['total']}"


def _calls(evaluation: dict[str, Any], name: str) -> str:
    calls = evaluation["tool_calls"]
    return f"{calls[name]} of {calls['wanted']}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"quickstart: can't read {path}: {error.strerror}. Run all of it: bash launch/quickstart.sh")
    except ValueError as error:
        sys.exit(f"quickstart: {path} is not JSON ({error}). Run all of it: bash launch/quickstart.sh")
    assert isinstance(content, dict), f"{path} holds a {type(content).__name__}, not an object"
    return content


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Prints what the quickstart's training changed.")
    for option, meaning in (
        ("--before", "what eval printed for the base"),
        ("--after", "what eval printed for the adapter"),
        ("--run", "the run's folder"),
    ):
        parser.add_argument(option, type=Path, required=True, help=meaning)
    arguments = parser.parse_args()
    table = Table("SmolLM2-135M-Instruct, requests to tool calls")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    summary = _read(arguments.run / "summary.json")
    for row in rows_of(_read(arguments.before), _read(arguments.after), summary):
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print("\n" + NEXT_STEPS.format(run=arguments.run, runs=arguments.run.parent), soft_wrap=True)


if __name__ == "__main__":
    main()
