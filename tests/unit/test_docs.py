"""README.md and docs/: what they show is there, and says what it says today."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from bench import evidence
from dist_lora.cli import app
from tests import ROOT

DOCUMENTS = [*evidence.documents(), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
# These cost a second; the others are measurements.
QUICK = ("python -m bench.models", "python -m dist_lora plan ", "python -m dist_lora.config.")


def commands_of(text: str) -> list[str]:
    """Every command in backticks, or on a line of its own."""
    text = re.sub(r"(?m)^<!--.*?-->$", "", text)
    text = re.sub(r"(?m)^(    dist-lora [^\n]*,)\n {6}([^\n]*,)\n {6}", r"\1 \2 ", text)  # one over three lines
    lines = re.findall(r"(?m)^    ((?:dist-lora|python -m|bash) [^\n#]*)", text)
    return lines + re.findall(r"`([A-Z_=\w/:.-]* ?(?:dist-lora|python -m|bash) [^`\n]+)`", text)


SHOWN = [
    pytest.param(command, id=f"{path.name}: {command.strip()}")
    for path in DOCUMENTS
    for command in dict.fromkeys(commands_of(path.read_text(encoding="utf-8")))
]


def check_ours(words: list[str]) -> None:
    """A command of ours exists, with all the options that are shown."""
    found: typer.core.TyperGroup | object = typer.main.get_command(app)
    while hasattr(found, "commands") and words and words[0] in found.commands:
        found, words = found.commands[words[0]], words[1:]
    assert not hasattr(found, "commands") or getattr(found, "invoke_without_command", False), words
    known = {option for parameter in found.params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}


@pytest.mark.parametrize("command", SHOWN)
def test_a_command_that_is_shown_exists_with_its_options(command: str) -> None:
    # [--sweep] is an option that may be left out; "A or B" shows two.
    words = shlex.split(re.sub(r"[\[\]]", " ", command.partition(" > ")[0].partition("; ")[0]), comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "dist-lora":
        check_ours(words[1:])
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:2] == ["python", "-m"]
        assert words[2] in ("dist_lora", "pip", "pytest") or find_spec(words[2]) is not None


def test_commands_are_found_in_text() -> None:
    text = "Do `dist-lora plan X --json`, or\n\n    bash tests/run.sh   # all\n\nor `NNODES=2 bash launch/torchrun.sh CONFIG`."
    assert commands_of(text) == [
        "bash tests/run.sh   ",
        "dist-lora plan X --json",
        "NNODES=2 bash launch/torchrun.sh CONFIG",
    ]
    with pytest.raises(AssertionError):
        check_ours(["plan", "X", "--jsn"])
    with pytest.raises(AssertionError):
        check_ours(["plann", "X"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, heading = unquote(target).partition("#")
        there = (path.parent / name) if name else path
        assert there.exists(), target
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", there.read_text(encoding="utf-8"))
            assert heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], target


@pytest.mark.parametrize(
    ("path", "command"),
    [
        pytest.param(path, command, id=f"{path.name}: {command}")
        for path, command in evidence.commands()
        if command.startswith(QUICK)
    ],
)
def test_what_a_quick_command_prints_is_what_the_document_shows(path: Path, command: str) -> None:
    shown = {block["command"]: block["output"] for block in evidence.BLOCK.finditer(path.read_text(encoding="utf-8"))}
    assert shown[command] == evidence.output_of(command) + "\n", f"run: python -m bench.evidence {command.split()[2]!r}"


def test_every_block_of_evidence_has_content() -> None:
    found = list(evidence.commands())
    assert len(found) > 15
    for path, _ in found:
        assert all(block["output"].strip() for block in evidence.BLOCK.finditer(path.read_text(encoding="utf-8"))), path


def test_the_readme_is_one_page_and_says_first_on_what_it_was_run() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:30])
    assert "Hardware it was run on" in first_screen and "## Install" in first_screen


def test_evidence_lists_its_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.evidence"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "docs/evidence.md: python -m tests.ranks.matrix" in done.stdout.splitlines()
