"""One run on every kind of placement: from its start, or from where another placement has stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.pool import Ranks
from tests.ranks.runs import metrics, train_command

# Ranks, and the section ``parallel``.
PLACES: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (2, {"engine": "fsdp2", "adapters": "replicate"}),
    (2, {"engine": "fsdp2", "adapters": "shard", "offload": "all"}),
    (2, {"engine": "zero3"}),
)
OTHERS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (3, {"engine": "fsdp2", "adapters": "shard"}),
    (2, {"engine": "zero3"}),
)


def losses(folder: Path) -> list[float]:
    """Of each step of the run ``it`` in ``folder``."""
    return [line["loss"] for line in metrics(folder / "it")]


def assert_alike_everywhere(
    ranks: Any, settings: Mapping[str, Any], folder: Path, *, places: Sequence[tuple[int, dict[str, Any]]] = PLACES
) -> None:
    """The losses of a run are those of its first place on all others."""
    found = []
    for number, (size, parallel) in enumerate(places):
        place = {"runs_dir": str(folder / str(number)), "parallel": parallel}
        pool: Ranks = ranks(size)
        assert pool.run(train_command, {**settings, **place}) == [""] * size
        found.append(losses(folder / str(number)))
    for (_, parallel), each in zip(places, found, strict=True):
        assert each == pytest.approx(found[0], rel=1e-5), parallel


def assert_goes_on_elsewhere(ranks: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """A run that is stopped on two ranks after some steps is the run that isn't, on one rank, on three and by ZeRO-3."""
    assert ranks(2).run(train_command, {**settings, "runs_dir": str(folder / "whole")}) == ["", ""]
    wanted = losses(folder / "whole")
    ranks(2).run(train_command, {**settings, "runs_dir": str(folder / "stopped")}, 4)
    for number, (size, parallel) in enumerate(OTHERS):
        shutil.copytree(folder / "stopped", folder / f"other-{number}")
        other = {"runs_dir": str(folder / f"other-{number}"), "parallel": parallel}
        assert ranks(size).run(train_command, {**settings, **other}) == [""] * size
        assert losses(folder / f"other-{number}") == pytest.approx(wanted, rel=1e-5), parallel
