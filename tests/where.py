"""Where each test runs: ``python -m tests.where`` prints the table of CONTRIBUTING.md, from the tests' marks."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict

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
    """A row for each file of tests: how many cases run where, and the names of those that the suite leaves out."""
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(
            ["--collect-only", "--quiet", "--turn", "all", "-p", "no:cacheprovider"], plugins=[collected]
        )
    assert code == 0, said.getvalue()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for item in collected.items:
        file, _, test = item.nodeid.partition("::")
        file, place = file.removeprefix("tests/"), place_of(item)
        counts[file][place] += 1
        if place in ("CI", "turns"):
            turn = item.get_closest_marker("turn")
            of = f" (1 of {turn.kwargs['of']})" if turn else ""
            names[file][test.partition("[")[0]] = of
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    total = Counter[str]()
    for file, of_file in sorted(counts.items()):
        told = ", ".join(f"`{name}`{of}" for name, of in names[file].items())
        lines.append(f"| `{file}` | {' | '.join(str(of_file[place] or '') for place in PLACES)} | {told} |")
        total += of_file
    lines.append(f"| all | {' | '.join(str(total[place]) for place in PLACES)} | |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    print(table())


if __name__ == "__main__":
    main()
