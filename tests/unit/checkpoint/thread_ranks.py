"""Ranks as threads over a store in memory, and small trained states whose every value is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lora.checkpoint.manifest import KINDS, Piece, TensorSpec
from dist_lora.checkpoint.write import save_checkpoint
from dist_lora.errors import DistLoraError, RankError
from dist_lora.world.world import World

DEADLINE_S = 30
ADAPTER = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": ["q_proj"], "layers": [0, 1], "num_layers": 2}
BASE = {"name": "tiny", "revision": None, "content_hash": "0" * 32, "config_hash": "1" * 32}

# Rank 3, widths 7 and 5: nothing divides by two.
SPECS = tuple(
    TensorSpec(f"model.layers.{layer}.self_attn.q_proj.lora_{half}", shape)
    for layer in (0, 1)
    for half, shape in (("A", (3, 7)), ("B", (5, 3)))
)


class Killed(BaseException):
    """A rank dies here: nothing of ours may catch it."""


class Store:
    """What all ranks of a world see."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[str, bytes] = {}
        self.errors: dict[int, dict[int, BaseException | None]] = {}
        self.dead: set[int] = set()


class MemoryWorld(World):
    """A world for one rank, as a thread; what it waits for is in memory."""

    def __init__(self, world_rank: int, world_size: int, store: Store) -> None:
        super().__init__(world_rank, world_size, world_rank, world_size, torch.device("cpu"), store)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with self.store.changed:
            is_met = self.store.changed.wait_for(lambda: condition() or bool(self.store.dead), DEADLINE_S)
            assert is_met, f"rank {self.world_rank} waited {DEADLINE_S} s for {what}"
            if not condition():
                raise RankError(f"{what}: rank {min(self.store.dead)} failed")

    def share(self, key: str, value: bytes) -> None:
        with self.store.changed:
            assert key not in self.store.values, f"{key} is used twice"
            self.store.values[key] = value
            self.store.changed.notify_all()

    def wait_for(self, key: str, *, what: str) -> None:
        self._wait(lambda: key in self.store.values, what)

    def fetch(self, key: str) -> bytes:
        self.wait_for(key, what=key)
        return self.store.values[key]

    def agree(self, stage: str, error: BaseException | None) -> None:
        number, self._agreements = self._agreements, self._agreements + 1
        with self.store.changed:
            told = self.store.errors.setdefault(number, {})
            told[self.world_rank] = error
            self.store.changed.notify_all()
        self._wait(lambda: len(told) == self.world_size, stage)
        failed = {rank: e for rank, e in told.items() if e is not None}
        if failed:
            first = min(failed)
            if first == self.world_rank:
                raise failed[first]
            exit_code = getattr(failed[first], "exit_code", 1)
            raise RankError(f"{stage}: rank {first}: {failed[first]}", exit_code=exit_code)


def on_ranks(world_size: int, action: Callable[[Any], Any]) -> list[Any]:
    """What ``action(world)`` gives or raises on each rank."""
    store, results = Store(), [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = action(MemoryWorld(rank, world_size, store))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, DistLoraError):
                with store.changed:
                    store.dead.add(rank)
                    store.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


def whole_state(seed: int, specs: Sequence[TensorSpec] = SPECS) -> dict[Piece, Tensor]:
    """Every tensor of every kind, flat and whole, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        Piece(spec.name, kind, 0, spec.num_elements): torch.randn(spec.num_elements, generator=generator)
        for spec in specs
        for kind in KINDS
    }


def flat_share(world_rank: int, world_size: int, specs: Sequence[TensorSpec] = SPECS) -> list[Piece]:
    """A rank's pieces where all tensors are one flat buffer, cut evenly: cuts fall inside of rows."""
    total = sum(spec.num_elements for spec in specs)
    first, last = total * world_rank // world_size, total * (world_rank + 1) // world_size
    pieces, start = [], 0
    for spec in specs:
        begin, end = max(first - start, 0), min(last - start, spec.num_elements)
        pieces += [Piece(spec.name, kind, begin, end) for kind in KINDS if begin < end]
        start += spec.num_elements
    return pieces


def cut(whole: Mapping[Piece, Tensor], pieces: Sequence[Piece]) -> dict[Piece, Tensor]:
    """The pieces' values out of a whole state."""
    tensors = {(piece.name, piece.kind): values for piece, values in whole.items()}
    return {piece: tensors[piece.name, piece.kind][piece.start : piece.stop] for piece in pieces}


def save(root: Path, world: Any, *, step: int, share: Mapping[Piece, Tensor], specs: Any = SPECS) -> Path:
    """``save_checkpoint`` with what doesn't matter here filled in."""
    return save_checkpoint(
        root,
        step=step,
        share=share,
        specs=specs,
        world=world,
        progress={"best_step": None, "best_loss": 1.5},
        config=f"run: test\ntrain: {{steps: {step}}}\n",
        base=BASE,
        adapter=ADAPTER,
    )


def saved(root: Path, *, step: int, world_size: int = 2, seed: int | None = None) -> Path:
    """A checkpoint of ``whole_state(seed or step)`` that ``world_size`` ranks saved."""
    whole = whole_state(step if seed is None else seed)
    results = on_ranks(
        world_size,
        lambda world: save(root, world, step=step, share=cut(whole, flat_share(world.world_rank, world_size))),
    )
    assert results == [root / f"step-{step:08d}"] * world_size, results
    return results[0]
