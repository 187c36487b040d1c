"""Token ids of a whole data set, document by document, and its held-out part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from dist_lora.errors import DataError


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
            digest.update(np.ascontiguousarray(values).data.cast("B"))
        return f"xxh3_128:{digest.hexdigest()}"

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``(n,)`` uint32 and targets ``(n,)`` bool of one document."""
        whole = slice(int(self.starts[index]), int(self.starts[index] + self.lengths[index]))
        return self.ids[whole], self.is_target[whole]

    def select(self, documents: np.ndarray) -> TokenSet:
        """These documents alone, in this order; their tokens aren't copied."""
        return TokenSet(
            ids=self.ids,
            is_target=self.is_target,
            starts=self.starts[documents],
            lengths=self.lengths[documents],
            num_targets=self.num_targets[documents],
            sample_ids=self.sample_ids[documents],
            kinds=self.kinds,
            set_starts=self.set_starts,
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
    drawn = np.array(
        [
            xxhash.xxh3_64_intdigest(token_set.document(i)[0].tobytes(), seed=seed % 2**64)
            for i in range(len(token_set))
        ],
        dtype=np.uint64,
    )
    num_eval = min(max(1, round(fraction * len(token_set))), len(token_set) - 1)
    order = np.argsort(drawn, kind="stable")
    return token_set.select(np.sort(order[num_eval:])), token_set.select(np.sort(order[:num_eval]))
