"""Write what commands print into the documents that show it.

    python -m bench.evidence                 # list the documents' commands
    python -m bench.evidence bench.step      # run those with this in them, and write what they print into README.md and docs/
    python -m bench.evidence --all           # all of them: hours

In a document, between ``<!-- COMMAND -->`` and ``<!-- end -->``, stands the output of COMMAND; nobody writes there by hand.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?m)^<!-- (?P<command>(?:python -m|dist-lora) [^\n]*?) -->\n(?P<output>.*?)^<!-- end -->$", re.DOTALL
)


def documents() -> list[Path]:
    """README and docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[Path, str]]:
    """Each command with the document that shows what it prints."""
    for path in documents():
        yield from ((path, block["command"]) for block in BLOCK.finditer(path.read_text(encoding="utf-8")))


def output_of(command: str) -> str:
    """What a command prints, as Markdown: tables as they are, other text as a block.

    Raises:
        SystemExit: it fails, except for a plan that doesn't fit.
    """
    words = shlex.split(command)
    words = [sys.executable, *words[1:]] if words[0] == "python" else [sys.executable, "-m", "dist_lora", *words[1:]]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"{command}: exit code {done.returncode}")
    is_table = any(line.startswith("|") for line in done.stdout.splitlines())
    return done.stdout.strip() if is_table else f"```\n{done.stdout.rstrip()}\n```"


def write(path: Path, command: str, output: str) -> None:
    """Put a command's output into its document."""

    def filled(block: re.Match[str]) -> str:
        return f"<!-- {command} -->\n{output}\n<!-- end -->" if block["command"] == command else block[0]

    path.write_text(BLOCK.sub(filled, path.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="*", help="run the commands with one of these in them")
    parser.add_argument("--all", action="store_true", help="run all of them")
    arguments = parser.parse_args()
    for path, command in commands():
        if not arguments.word and not arguments.all:
            print(f"{path.relative_to(ROOT)}: {command}")
        elif arguments.all or any(word in command for word in arguments.word):
            print(f"{command} ...", file=sys.stderr)
            write(path, command, output_of(command))


if __name__ == "__main__":
    main()
