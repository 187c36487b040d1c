"""The equality matrix: every engine, base, world and placement trains the same adapters, or is refused in a sentence.

    python -m tests.ranks.matrix [--pairs]

prints the table of docs/evidence.md. A cell is a tiny Llama-3.1-shaped model trained for five steps with accumulation and
clipping; what it is compared with is the same base on one process with engine ``none``.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dist_lora.config.schema import ParallelSection, Quant
from dist_lora.data.loader import Loader
from dist_lora.errors import ConfigError
from dist_lora.layout.choices import choose_layout
from dist_lora.lora.state import Piece
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World
from tests.ranks.pool import Ranks
from tests.ranks.tiny import accumulate, config_of, documents, trainee_of

LENGTHS = [40, 3, 17, 29, 5, 61, 2, 11, 33, 8, 21, 55]
NUM_STEPS = 5
MAX_GRAD_NORM = 0.05  # bites at every step
TOLERANCE = 1e-5  # of losses and gradient norms
ADAPTER_TOLERANCE = 1e-4  # relative L2: Adam magnifies what is nearly zero

ENGINES = ("none", "fsdp2", "zero3")
BASES = get_args(Quant)
WORLDS = {"1": (1, 1), "2": (2, 2), "2 x 2": (4, 2)}  # ranks, ranks of a node
OFFLOADS = ("none", "base", "optimizer", "all")


@dataclass(frozen=True)
class Cell:
    """One way to place a run."""

    engine: str
    base: str
    world: str
    base_shard: str
    adapters: str
    offload: str
    recompute: bool


@dataclass(frozen=True)
class Outcome:
    """What a cell came to: losses and gradient norms a step, and the adapters; or the sentence that refused it."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    adapters: dict[str, Tensor] | None = None
    refused: str = ""

    def differs_from(self, other: Outcome) -> tuple[float, float, float]:
        """The largest difference of losses, of norms (relative), and of the adapters (relative L2)."""
        losses = max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        norms = max(abs(a - b) / b for a, b in zip(self.norms, other.norms, strict=True))
        assert self.adapters is not None and other.adapters is not None
        assert self.adapters.keys() == other.adapters.keys()
        squares = sum(float((self.adapters[n] - other.adapters[n]).square().sum()) for n in self.adapters)
        whole = sum(float(values.square().sum()) for values in other.adapters.values())
        return losses, norms, math.sqrt(squares / whole)


def all_cells() -> list[Cell]:
    """The full product."""
    shards = itertools.product(
        ENGINES, BASES, WORLDS, ("gpu", "node", "world"), ("replicate", "shard"), OFFLOADS, (False, True)
    )
    return [Cell(*values) for values in shards]


def is_refused(cell: Cell) -> bool:
    """Whether the layout of a cell is refused, as the table shows in words."""
    size, node_size = WORLDS[cell.world]
    section = ParallelSection(
        engine=cell.engine, base_shard=cell.base_shard, adapters=cell.adapters, offload=cell.offload
    )
    try:
        choose_layout(
            section, world_size=size, local_size=node_size, base_bytes=1, trained_weights=1, device_bytes=2**30
        )
    except ConfigError:
        return True
    return False


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Some of the cells, such that every pair of values of two axes that any cell has is in one of them."""
    open_pairs = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while open_pairs:
        best = max(cells, key=lambda cell: len(open_pairs & _pairs(cell)))
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    return set(itertools.combinations(vars(cell).items(), 2))


def train_cell(world: World, folder: str, cell: Cell) -> tuple[list[float], list[float], dict[Piece, Tensor]] | str:
    """What one rank sees of a cell: losses, norms, and its share of the adapters; or why it is refused."""
    config = config_of(
        folder,
        model={"quant": cell.base},
        parallel={
            "engine": cell.engine,
            "base_shard": cell.base_shard,
            "adapters": cell.adapters,
            "offload": cell.offload,
        },
        train={"activation_checkpointing": cell.recompute},
        optim={"max_grad_norm": MAX_GRAD_NORM, "lr": 1e-2, "warmup_steps": 2},
    )
    try:
        trainee = trainee_of(config, world)
    except ConfigError as error:
        return str(error)
    adapters = trainee.adapters
    loader = Loader(
        documents(seed=0, lengths=LENGTHS),
        seed=0,
        world_rank=world.world_rank,
        world_size=world.world_size,
        sequence_length=64,
        packing=False,
        global_batch=6,
        micro_batch=1,
    )
    adapters.start_training(config.optim)
    losses, norms = [], []
    for step in range(1, NUM_STEPS + 1):
        losses.append(accumulate(trainee, loader.batch(step - 1)))
        norms.append(float(adapters.step(lr_at(step, section=config.optim, num_steps=NUM_STEPS))))
    trainee.check_base()
    assert adapters.copies_agree()
    return (
        losses,
        norms,
        {piece: values.clone() for piece, values in adapters.share().items() if piece.kind == "adapter"},
    )


def outcome_of(answers: list[tuple[list[float], list[float], dict[Piece, Tensor]] | str]) -> Outcome:
    """The ranks' answers put together; they must not contradict each other."""
    if any(isinstance(answer, str) for answer in answers):
        assert len(set(map(str, answers))) == 1, "only some ranks refuse"
        return Outcome(refused=str(answers[0]))
    seen = [answer for answer in answers if not isinstance(answer, str)]
    assert all(answer[:2] == seen[0][:2] for answer in seen), "ranks report different numbers"
    pieces: dict[str, list[tuple[Piece, Tensor]]] = {}
    for _, _, share in seen:
        for piece, values in share.items():
            pieces.setdefault(piece.name, []).append((piece, values))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0].start)
        ends = [0, *(piece.stop for piece, _ in parts)]
        assert [piece.start for piece, _ in parts] == ends[:-1], f"{name}: shares leave gaps or overlap"
        whole[name] = torch.cat([values for _, values in parts])
    return Outcome(tuple(seen[0][0]), tuple(seen[0][1]), whole)


class Matrix:
    """Runs cells on pools of processes that are used again; ``close`` it."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._pools: dict[int, Ranks] = {}
        self._references: dict[str, Outcome] = {}

    def run(self, cell: Cell) -> Outcome:
        """What a cell comes to."""
        size, node_size = WORLDS[cell.world]
        if size not in self._pools:
            self._pools[size] = Ranks(size)
        return outcome_of(self._pools[size].run(train_cell, self._folder, cell, node_size=node_size))

    def reference(self, base: str) -> Outcome:
        """The same base on one process."""
        if base not in self._references:
            self._references[base] = self.run(Cell("none", base, "1", "node", "replicate", "none", False))
        return self._references[base]

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()


def table(matrix: Matrix, cells: list[Cell]) -> Iterator[str]:
    """The table of docs/evidence.md, line by line: how many placements of an engine, base and world are equal, and how nearly."""
    yield "| engine | base | " + " | ".join(f"{name} rank{'s' * (name != '1')}" for name in WORLDS) + " |"
    yield "|" + "---|" * (2 + len(WORLDS))
    reasons: list[str] = []
    for engine, base in dict.fromkeys((cell.engine, cell.base) for cell in cells):
        row = []
        for world in WORLDS:
            outcomes = [(c, matrix.run(c)) for c in cells if (c.engine, c.base, c.world) == (engine, base, world)]
            row.append(_summary(matrix.reference(base), [o for _, o in outcomes], reasons))
        yield f"| {engine} | {base} | " + " | ".join(row) + " |"
    for number, reason in enumerate(reasons, start=1):
        yield f"\n{number}. {reason}"


def _summary(reference: Outcome, outcomes: list[Outcome], reasons: list[str]) -> str:
    ran = [outcome for outcome in outcomes if not outcome.refused]
    refused = [outcome.refused for outcome in outcomes if outcome.refused]
    told = []
    if ran:
        differences = [outcome.differs_from(reference) for outcome in ran]
        worst = [max(column) for column in zip(*differences, strict=True)]
        told.append(f"{len(ran)} equal ({worst[0]:.0e}, {worst[1]:.0e}, {worst[2]:.0e})")
    if refused:
        sentences = [line for text in refused for line in text.splitlines()]  # a cell may have several faults
        reasons.extend(line for line in dict.fromkeys(sentences) if line not in reasons)
        numbers = sorted({reasons.index(line) + 1 for line in sentences})
        told.append(f"{len(refused)} refused [{', '.join(map(str, numbers))}]")
    return "; ".join(told) or "-"


def main() -> None:
    """The command: see the top of this file."""
    from tests.conftest import save_tiny_llama

    cells = all_cells()
    if "--pairs" in sys.argv[1:]:
        cells = pairwise([cell for cell in cells if not is_refused(cell)])
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_llama(Path(folder), variant="llama31")
        matrix = Matrix(Path(folder))
        try:
            for line in table(matrix, cells):
                print(line, flush=True)
        finally:
            matrix.close()


if __name__ == "__main__":
    main()
