"""Where each test runs: ``python -m tests.where`` prints the table of CONTRIBUTING.md, from the tests' marks."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict

import pytest

PLACES = ("suite", "CI", "turns", "clusters", "GPU")
HEADINGS = (
    "tests",
    "suite",
    "CI",
    "CI, by turns",
    "CI, clusters",
    "a GPU",
    "some or all of whose cases are not in the suite",
)


class Collected:
    """A plugin of pytest that keeps what was collected."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """See pytest."""
        self.items = session.items


def place_of(item: pytest.Item) -> str:
    """Which of ``PLACES`` runs a test."""
    for mark, place in (
        ("gpu", "GPU"),
        ("slurm", "clusters"),
        ("hosts", "clusters"),
        ("turn", "turns"),
        ("slow", "CI"),
    ):
        if item.get_closest_marker(mark):
            return place
    return "suite"


def table() -> str:
    """A row for each file of tests: where its cases run, and the names of those that the suite leaves out.

    It has no numbers of cases: another value of a parameter is no other place.
    """
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(
            ["--collect-only", "--quiet", "--turn", "all", "-p", "no:cacheprovider"], plugins=[collected]
        )
    assert code == 0, said.getvalue()
    places: dict[str, set[str]] = defaultdict(set)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for item in collected.items:
        file, _, test = item.nodeid.partition("::")
        file, place = file.removeprefix("tests/"), place_of(item)
        places[file].add(place)
        turn = item.get_closest_marker("turn")
        if place in ("CI", "turns") or turn:
            of = f" ({_part(**turn.kwargs)})" if turn else ""
            names[file][test.partition("[")[0]] = of
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for file, of_file in sorted(places.items()):
        told = ", ".join(f"`{name}`{of}" for name, of in names[file].items())
        lines.append(f"| `{file}` | {' | '.join('x' if place in of_file else '' for place in PLACES)} | {told} |")
    return "\n".join(lines)


def _part(of: int, among: str = "") -> str:
    return f"1 of {of} {among}".rstrip()


def main() -> None:
    """Print the table."""
    print(table())


if __name__ == "__main__":
    main()
