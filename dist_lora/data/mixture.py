"""The sequences of a run whose sets have weights: which set is next, and which of its sequences.

A sequence holds documents of one set. The sequences of a run are numbered from 0, over all epochs; step s has those from s times
the global batch. So neither the number of ranks nor where a run stopped can change what a step has.

Which set is next follows the quota method of apportionment (Balinski and Young 1975, "The Quota Method of Apportionment",
Amer. Math. Monthly 82): of the sets whose share stays below its quota plus one, the one that first would fall behind its quota
by one. Where every sequence counts 1, the count of each set is then within 1 of its share of the sequences so far, at any time, whatever
the weights. Where sequences count differently (by the samples packed into them, or by their targets), one is the largest
sequence. All of it is in whole numbers, so that every machine takes the same.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import xxhash

from dist_lora.data.pack import pack_best_fit, permutation
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import ConfigError, DataError
from dist_lora.text import count, figure

MANY_PASSES = 4
"""A set that is seen more often is reported. Up to 4 passes repeated data teaches nearly as much as new (arXiv 2305.16264)."""

_MAX_SEQUENCES = 2**27
"""Of the whole epochs that can be counted: about six minutes, and 2 bytes each."""

_EVERY = 4096  # sequences between two of which the counts are kept
_KEPT_PASSES = 2  # of each set
_COUNTED = {"samples": "samples", "target_tokens": "trained tokens"}


@dataclass(frozen=True)
class Mixture:
    """The sets of a training set, with their shares.

    Args:
        names: of the sets, for messages.
        weights: of the sets, in any unit; all above 0.
        by: what a share is of.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    by: Literal["samples", "target_tokens"] = "samples"

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.weights) > 0, (self.names, self.weights)
        assert all(weight > 0 for weight in self.weights), self.weights

    def parts(self) -> tuple[int, ...]:
        """The weights as whole numbers without a common divisor: 0.7 and 0.3 are 7 and 3, exactly."""
        exact = [Fraction(repr(weight)) for weight in self.weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        divisor = math.gcd(*whole)
        return tuple(number // divisor for number in whole)

    def fingerprint(self, token_set: TokenSet) -> str:
        """``xxh3_128:<hex>`` of the documents, the sets they belong to and the shares: equal if training sees the same."""
        recipe = [token_set.fingerprint(), list(token_set.set_starts), list(self.parts()), self.by]
        return f"xxh3_128:{xxhash.xxh3_128_hexdigest(json.dumps(recipe).encode())}"


class MixedSequences:
    """The sequences of a run in the order of training, each a pure function of its number.

    To know a sequence the ones before it are counted, once: two to three seconds per million.

    Args:
        token_set: with a set for each of the mixture's (see ``TokenSet.set_starts``).
        packing: False makes each document a sequence of its own.

    Raises:
        DataError: a set has no document (all were left out by the rules of ``data``, or are held out).
    """

    def __init__(
        self, token_set: TokenSet, mixture: Mixture, *, sequence_length: int, packing: bool, seed: int
    ) -> None:
        assert len(token_set.set_starts) == len(mixture.names), (token_set.set_starts, mixture.names)
        of_document = np.searchsorted(np.array(token_set.set_starts), token_set.sample_ids, side="right") - 1
        documents = [np.flatnonzero(of_document == index) for index in range(len(mixture.names))]
        empty = [name for name, own in zip(mixture.names, documents, strict=True) if not len(own)]
        if empty:
            raise DataError(
                f"data.train: no sample of {', '.join(empty)} is left to train on, and its weight asks for some. Set its weight "
                "to 0, or see what data.on_no_target, data.on_too_long and data.eval take away"
            )
        self._mixture, self._parts = mixture, mixture.parts()
        self._sets = [
            _Set(token_set, own, number=index, by=mixture.by, capacity=sequence_length if packing else None, seed=seed)
            for index, own in enumerate(documents)
        ]
        self._order = _Order(self._sets, self._parts)

    def sequences(self, start: int, stop: int) -> list[np.ndarray]:
        """The documents of each of the sequences from ``start`` to before ``stop``."""
        chosen, numbers = self._order.between(start, stop)
        return [self._sets[index].sequence(number) for index, number in zip(chosen, numbers, strict=True)]

    def epoch_of(self, sequence: int) -> int:
        """How often every set was seen whole before this sequence."""
        before = self._order.counts_before(sequence)
        return min(number // own.num_sequences for number, own in zip(before, self._sets, strict=True))

    def end_of(self, epoch: int) -> int:
        """How many sequences there are until each set was seen ``epoch`` times whole.

        Raises:
            ConfigError: too many to be counted.
        """
        expected = self._until(epoch)
        if expected > _MAX_SEQUENCES:
            slowest = max(range(len(self._sets)), key=lambda index: self._sets[index].amount / self._parts[index])
            raise ConfigError(
                f"data.train: until each set was seen {count(epoch, 'time')} there are about {expected:,.0f} sequences, because of "
                f"the weight of {self._mixture.names[slowest]}. Raise it, or set train.steps instead of train.epochs"
            )
        return self._order.end_of(epoch)

    def passes(self, num_sequences: int) -> list[float]:
        """How often each set is seen within the first ``num_sequences``, to about one sequence."""
        return [num_sequences / self._until(1.0, of=index) for index in range(len(self._sets))]

    @property
    def tokens_of_sequence(self) -> float:
        """Tokens of a sequence, on average over all sets by their shares of the sequences."""
        shares = self._sequences_per_part()
        averages = [own.num_tokens / own.num_sequences for own in self._sets]
        return sum(share * average for share, average in zip(shares, averages, strict=True)) / sum(shares)

    def lines(self, num_sequences: int) -> list[str]:
        """A line for each set: its share, its samples, and how often it is seen within ``num_sequences``."""
        total, what = sum(self._parts), _COUNTED[self._mixture.by]
        rows = zip(self._mixture.names, self._parts, self._sets, self.passes(num_sequences), strict=True)
        return [
            f"mixture   {part / total:.2%} of the {what} from {name}: "
            f"{count(own.num_documents, 'sample')}, seen {figure(passes)} times"
            for name, part, own, passes in rows
        ]

    def repeated(self, num_sequences: int) -> list[str]:
        """A sentence for each set that is seen more than ``MANY_PASSES`` times within ``num_sequences``."""
        return [
            f"data.train: {name} ({count(own.num_documents, 'sample')}) is seen {passes:,.1f} times in this run, each time in a new "
            f"order. Beyond {MANY_PASSES} times samples teach ever less (arXiv 2305.16264): lower its weight, or add samples"
            for name, own, passes in zip(self._mixture.names, self._sets, self.passes(num_sequences), strict=True)
            if passes > MANY_PASSES
        ]

    def _until(self, epochs: float, *, of: int | None = None) -> float:
        """The expected number of sequences until the set ``of`` (or every set) was seen ``epochs`` times."""
        waited = self._sets if of is None else [self._sets[of]]
        parts = self._parts if of is None else [self._parts[of]]
        longest = max(own.amount / part for own, part in zip(waited, parts, strict=True))
        return epochs * longest * sum(self._sequences_per_part())

    def _sequences_per_part(self) -> list[float]:
        """To what the sequences of each set are in proportion."""
        return [part * own.num_sequences / own.amount for own, part in zip(self._sets, self._parts, strict=True)]


class _Set:
    """The sequences of one set, pass after pass, each pass in an order of its own."""

    def __init__(
        self, token_set: TokenSet, documents: np.ndarray, *, number: int, by: str, capacity: int | None, seed: int
    ) -> None:
        self._documents, self._lengths = documents, token_set.lengths[documents]
        self._targets = token_set.num_targets if by == "target_tokens" else None
        self._number, self._capacity, self._seed = number, capacity, seed
        self._pass = lru_cache(maxsize=_KEPT_PASSES)(self._make_pass)
        self.num_documents, self.num_tokens = len(documents), int(self._lengths.sum())
        self.num_sequences = len(self._pass(0))  # of every pass: see ``pack_best_fit``
        self.amount = len(documents) if self._targets is None else int(self._targets[documents].sum())  # of a pass

    def sequence(self, number: int) -> np.ndarray:
        """The documents of a sequence, counted from 0 over all passes."""
        at_pass, index = divmod(number, self.num_sequences)
        return self._pass(at_pass)[index]

    def amounts(self, at_pass: int) -> list[int]:
        """What each sequence of a pass counts: its samples, or its targets."""
        if self._targets is None and self._capacity is None:
            return [1] * self.num_sequences
        if self._targets is None:
            return [len(documents) for documents in self._pass(at_pass)]
        return [int(self._targets[documents].sum()) for documents in self._pass(at_pass)]

    def _make_pass(self, at_pass: int) -> Sequence[np.ndarray] | np.ndarray:
        # The second word of a run without a mixture is its epoch, below 2**32.
        draws = np.random.Philox(key=np.array([self._seed % 2**64, (self._number + 1) << 32 | at_pass], np.uint64))
        order = permutation(draws, len(self._documents))
        if self._capacity is None:
            alone: np.ndarray = self._documents[order][:, None]
            return alone
        packed = pack_best_fit(self._lengths, capacity=self._capacity, order=order)
        return [self._documents[packed[index]] for index in permutation(draws, len(packed))]


class _Order:
    """Which set each sequence of a run is of; counted as far as it was asked for."""

    def __init__(self, sets: Sequence[_Set], parts: Sequence[int]) -> None:
        self._sets, self._parts = sets, parts
        self._total, self._urgency = sum(parts), [math.lcm(*parts) // part for part in parts]
        self._largest = max(max(own.amounts(0)) for own in sets)
        self._chosen = array("H")
        self._kept = [[0] * len(sets)]  # counts before every 4,096th sequence
        self._ends = [0]  # of epochs
        self._counts, self._amounts, self._amount = [0] * len(sets), [0] * len(sets), 0
        self._ahead = [own.amounts(0)[::-1] for own in sets]  # of the pass, the next one last

    def between(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """The set of each sequence, and its number among that set's."""
        counts = self.counts_before(start)
        self._reach(stop)
        chosen = list(self._chosen[start:stop])
        numbers = []
        for index in chosen:
            numbers.append(counts[index])
            counts[index] += 1
        return chosen, numbers

    def counts_before(self, sequence: int) -> list[int]:
        """How many sequences of each set there are before this one."""
        self._reach(sequence)
        kept = sequence // _EVERY
        recent = np.array(self._chosen[kept * _EVERY : sequence], np.int64)
        counts: list[int] = (np.array(self._kept[kept]) + np.bincount(recent, minlength=len(self._sets))).tolist()
        return counts

    def end_of(self, epoch: int) -> int:
        """The number of sequences by which each set was seen ``epoch`` times whole."""
        while len(self._ends) <= epoch:
            self._reach(len(self._chosen) + _EVERY)
        return self._ends[epoch]

    def _reach(self, stop: int) -> None:
        while len(self._chosen) < stop:
            self._take(self._next())

    def _next(self) -> int:
        """The set of the next sequence: see the top of this file."""
        total, amount, largest = self._total, self._amount, self._largest
        best, best_urgency = -1, 0
        for index, part in enumerate(self._parts):
            own, here = self._amounts[index], self._ahead[index][-1]
            if total * (own + here) - part * (amount + here) < total * max(largest, here):
                urgency = (own + largest) * self._urgency[index]  # ascending with when it falls behind by one
                if best < 0 or urgency < best_urgency:
                    best, best_urgency = index, urgency
        assert best >= 0, (self._amounts, self._parts)  # of all amounts one isn't above its share
        return best

    def _take(self, index: int) -> None:
        here = self._ahead[index].pop()
        self._chosen.append(index)
        self._counts[index] += 1
        self._amounts[index] += here
        self._amount += here
        if not self._ahead[index]:
            passes = self._counts[index] // self._sets[index].num_sequences
            self._ahead[index] = self._sets[index].amounts(passes)[::-1]
            seen = min(own // each.num_sequences for own, each in zip(self._counts, self._sets, strict=True))
            self._ends += itertools.repeat(len(self._chosen), seen + 1 - len(self._ends))
        if len(self._chosen) % _EVERY == 0:
            self._kept.append(list(self._counts))
