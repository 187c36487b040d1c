"""Code of a user's own, as configs of the tests name it: formats, metrics and callbacks, right and wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUMBER = 3


def chat(record: dict) -> dict:
    """A question and an answer as a chat."""
    return {"messages": [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]}


def text_or_nothing(record: dict) -> Any:
    """A text; nothing for a record without one, and a record of no format for an odd one."""
    return {"odd": 1} if record.get("q") == "odd" else {"text": record["q"]} if "q" in record else None


def length(expected: str, generated: str) -> int:
    """Of the generated answer, in characters."""
    return len(generated)


def prompted(expected: str, generated: str, prompt: str) -> float:
    """Of the prompt, as a part of one."""
    return 1 / (1 + len(prompt) + len(expected))


def no_number(expected: str, generated: str) -> str:
    """Not even that."""
    return "good"


def not_finite(expected: str, generated: str) -> float:
    """Not a number."""
    return float("nan")


def fails(*arguments: Any) -> float:
    """An error."""
    raise KeyError("missing")


def one_argument(expected: str) -> float:
    """Too few."""
    return 1.0


class Notes:
    """Writes what it is told, a line for each hook, to notes.jsonl in the run's folder."""

    def on_start(self, run: Any) -> None:
        """See ``HOOKS``."""
        self._file = Path(run.folder) / "notes.jsonl"
        self._note("on_start", run.first_step, run.num_steps, run.config.run)

    def on_step(self, line: dict) -> None:
        """See ``HOOKS``."""
        self._note("on_step", line)

    def on_evaluation(self, line: dict) -> None:
        """See ``HOOKS``."""
        self._note("on_evaluation", line)

    def on_save(self, step: int, folder: Path) -> None:
        """See ``HOOKS``."""
        self._note("on_save", step, str(folder), (folder / "manifest.json").exists())

    def on_end(self, summary: dict) -> None:
        """See ``HOOKS``."""
        self._note("on_end", summary)

    def _note(self, *told: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(told) + "\n")


class RaisesAtTwo:
    """Fails at the second step."""

    def on_step(self, line: dict) -> None:
        """See ``HOOKS``."""
        if line["step"] == 2:
            raise ZeroDivisionError("two is too much")


class Misspelt:
    """Has a method that nobody would call, and one that can't be."""

    def on_stpe(self, line: dict) -> None:
        """No hook."""

    def on_save(self, step: int) -> None:
        """Takes too little."""


class Hookless:
    """Has nothing."""


class Needy:
    """Can't be made."""

    def __init__(self, key: str) -> None:
        """Wants a key."""

    def on_step(self, line: dict) -> None:
        """See ``HOOKS``."""


class Unmade:
    """Fails when it is made."""

    def __init__(self) -> None:
        """Raises."""
        raise KeyError("missing")

    def on_step(self, line: dict) -> None:
        """See ``HOOKS``."""
