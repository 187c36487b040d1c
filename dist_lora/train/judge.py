"""``eval.command``: the user's own judge, run by the first rank on the gathered adapter; its numbers belong to the evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.errors import EXIT_USER, ConfigError, RankError, SaveError
from dist_lora.supervision.leash import Ended, run_leashed, without_launcher
from dist_lora.text import count
from dist_lora.train.checkpoints import RunCheckpoints
from dist_lora.world.world import World

OWN_NAMES = frozenset(("eval_loss", "eval_perplexity", "eval_exact_match"))
"""Names of an evaluation's own numbers, whether or not it has them."""

JUDGE_FOLDER = "judge"
_TAIL_BYTES = 2**16
_SHOWN_LINES = 10
_NAME = re.compile(r"[A-Za-z0-9._/-]+")
_NOT_JSON = 'expected one JSON object of numbers, like {"score": 0.5}, as the last line of its standard output'


class Interrupted(Exception):
    """An evaluation ends early, on all ranks, since one was asked to stop."""


@dataclass(frozen=True)
class Judge:
    """Runs a run's ``eval.command``. All ranks have one."""

    config: Config
    folder: Path  # of the run
    checkpoints: RunCheckpoints
    tokenizer: Path  # the base's folder
    save: Callable[[], None]  # a checkpoint of this step, before a failure ends the run
    world: World

    def numbers(self, step: int, *, is_asked: Callable[[], bool], taken: frozenset[str]) -> dict[str, float]:
        """The judge's numbers under their names in the records, ``eval_NAME``, on all ranks. All ranks call it.

        The first rank waits for the judge, within ``eval.command_timeout``, and the others for the first rank.

        Args:
            is_asked: whether this rank is asked to stop; the first rank's answer interrupts the judge.
            taken: names that the evaluation has without the judge.

        Raises:
            Interrupted: the first rank is asked to stop.
            ConfigError: on the first rank, if the judge hangs, fails, or prints no numbers; ``RankError`` on the others.
                The step is saved before.
            SaveError: the adapter can't be written.
        """
        world = self.world
        root = self.folder / JUDGE_FOLDER
        adapter = self.checkpoints.gather_now(step, root=root, tokenizer=self.tokenizer)

        def ask() -> bytes:
            with world.progress.phase(f"step {step}, waiting for eval.command", kind="long"):
                outcome = self._ask(step, adapter, root, is_asked=is_asked, taken=taken)
            return json.dumps(outcome).encode()

        def cannot(error: OSError) -> SaveError:
            return SaveError(f"{root}: can't be written: {error}")

        outcome = json.loads(world.once("eval.command", ask, os_error=cannot))
        if "values" in outcome:
            return {str(name): float(value) for name, value in outcome["values"].items()}
        if "error" not in outcome:
            raise Interrupted
        self.save()
        raise ConfigError(outcome["error"]) if world.is_first else RankError(outcome["error"], exit_code=EXIT_USER)

    def _ask(
        self, step: int, adapter: Path, root: Path, *, is_asked: Callable[[], bool], taken: frozenset[str]
    ) -> dict[str, Any]:
        """``{"values": ...}``, ``{"error": TEXT}``, or nothing where the judge was interrupted."""
        assert self.config.eval.command is not None
        facts = {"adapter": str(adapter), "run": str(self.folder.resolve()), "step": str(step)}

        def is_to_stop() -> bool:
            self.world.progress.advance()
            self.world.raise_if_another_failed("eval.command")
            return is_asked()

        stdout, stderr = root / "stdout.txt", root / "stderr.txt"
        words = words_of(self.config.eval.command, facts)
        try:
            ended = run_leashed(
                words,
                environment=without_launcher(os.environ)
                | {f"DIST_LORA_{name.upper()}": value for name, value in facts.items()},
                stdout=stdout,
                stderr=stderr,
                timeout_s=self.config.eval.command_timeout,
                is_to_stop=is_to_stop,
            )
        finally:
            shutil.rmtree(adapter, ignore_errors=True)
        if ended == "stopped":
            return {}
        problem = self._failure(ended, stderr)
        if problem is None:
            try:
                return {"values": read_numbers(_tail(stdout), taken=taken)}
            except ValueError as error:
                problem = str(error)
        return {
            "error": f"eval.command: {words[0]} {problem}. Step {step} is saved, and its evaluation is not recorded: the same "
            f"command as before asks again and goes on. What the judge has printed is in {root}; eval.command=null goes on "
            "without it."
        }

    def _failure(self, ended: Ended, stderr: Path) -> str | None:
        """What is wrong with a judge by how it has ended; None if nothing is."""
        if ended == 0:
            return None
        if ended == "timeout":
            return f"has not ended within {self.config.eval.command_timeout:g} s (eval.command_timeout), and was killed"
        lines = _tail(stderr).splitlines()[-_SHOWN_LINES:]
        said = "".join(f"\n  {line[:300]}" for line in lines)
        told = f"; the end of what it said:{said}\n " if lines else ", without a word to its standard error"
        return f"has ended with exit code {ended}{told}"


def check_command(config: Config) -> None:
    """Raise ``ConfigError`` if the program of ``eval.command`` isn't here. Local: the first rank's machine counts."""
    if config.eval.command is None:
        return
    program = shlex.split(config.eval.command)[0]
    if shutil.which(program) is None:
        raise ConfigError(
            f"eval.command: {program!r} is no program that this process finds and may execute (a path is relative to the "
            "current folder; a script needs its interpreter before it, like python judge.py)"
        )


def words_of(command: str, facts: dict[str, str]) -> list[str]:
    """The words of a command as a shell splits them, each with ``{adapter}``, ``{run}`` and ``{step}`` filled in."""
    words = shlex.split(command)
    for name, value in facts.items():
        words = [word.replace(f"{{{name}}}", value) for word in words]
    return words


def read_numbers(output: str, *, taken: frozenset[str]) -> dict[str, float]:
    """The numbers of a judge's last line, each under ``eval_`` and its name.

    Args:
        taken: names, with ``eval_``, that it may not give.

    Raises:
        ValueError: the line is no JSON object of finite numbers with usable names; says what was found.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"has printed nothing; {_NOT_JSON}")
    try:
        found = json.loads(lines[-1])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"has printed {lines[-1][:200]!r} last; {_NOT_JSON}")
    faults = [fault for name, value in found.items() if (fault := _fault(name, value, taken))]
    if faults:
        raise ValueError(
            f"has printed {count(len(faults), 'value')} that can't be recorded: {'; '.join(faults[:5])}; {_NOT_JSON}"
        )
    return {f"eval_{name}": float(value) for name, value in found.items()}


def _fault(name: str, value: object, taken: frozenset[str]) -> str | None:
    if not _NAME.fullmatch(name):
        return f"the name {name[:80]!r} (letters, digits, '.', '_', '-' and '/' only)"
    if f"eval_{name}" in taken:
        return f"the name {name!r}, which the evaluation has itself"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    with contextlib.suppress(OverflowError):
        if is_number and math.isfinite(float(value)):  # type: ignore[arg-type]
            return None
    return f"{name}: {json.dumps(value)[:80]}, which is no finite number"


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors="replace")
