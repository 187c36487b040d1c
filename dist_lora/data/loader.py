"""The batches of a run, each a pure function of its step: any step can be asked for at any time.

The order of the documents comes from (seed, epoch), the sequences of a global batch from that order;
only their assignment to ranks depends on the number of ranks. Where sets have weights, the order is that of ``data.mixture``.
There is no padding: a micro-batch is the documents of its sequences, one after another.

Letters: T tokens of a micro-batch, D documents in it, K targets in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from dist_lora.data.mixture import MixedSequences, Mixture
from dist_lora.data.pack import pack_best_fit, permutation
from dist_lora.data.token_set import TokenSet

_KEPT_EPOCHS = 2
"""Plans kept in memory, so that an evaluation or a step of another epoch doesn't make a plan twice."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward pass: whole documents that don't attend to each other.

    The first token of a document is never a target: the token before it belongs to another document. The tensors are all on the
    CPU, as the loader makes them, or all on the device that computes (see ``to``).
    """

    ids: Tensor  # int64 (T,)
    positions: Tensor  # int64 (T,): from 0 in each document
    starts: Tensor  # int32 (D + 1,): where documents begin, and T
    bounds: tuple[int, ...]  # the same, for the host: nothing is read back from a device
    target_index: Tensor  # int64 (K,): where the next token is a target
    labels: Tensor  # int64 (K,): those next tokens
    sample_ids: tuple[int, ...]  # row in the source of each document; none for a dummy micro-batch
    whole: Tensor | None = None  # what all its tensors are parts of, once they are packed: see ``packed``

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``, by one copy for which the host doesn't wait; itself where it is there already."""
        if self.ids.device.type == device.type:
            return self
        # torch keeps pinned memory that was copied from until the copy is done (CachingHostAllocator).
        whole = self.whole if self.whole is not None else self.packed(is_pinned=device.type == "cuda")
        return self.unpacked(whole.to(device, non_blocking=True))

    def packed(self, *, is_pinned: bool) -> Tensor:
        """All its tensors one after the other as int64, two bounds in each."""
        parts = (self._paired_starts(), self.ids, self.positions, self.target_index, self.labels)
        out = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=is_pinned)
        return torch.cat(parts, out=out)

    def unpacked(self, packed: Tensor) -> MicroBatch:
        """The same with its tensors in ``packed``, which is this micro-batch's, on any device."""
        num_bounds, num_tokens, num_targets = len(self.bounds), len(self.ids), len(self.labels)
        sizes = [(num_bounds + 1) // 2, num_tokens, num_tokens, num_targets, num_targets]
        starts, ids, positions, target_index, labels = packed.split_with_sizes(sizes)
        return replace(
            self,
            ids=ids,
            positions=positions,
            starts=starts.view(torch.int32)[:num_bounds],
            target_index=target_index,
            labels=labels,
            whole=packed,
        )

    def _paired_starts(self) -> Tensor:
        return torch.nn.functional.pad(self.starts, (0, len(self.starts) % 2)).view(torch.int64)


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One optimizer step: this rank's micro-batches and totals of the global batch."""

    micro_batches: tuple[MicroBatch, ...]  # of this rank; every rank has the same number
    target_tokens: int  # of the global batch, all ranks
    tokens: int  # of the global batch, all ranks
    pairs: int  # of the global batch: a token and one that it attends to, itself among them
    sample_ids: tuple[int, ...]  # of the global batch, all ranks, in order
    epoch: int


class Loader:
    """Training batches of one rank.

    Args:
        sequence_length: tokens of a packed sequence; no document is longer.
        packing: False makes each document a sequence of its own.
        global_batch: sequences per step, over all ranks; the last step of an epoch has the rest.
        micro_batch: sequences per forward pass and rank.
        mixture: the shares of the token set's sets. Every batch is full then, and an epoch ends with the step in which each set
            was seen once.

    Raises:
        DataError: a set of the mixture has no documents.
    """

    def __init__(
        self,
        token_set: TokenSet,
        *,
        sequence_length: int,
        packing: bool,
        global_batch: int,
        micro_batch: int,
        seed: int,
        world_rank: int,
        world_size: int,
        mixture: Mixture | None = None,
    ) -> None:
        assert len(token_set) > 0, "a token set without documents"
        self._token_set = token_set
        self._sequence_length = sequence_length
        self._packing = packing
        self.global_batch = global_batch
        self._micro_batch = micro_batch
        self._seed = seed
        self._world_rank, self._world_size = world_rank, world_size
        self._mixture = mixture
        self.mixed: MixedSequences | None = None  # the sequences of a mixture
        if mixture is not None:
            self.mixed = MixedSequences(token_set, mixture, sequence_length=sequence_length, packing=packing, seed=seed)
            return
        self._plan_of = lru_cache(maxsize=_KEPT_EPOCHS)(self._make_plan)
        self._num_sequences = len(self._plan_of(0))

    @cached_property
    def fingerprint(self) -> str:
        """The training set's (see ``TokenSet.fingerprint``), with the shares of a mixture."""
        return self._mixture.fingerprint(self._token_set) if self._mixture else self._token_set.fingerprint()

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of an epoch.

        The last one may be smaller, and every epoch has as many (see ``pack_best_fit``). In a mixture no step is smaller, and
        epochs may differ.

        Raises:
            ConfigError: a mixture's epochs can't be counted (see ``MixedSequences.end_of``).
        """
        assert epoch >= 0, epoch
        if self.mixed is not None:
            return self._steps_until(self.mixed, epoch + 1) - self._steps_until(self.mixed, epoch)
        return _ceil_div(self._num_sequences, self.global_batch)

    def _steps_until(self, mixed: MixedSequences, epoch: int) -> int:
        return _ceil_div(mixed.end_of(epoch), self.global_batch)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and step within it, both from 0, of a step counted from 0 over the run."""
        if self.mixed is not None:
            epoch = self.mixed.epoch_of(step * self.global_batch)
            return epoch, step - self._steps_until(self.mixed, epoch)
        return divmod(step, self.steps_in_epoch(0))

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch: of a mixture, until each set was seen whole.

        Raises:
            ConfigError: see ``steps_in_epoch``.
        """
        return self._num_sequences if self.mixed is None else self.mixed.end_of(1)

    @property
    def tokens_of_sequence(self) -> float:
        """Tokens of a sequence, on average."""
        if self.mixed is not None:
            return self.mixed.tokens_of_sequence
        return self._token_set.num_tokens / self._num_sequences

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the prompts of its documents are written; see ``Encoded.kind``."""
        return self._token_set.kinds

    def batch(self, step: int) -> StepBatch:
        """The batch of a step, counted from 0 over the run. The first one of an epoch computes its plan."""
        epoch, sequences = self._sequences_of(step)
        documents = np.concatenate(sequences)
        lengths = self._token_set.lengths[documents].astype(np.int64)
        tokens = [int(self._token_set.lengths[sequence].sum()) for sequence in sequences]
        mine = deal(tokens, world_size=self._world_size)[self._world_rank]
        num_passes = _ceil_div(_ceil_div(len(sequences), self._world_size), self._micro_batch)
        passes = [mine[at * self._micro_batch : (at + 1) * self._micro_batch] for at in range(num_passes)]
        return StepBatch(
            micro_batches=tuple(_micro_batch(self._token_set, [sequences[i] for i in chosen]) for chosen in passes),
            target_tokens=int(self._token_set.num_targets[documents].sum()),
            tokens=int(lengths.sum()),
            pairs=int((lengths * (lengths + 1) // 2).sum()),
            sample_ids=tuple(self._token_set.sample_ids[documents].tolist()),
            epoch=epoch,
        )

    def _sequences_of(self, step: int) -> tuple[int, list[np.ndarray]]:
        """The epoch of a step and the documents of its sequences."""
        if self.mixed is not None:
            first = step * self.global_batch
            return self.mixed.epoch_of(first), self.mixed.sequences(first, first + self.global_batch)
        epoch, index = self.locate(step)
        plan = self._plan_of(epoch)
        assert len(plan) == self._num_sequences, f"epoch {epoch} has {len(plan)} sequences, not {self._num_sequences}"
        return epoch, list(plan[index * self.global_batch : (index + 1) * self.global_batch])

    def _make_plan(self, epoch: int) -> list[np.ndarray] | np.ndarray:
        """The documents of each sequence of an epoch, in the order of training."""
        draws = np.random.Philox(key=np.array([self._seed % 2**64, epoch], np.uint64))
        order = permutation(draws, len(self._token_set))
        if not self._packing:
            return order[:, None]
        packed = pack_best_fit(self._token_set.lengths, capacity=self._sequence_length, order=order)
        return [packed[index] for index in permutation(draws, len(packed))]


class EvalBatches:
    """Held-out documents, each exactly once, in passes that don't depend on the number of ranks.

    Every rank iterates over the same number of micro-batches. ``packing`` is that of the training, so that a pass
    has no more tokens than in training.
    """

    def __init__(
        self,
        token_set: TokenSet,
        *,
        micro_batch: int,
        sequence_length: int,
        packing: bool,
        world_rank: int,
        world_size: int,
    ) -> None:
        self._token_set = token_set
        order = np.arange(len(token_set))
        self._sequences: list[np.ndarray] | np.ndarray = order[:, None]
        if packing:
            self._sequences = pack_best_fit(token_set.lengths, capacity=sequence_length, order=order)
        self._micro_batch = micro_batch
        passes = range(0, len(self._sequences), micro_batch)  # each by its first sequence
        self._passes = passes[world_rank::world_size]
        self._num_passes = _ceil_div(len(passes), world_size)

    @property
    def target_tokens(self) -> int:
        """Targets of all documents, over all ranks."""
        return self._token_set.num_target_tokens

    def __len__(self) -> int:
        return self._num_passes

    def __iter__(self) -> Iterator[MicroBatch]:
        for at in range(self._num_passes):
            chosen: list[np.ndarray] = []
            if at < len(self._passes):
                first = self._passes[at]
                chosen = list(self._sequences[first : first + self._micro_batch])
            yield _micro_batch(self._token_set, chosen)


def deal(tokens: Sequence[int], *, world_size: int) -> list[list[int]]:
    """The sequences of a global batch for each rank: counts differ by at most one, tokens by little.

    The longest sequence goes first, to the rank that has the fewest tokens among those that aren't full.
    Each rank keeps the order of the batch.
    """
    least, extra = divmod(len(tokens), world_size)
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    num_full = 0
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        limit = least + (num_full < extra)
        open_ranks = [rank for rank in range(world_size) if len(assigned[rank]) < limit]
        rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
        assigned[rank].append(index)
        loads[rank] += tokens[index]
        num_full += len(assigned[rank]) == least + 1
    return [sorted(indices) for indices in assigned]


def _ceil_div(amount: int, divisor: int) -> int:
    return -(-amount // divisor)


def _micro_batch(token_set: TokenSet, sequences: Sequence[np.ndarray]) -> MicroBatch:
    """The documents of some sequences, flat; without any, a dummy of one token without a target."""
    if not sequences:
        nothing = torch.zeros(0, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        return MicroBatch(one, one.clone(), starts, (0, 1), nothing, nothing.clone(), ())
    documents = np.concatenate(sequences)
    pieces = [token_set.document(int(index)) for index in documents]
    ids = np.concatenate([piece for piece, _ in pieces]).astype(np.int64)
    is_target = np.concatenate([target for _, target in pieces]).astype(bool)
    lengths = token_set.lengths[documents]
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    is_target[bounds[:-1]] = False
    positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
    targets = np.flatnonzero(is_target)
    token_set.give_back()
    return MicroBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        starts=torch.from_numpy(bounds.astype(np.int32)),
        bounds=tuple(bounds.tolist()),
        target_index=torch.from_numpy(targets - 1),
        labels=torch.from_numpy(ids[targets]),
        sample_ids=tuple(token_set.sample_ids[documents].tolist()),
    )
