"""Runs that move: saved with one engine, number of ranks and placement, and resumed with another.

    python -m tests.ranks.elastic [--pairs]

prints the table of docs/evidence.md. A tiny Llama-3.1-shaped model is trained for ten steps by ``dist-lora train``'s own work
under each placement; from the checkpoint of step 4 each other placement resumes and trains to the end. Losses, gradient norms and
the adapter are compared with those of the run that saved, and that nothing interrupted.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dist_lora.config.schema import ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.layout.choices import check_section
from tests.ranks.matrix import BASES, ENGINES, Outcome
from tests.ranks.pool import Ranks
from tests.ranks.runs import chats_settings, exact, metrics, train_command

NUM_STEPS, SAVED_AT = 10, 4
WORLDS = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "2 x 2": (4, 2)}  # ranks, ranks of a node
CHECKPOINT = f"step-{SAVED_AT:08d}"


@dataclass(frozen=True)
class Placement:
    """Where a run is."""

    engine: str
    world: str
    base_shard: str
    adapters: str

    @property
    def section(self) -> dict[str, str]:
        """Its ``parallel`` section."""
        return {"engine": self.engine, "base_shard": self.base_shard, "adapters": self.adapters}

    @property
    def size(self) -> int:
        """Its number of ranks."""
        return WORLDS[self.world][0]

    def __str__(self) -> str:
        return f"{self.engine} {self.world} {self.base_shard} {self.adapters}"


@dataclass(frozen=True)
class Move:
    """A run's base, where it is saved, and where it goes on; fields of both placements lie side by side."""

    base: str
    engine: str
    world: str
    base_shard: str
    adapters: str
    to_engine: str
    to_world: str
    to_base_shard: str
    to_adapters: str

    @property
    def saved(self) -> Placement:
        """Where it is saved."""
        return Placement(self.engine, self.world, self.base_shard, self.adapters)

    @property
    def gone_on(self) -> Placement:
        """Where it goes on."""
        return Placement(self.to_engine, self.to_world, self.to_base_shard, self.to_adapters)


def placements() -> list[Placement]:
    """Every placement that is not refused; what one node makes the same comes once."""
    found = []
    for values in itertools.product(ENGINES, WORLDS, ("gpu", "node", "world"), ("replicate", "shard")):
        placement = Placement(*values)
        size, node_size = WORLDS[placement.world]
        try:
            check_section(ParallelSection.model_validate(placement.section), world_size=size, local_size=node_size)
        except ConfigError:
            continue
        if size > node_size or placement.base_shard == "world" or (placement.base_shard == "gpu" and size > 1):
            found.append(placement)
    return found


def all_moves() -> list[Move]:
    """The full product."""
    return [
        Move(base, *vars(saved).values(), *vars(gone_on).values())
        for base, saved, gone_on in itertools.product(BASES, placements(), placements())
    ]


@dataclass(frozen=True)
class Moved:
    """How a run that went on elsewhere differs from the one that stayed."""

    losses: float
    norms: float  # relative
    adapters: float  # relative L2
    rates_are_equal: bool
    is_bit_for_bit: bool


class Elastic:
    """Runs that stay and runs that move; those that stay are made once. ``ranks(n)`` is a pool of n processes."""

    def __init__(self, folder: Path, model: Path, ranks: Callable[[int], Ranks]) -> None:
        self._folder, self._ranks = folder, ranks
        self._settings = chats_settings(model, folder, num_steps=NUM_STEPS)
        self._settings["optim"] |= {"max_grad_norm": 0.5}
        self._stayed: dict[tuple[str, Placement], Path] = {}

    def move(self, move: Move) -> Moved:
        """Go on elsewhere, and compare."""
        stayed = self.stayed(move.base, move.saved)
        runs_dir = Path(tempfile.mkdtemp(dir=self._folder))
        moved = runs_dir / "it"
        shutil.copytree(stayed / "checkpoints" / CHECKPOINT, moved / "checkpoints" / CHECKPOINT)
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(stayed / name, moved / name)
        self._train(move.base, move.gone_on, runs_dir)
        found, wanted = metrics(moved), metrics(stayed)
        assert exact(found[:SAVED_AT]) == exact(wanted[:SAVED_AT])
        names = ("step", "epoch", "target_tokens", "tokens")
        assert [[line[name] for name in names] for line in found] == [[line[name] for name in names] for line in wanted]
        losses, norms, adapters = _outcome(moved, found).differs_from(_outcome(stayed, wanted))
        return Moved(
            losses,
            norms,
            adapters,
            [line["lr"] for line in found] == [line["lr"] for line in wanted],
            exact(found) == exact(wanted) and _adapter(moved).read_bytes() == _adapter(stayed).read_bytes(),
        )

    def stayed(self, base: str, placement: Placement) -> Path:
        """The folder of a run that nothing interrupted."""
        if (base, placement) not in self._stayed:
            runs_dir = Path(tempfile.mkdtemp(dir=self._folder))
            self._train(base, placement, runs_dir)
            self._stayed[base, placement] = runs_dir / "it"
        return self._stayed[base, placement]

    def _train(self, base: str, placement: Placement, runs_dir: Path) -> None:
        settings: dict[str, Any] = self._settings | {
            "runs_dir": str(runs_dir),
            "checkpoint": {"every": SAVED_AT, "keep": 9},
            "parallel": placement.section,
        }
        settings["model"] = settings["model"] | {"quant": base}
        size, node_size = WORLDS[placement.world]
        said = self._ranks(size).run(train_command, settings, node_size=node_size)
        assert said == [""] * size


def _adapter(run: Path) -> Path:
    return run / "adapter" / "adapter_model.safetensors"


def _outcome(run: Path, lines: list[dict[str, Any]]) -> Outcome:
    return Outcome(
        tuple(line["loss"] for line in lines), tuple(line["grad_norm"] for line in lines), load_file(_adapter(run))
    )


def table(elastic: Elastic, moves: list[Move]) -> Iterator[str]:
    """The table of docs/evidence.md, line by line."""
    columns = ("fewer ranks", "as many", "more ranks")
    rows: dict[tuple[str, str], dict[str, list[Moved]]] = {}
    num_unmoved, num_exact = 0, 0
    for move in moves:
        change = move.gone_on.size - move.saved.size
        column = columns[1 + (change > 0) - (change < 0)]
        moved = elastic.move(move)
        assert moved.rates_are_equal, move
        rows.setdefault((move.engine, move.to_engine), {}).setdefault(column, []).append(moved)
        if move.saved == move.gone_on:
            num_unmoved, num_exact = num_unmoved + 1, num_exact + moved.is_bit_for_bit
    yield "| saved with | resumed with | " + " | ".join(columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for (saved, gone_on), row in sorted(rows.items()):
        yield f"| {saved} | {gone_on} | " + " | ".join(_summary(row.get(column, [])) for column in columns) + " |"
    yield f"\nOf the {num_unmoved} that resumed where they were saved, {num_exact} are equal bit for bit."


def _summary(moved: list[Moved]) -> str:
    if not moved:
        return "-"
    worst = [max(values) for values in zip(*((m.losses, m.norms, m.adapters) for m in moved), strict=True)]
    return f"{len(moved)} ({worst[0]:.0e}, {worst[1]:.0e}, {worst[2]:.0e})"


def main() -> None:
    """The command: see the top of this file."""
    from tests.conftest import save_tiny_llama
    from tests.ranks.matrix import pairwise

    moves = all_moves()
    if "--pairs" in sys.argv[1:]:
        moves = pairwise(moves)
    pools: dict[int, Ranks] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        save_tiny_llama(model, "llama31")
        elastic = Elastic(Path(folder), model, lambda size: pools.get(size) or pools.setdefault(size, Ranks(size)))
        try:
            for line in table(elastic, moves):
                print(line, flush=True)
        finally:
            for pool in pools.values():
                pool.close()


if __name__ == "__main__":
    main()
