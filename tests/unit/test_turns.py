"""A commit's tree decides which part of the full products runs; the parts are all of them, and the table says so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tests import ROOT, turns, where


@dataclass(frozen=True)
class Item:
    """As much of a test's case as the turns look at."""

    nodeid: str
    of: int | None = None
    among: str | None = None

    def get_closest_marker(self, name: str) -> Any:
        """See pytest."""
        kwargs = {"of": self.of} | ({"among": self.among} if self.among else {})
        return SimpleNamespace(kwargs=kwargs) if self.of and name == "turn" else None


CASES = [Item(f"a.py::test_it[{i}]", of=4) for i in range(10)] + [Item(f"a.py::test_other[{i}]") for i in range(3)]


def kept(monkeypatch: pytest.MonkeyPatch, turn: str, cases: list[Item] = CASES) -> list[Item]:
    monkeypatch.setenv(turns.VARIABLE, turn)
    left: list[Any] = turns.left_out(cases)  # type: ignore[arg-type]
    return [case for case in cases if case not in left]


def test_a_turn_has_a_part_and_all_turns_have_all(monkeypatch) -> None:
    found = {turn: kept(monkeypatch, turn) for turn in map(str, range(40))}
    parts = {tuple(case.nodeid for case in cases if case.of) for cases in found.values()}
    assert sorted(map(len, parts)) == [2, 2, 3, 3]
    assert sorted(name for part in parts for name in part) == sorted(case.nodeid for case in CASES if case.of)
    assert all(case in cases for cases in found.values() for case in CASES if not case.of)
    assert kept(monkeypatch, "7") == found["7"]
    assert kept(monkeypatch, turns.ALL) == CASES


def test_tests_among_a_group_are_dealt_out_together(monkeypatch) -> None:
    cases = [Item(f"{name}.py::test_{name}", of=3, among="clusters") for name in "abcdef"]
    cases += [Item(f"{name}.py::test_{name}", of=3, among="others") for name in "ghi"]
    parts = {tuple(case.nodeid for case in kept(monkeypatch, str(turn), cases)) for turn in range(60)}
    assert {tuple(name[-1] for name in part) for part in parts} == {
        (*pair, single) for pair in ("ad", "be", "cf") for single in "ghi"
    }


def test_seeds_and_parts_are_the_trees_and_not_those_of_this_process(monkeypatch) -> None:
    monkeypatch.setenv(turns.VARIABLE, "4b825dc642cb")
    assert (turns.seed_of("kills"), turns.number_of("a.py::test_it", 8)) == (584205, 5)
    monkeypatch.setenv(turns.VARIABLE, "another")
    assert turns.seed_of("kills") != 584205


def test_the_turn_is_that_of_the_tree_of_this_commit(monkeypatch) -> None:
    monkeypatch.delenv(turns.VARIABLE)
    asked = subprocess.run(["git", "rev-parse", "HEAD^{tree}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"no repository: {asked.stderr.strip()}")
    assert len(turns.configure(None)) == 12 and asked.stdout.startswith(turns.configure(None))
    assert turns.configure("deadbeef") == "deadbeef"


@pytest.fixture(scope="module")
def table() -> str:
    """What ``python -m tests.where`` prints; a process of its own, since it collects."""
    done = subprocess.run([sys.executable, "-m", "tests.where"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_contributing_says_where_each_test_runs(table) -> None:
    assert table in (ROOT / "CONTRIBUTING.md").read_text(), "put in what python -m tests.where prints"


@pytest.mark.slow
def test_tests_that_need_a_gpu_lie_together(table) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {row[0].strip("`").split("/")[0] for row in rows if row[where.HEADINGS.index("a GPU")]} == {"gpu"}
