"""Documents that are there more than once: within a token set, and in the training set and a held-out one.

Two documents are equal if their ids and targets are: what is trained on, after all cuts. They are compared by digests of 64 bits
(xxh3): of a hundred million documents that differ, two have the same digest with a probability of 3 in 10,000.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from dist_lora.data.token_set import TokenSet
from dist_lora.text import count
from dist_lora.world.world import World

NUM_EXAMPLES = 3
_AT_ONCE = 100_000  # documents

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class Duplicates:
    """Documents that equal another one; ``examples``: the rows of the first few in the source, from 0, each with the other's."""

    num_documents: int
    examples: tuple[tuple[int, int], ...]


def duplicates_within(token_set: TokenSet) -> Duplicates:
    """The documents that equal an earlier one. Reads all of them; takes 20 bytes of memory a document."""
    digests = np.empty(len(token_set), np.uint64)
    for first, some in _digests(token_set):
        digests[first : first + len(some)] = some
    order = np.argsort(digests, kind="stable")
    number, pairs = 0, list[tuple[int, int]]()
    for begin in range(0, len(order), _AT_ONCE):
        before, after = order[begin : begin + _AT_ONCE], order[begin + 1 : begin + 1 + _AT_ONCE]
        is_same = digests[before[: len(after)]] == digests[after]
        number += int(is_same.sum())
        pairs = heapq.nsmallest(
            NUM_EXAMPLES, [*pairs, *zip(after[is_same].tolist(), before[: len(after)][is_same].tolist(), strict=True)]
        )
    return Duplicates(number, tuple((_row(token_set, later), _row(token_set, earlier)) for later, earlier in pairs))


def duplicates_between(held_out: TokenSet, train: TokenSet) -> Duplicates:
    """The documents of ``held_out`` that are also in ``train``. Reads both; takes 24 bytes a held-out document."""
    sought = np.concatenate([some for _, some in _digests(held_out)])
    order = np.argsort(sought, kind="stable")
    distinct = sought[order]
    twin = np.full(len(distinct), -1)  # by the place of the first that is equal: a document of train
    for first, some in _digests(train):
        at = np.minimum(np.searchsorted(distinct, some), len(distinct) - 1)
        is_there = distinct[at] == some
        places, documents = at[is_there], first + np.flatnonzero(is_there)
        is_new = twin[places] < 0
        twin[places[is_new][::-1]] = documents[is_new][::-1]  # of several the first, which is written last
    twin = twin[np.searchsorted(distinct, sought)]
    found = np.flatnonzero(twin >= 0)
    pairs = ((_row(held_out, int(index)), _row(train, int(twin[index]))) for index in found[:NUM_EXAMPLES])
    return Duplicates(len(found), tuple(pairs))


def warn_of_duplicates(held_out: TokenSet, train: TokenSet, *, name: str, world: World) -> None:
    """Warn where held-out documents are trained on. All ranks call it; the first reads both sets once, on behalf of all.

    ``name``: the held-out set's setting, like ``data.eval``.
    """

    def check() -> None:
        shared = duplicates_between(held_out, train)
        if shared.num_documents:
            log.warning(f"{name}: {shared_line(shared, len(held_out))}")

    world.on_first(f"samples of {name} that are in data.train", check)


def shared_line(shared: Duplicates, num_documents: int) -> str:
    """What is shared with the training set, and what it means."""
    examples = ", ".join(f"sample {mine + 1:,} is sample {other + 1:,} there" for mine, other in shared.examples)
    more = ", ..." if shared.num_documents > len(shared.examples) else ""
    return (
        f"{shared.num_documents:,} of {count(num_documents, 'sample')} are also in data.train ({examples}{more}): on these it measures "
        "what was learned by heart. Remove them from one of the two"
    )


def _row(token_set: TokenSet, document: int) -> int:
    return int(token_set.sample_ids[document])


def _digests(token_set: TokenSet) -> Iterator[tuple[int, np.ndarray]]:
    """The digests of some documents at a time, uint64, with the number of the first of them."""
    all_of_them = (
        xxhash.xxh3_64_intdigest(ids.tobytes() + is_target.tobytes()) for ids, is_target in token_set.documents()
    )
    for first in range(0, len(token_set), _AT_ONCE):
        size = min(_AT_ONCE, len(token_set) - first)
        yield first, np.fromiter(all_of_them, np.uint64, count=size)
