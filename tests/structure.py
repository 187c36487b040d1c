"""The structure of the project in numbers, read from its source: ``python -m tests.structure [ROOT]``.

ROOT is another checkout, so that a version can be compared with one before it; the order of folders is then that in which
the fewest imports run backwards, since an old version may have no such order of its own.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT
from tests.unit.test_imports import ROAD, imports_of


def sources_of(root: Path) -> dict[str, str]:
    """Source by full name of all modules of the package in a checkout."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for path in sorted((root / "dist_lora").rglob("*.py"))
    }


def folder_of(module: str) -> str:
    """``lora`` of ``dist_lora.lora.layer``; the module itself where it lies in no folder."""
    return module.removeprefix("dist_lora.").partition(".")[0]


def arrows_of(sources: dict[str, str]) -> Counter[tuple[str, str]]:
    """How many imports, early or late, lead from one folder to another; those for types alone are left out."""
    found: Counter[tuple[str, str]] = Counter()
    for module, source in sources.items():
        for line in imports_of(source, module=module):
            there = line.target if line.target in sources else line.target.rpartition(".")[0]
            if there not in sources or "dist_lora" in (module, there) or line.is_for_types:
                continue
            if folder_of(module) != folder_of(there):
                found[folder_of(module), folder_of(there)] += 1
    return found


def circles_of(arrows: Counter[tuple[str, str]]) -> list[str]:
    """A circle among folders, if there is one."""
    before: dict[str, set[str]] = {}
    for here, there in arrows:
        before.setdefault(here, set()).add(there)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def backwards(arrows: Counter[tuple[str, str]], road: tuple[str, ...]) -> list[str]:
    """The arrows that lead from a folder to one after it."""
    place = {folder: i for i, folder in enumerate(road)}
    return sorted(f"{a} -> {b}" for a, b in arrows if a in place and b in place and place[b] > place[a])


def best_road(arrows: Counter[tuple[str, str]]) -> tuple[str, ...]:
    """An order of the folders with few arrows backwards: each change of two neighbours that helps is made."""
    road = sorted(
        {folder for pair in arrows for folder in pair}, key=lambda f: sum(n for (a, _), n in arrows.items() if a == f)
    )
    is_better = True
    while is_better:
        is_better = False
        for i, j in itertools.combinations(range(len(road)), 2):
            moved = [*road[:i], road[j], *road[i:j], *road[j + 1 :]]
            if len(backwards(arrows, tuple(moved))) < len(backwards(arrows, tuple(road))):
                road, is_better = moved, True
    return tuple(road)


def lengths(sources: dict[str, str], kinds: tuple[type[ast.AST], ...]) -> Iterator[tuple[int, str]]:
    """Lines of each function or class, and its name."""
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds):
                yield node.end_lineno - node.lineno + 1, f"{module}.{node.name}"  # type: ignore[attr-defined]


def numbers_of(root: Path) -> dict[str, str]:
    """Each number by what it counts."""
    sources = sources_of(root)
    arrows = arrows_of(sources)
    road = ROAD if root == ROOT else best_road(arrows)
    functions = list(lengths(sources, (ast.FunctionDef, ast.AsyncFunctionDef)))
    longest, longest_class = max(functions), max(lengths(sources, (ast.ClassDef,)))
    circle = circles_of(arrows)
    lines = {
        name: sum(len(path.read_text("utf-8").splitlines()) for path in (root / name).rglob("*.py"))
        for name in ("dist_lora", "tests", "bench")
    }
    folders = sorted({path.parent for path in (root / "dist_lora").glob("*/*.py")})
    words = {
        path.name: len(path.read_text("utf-8").split()) for path in (root / "README.md", *(root / "docs").glob("*.md"))
    }
    return {
        "folders of the package": f"{len(folders)}",
        "modules": f"{len(sources):,}, the longest of {max(len(s.splitlines()) for s in sources.values()):,} lines",
        "arrows between folders": f"{len(arrows)}",
        "arrows that lead backwards": ", ".join(backwards(arrows, road)) or "0",
        "circles among folders": " -> ".join(circle) or "0",
        "longest function": f"{longest[0]} lines ({longest[1]})",
        "functions over 40 lines": f"{sum(n > 40 for n, _ in functions)} of {len(functions):,}",
        "longest class": f"{longest_class[0]} lines ({longest_class[1]})",
        "lines of the package, tests, bench": " / ".join(f"{lines[name]:,}" for name in lines),
        "words of README.md, and of docs/": f"{words.pop('README.md'):,} / {sum(words.values()):,}",
    }


def main() -> None:
    """Print the table."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    print("| | |\n|---|---|")
    for name, number in numbers_of(root).items():
        print(f"| {name} | {number} |")


if __name__ == "__main__":
    main()
