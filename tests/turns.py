"""Which part of the exhaustive products a commit's CI runs: the commit's tree decides, so a fresh clone of it runs the same.

A test with the mark ``turn(of=8)`` has an eighth of its cases run by ``tests/run.sh --all``, another eighth for another tree;
``--turn all`` runs all of them, ``--turn 4b825dc`` those of another tree. Tests that are marked ``turn(of=5, among="clusters")``
are dealt out together, so that each turn has a fifth of them all. What is drawn at random is drawn by ``seed_of``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest

from tests import ROOT

ALL = "all"
VARIABLE = "DIST_LORA_TEST_TURN"  # for the processes that pytest starts


def configure(wanted: str | None) -> str:
    """Remember what ``--turn`` says, or this commit's tree; returns it."""
    os.environ[VARIABLE] = wanted or os.environ.get(VARIABLE) or tree_of_this_commit()
    return os.environ[VARIABLE]


@functools.cache
def tree_of_this_commit() -> str:
    """What git calls the content of this commit, shortened; "none" where there is no git or no repository."""
    asked = ["git", "rev-parse", "--short=12", "HEAD^{tree}"]
    try:
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.strip()


def number_of(name: str, below: int) -> int:
    """What this turn has for a name: from 0 to ``below`` - 1."""
    turn = os.environ.get(VARIABLE) or tree_of_this_commit()
    return int.from_bytes(hashlib.sha256(f"{turn} {name}".encode()).digest()[:8]) % below


def seed_of(name: str) -> int:
    """The seed by which a test of this name draws."""
    return number_of(name, 10**6)


def in_suite(*wanted: object, of: Iterable[object]) -> list[Any]:
    """The cases of ``parametrize``, each a value or a tuple of values: the suite runs those that are wanted, CI runs all."""
    cases = list(of)
    assert all(case in cases for case in wanted), f"{wanted} are not all of {cases}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in wanted else pytest.mark.slow)
        for case in cases
    ]


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The cases whose turn it isn't. Those of one test, or group, are dealt out one by one, so a part has some of each kind."""
    if os.environ.get(VARIABLE) == ALL:
        return []
    found, counts = [], dict[str, int]()
    for item in items:
        mark = item.get_closest_marker("turn")
        if mark is None:
            continue
        dealt = mark.kwargs.get("among") or item.nodeid.partition("[")[0]
        count = counts[dealt] = counts.get(dealt, -1) + 1
        if count % mark.kwargs["of"] != number_of(dealt, mark.kwargs["of"]):
            found.append(item)
    return found
