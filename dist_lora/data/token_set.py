"""Token ids of a whole data set, document by document, and its held-out part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash

from dist_lora.data.mapped import give_back_arrays
from dist_lora.errors import DataError

_TOKENS_AT_ONCE = 2**24
_DOCUMENTS_AT_ONCE = 10_000


@dataclass(frozen=True)
class SampleCounts:
    """What happened to the samples of the sources, before they were a token set."""

    num_samples: int = 0  # that were read
    num_truncated: int = 0
    num_cut_answers: int = 0  # samples that were cut within a part that is trained on
    num_lost_answers: int = 0  # samples whose whole parts that are trained on begin beyond the cut
    num_too_long: int = 0  # left out
    num_without_targets: int = 0  # left out
    unused: Mapping[str, int] = field(default_factory=dict)  # what records have and training doesn't use: samples


@dataclass(frozen=True, eq=False)
class TokenSet:
    """The documents of a data set; the flat arrays are memory-mapped files.

    N documents, T tokens of all of them (of the whole file, also where only some are selected).
    """

    ids: np.ndarray  # uint32 (T,)
    is_target: np.ndarray  # bool (T,)
    starts: np.ndarray  # int64 (N,): each document's first token
    lengths: np.ndarray  # int64 (N,), at most the sequence length
    num_targets: np.ndarray  # int64 (N,), at least 1: its targets but the first token, which isn't predicted
    sample_ids: np.ndarray  # int64 (N,): the document's row in the source, from 0
    kinds: tuple[str, ...] = ()  # of ``Encoded.kind``, those that there are
    counts: SampleCounts | None = None  # of all sources, also where only some documents are selected
    set_starts: tuple[int, ...] = ()  # the row at which each source begins, where they are read differently or weighed

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def num_target_tokens(self) -> int:
        """Target tokens (those that are trained on) of all documents."""
        return int(self.num_targets.sum())

    def fingerprint(self) -> str:
        """``xxh3_128:<hex>`` of the documents in their order, ids and targets: equal if training sees the same.

        Reads all of it, once.
        """
        digest = xxhash.xxh3_128()
        for values in (self.starts, self.lengths, self.sample_ids, self.ids, self.is_target):
            for _, some in self.pieces(values):
                digest.update(np.ascontiguousarray(some).data.cast("B"))
        return f"xxh3_128:{digest.hexdigest()}"

    def pieces(self, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """One of its arrays from its begin to its end, in parts with their first index; no more of the file stays in memory."""
        for begin in range(0, len(values), _TOKENS_AT_ONCE):
            yield begin, values[begin : begin + _TOKENS_AT_ONCE]
            self.give_back()

    def give_back(self) -> None:
        """Take off this process what was read of the files, which counts as its memory and is read again where it is needed."""
        give_back_arrays(self.ids, self.is_target, self.lengths, self.num_targets, self.sample_ids)

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each ``document``, in order; no more than some of them stay in memory."""
        for index in range(len(self)):
            yield self.document(index)
            if index % _DOCUMENTS_AT_ONCE == 0:
                self.give_back()

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``(n,)`` uint32 and targets ``(n,)`` bool of one document."""
        whole = slice(int(self.starts[index]), int(self.starts[index] + self.lengths[index]))
        return self.ids[whole], self.is_target[whole]

    def select(self, documents: np.ndarray) -> TokenSet:
        """These documents alone, in this order; their tokens aren't copied."""
        return replace(
            self,
            starts=self.starts[documents],
            lengths=self.lengths[documents],
            num_targets=self.num_targets[documents],
            sample_ids=self.sample_ids[documents],
        )


def split_eval(token_set: TokenSet, *, fraction: float, seed: int) -> tuple[TokenSet, TokenSet]:
    """(train, eval): ``fraction`` of the documents, at least one, is held out.

    Which ones depends on their ids and the seed alone, not on their order; equal documents stay
    together, unless they are at the boundary.

    Raises:
        DataError: there are fewer than two documents.
    """
    if len(token_set) < 2:
        raise DataError(
            f"data.eval: {fraction} of {len(token_set)} document can't be held out; name a file, or add data"
        )
    drawn = np.fromiter(
        (xxhash.xxh3_64_intdigest(ids.tobytes(), seed=seed % 2**64) for ids, _ in token_set.documents()),
        dtype=np.uint64,
        count=len(token_set),
    )
    num_eval = min(max(1, round(fraction * len(token_set))), len(token_set) - 1)
    is_held_out = np.zeros(len(token_set), bool)
    is_held_out[np.argsort(drawn, kind="stable")[:num_eval]] = True
    del drawn
    return token_set.select(np.flatnonzero(~is_held_out)), token_set.select(np.flatnonzero(is_held_out))
