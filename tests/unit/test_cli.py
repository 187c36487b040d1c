"""The command itself: its version, its help, and how its lines look."""

from __future__ import annotations

import logging
import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dist_lora.cli import _Lines, app

COMMANDS = [(), *((name,) for name in sorted(get_command(app).commands)), ("configs", "show")]  # type: ignore[attr-defined]


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and re.fullmatch(r"dist-lora (\d[\w.+]*|unknown)\n", done.output)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_short_option_for_its_help(command: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.output == long.output and "Usage: " in short.output


def test_a_warning_is_called_one_and_nothing_else_is() -> None:
    lines = [
        _Lines("%(message)s").format(logging.LogRecord("dist_lora", level, "", 0, text, (), None))
        for level, text in (
            (logging.WARNING, "5 samples were cut"),
            (logging.WARNING, "warning: x"),
            (logging.INFO, "y"),
        )
    ]
    assert lines == ["warning: 5 samples were cut", "warning: x", "y"]
