"""The figures of a token set: how many samples and tokens, how long, how often the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dist_lora.data.duplicates import Duplicates, duplicates_between, duplicates_within
from dist_lora.data.token_set import SampleCounts, TokenSet

PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BARS = 10


@dataclass(frozen=True)
class Bar:
    """Documents with ``first`` to ``last`` tokens."""

    first: int
    last: int
    num_documents: int


@dataclass(frozen=True)
class SetFigures:
    """What there is to know of one set. Lengths and targets are tokens of a document, as it is trained on: cut, where it was."""

    sources: tuple[str, ...]
    counts: SampleCounts  # of all sources, of which this set may be a part
    num_documents: int
    num_tokens: int
    num_targets: int
    lengths: Mapping[int, int]  # by percent
    targets: Mapping[int, int]
    bars: tuple[Bar, ...]
    duplicates: Duplicates
    shared: Duplicates | None = None  # with the training set; None for this one

    def to_json(self) -> dict[str, Any]:
        """All of it; samples are counted from 1, as elsewhere."""
        return {
            "sources": list(self.sources),
            "samples": asdict(self.counts) | {"kept": self.num_documents},
            "tokens": self.num_tokens,
            "target_tokens": self.num_targets,
            "lengths": {f"p{percent}": tokens for percent, tokens in self.lengths.items()},
            "targets": {f"p{percent}": tokens for percent, tokens in self.targets.items()},
            "histogram": [[bar.first, bar.last, bar.num_documents] for bar in self.bars],
            "duplicates": _as_json(self.duplicates),
            "in_train": None if self.shared is None else _as_json(self.shared),
        }


def figures_of(token_set: TokenSet, *, sources: tuple[str, ...], train: TokenSet | None = None) -> SetFigures:
    """The figures of a set. Reads all of it once, and for a held-out set the ``train`` that it is compared with."""
    return SetFigures(
        sources=sources,
        counts=token_set.counts or SampleCounts(num_samples=len(token_set)),
        num_documents=len(token_set),
        num_tokens=token_set.num_tokens,
        num_targets=token_set.num_target_tokens,
        lengths=percentiles(token_set.lengths),
        targets=percentiles(token_set.num_targets),
        bars=histogram(token_set.lengths),
        duplicates=duplicates_within(token_set),
        shared=None if train is None else duplicates_between(token_set, train),
    )


def percentiles(values: np.ndarray) -> dict[int, int]:
    """The least of ``values`` (whole, from 0) that at least so many percent of them don't exceed: for 0 the least of all.

    Counted, not sorted: memory grows with the largest value, not with their number.
    """
    upto = np.cumsum(np.bincount(values))
    ranks = {percent: max(1, -(-percent * len(values) // 100)) for percent in PERCENTS}
    return {percent: int(np.searchsorted(upto, rank)) for percent, rank in ranks.items()}


def histogram(lengths: np.ndarray) -> tuple[Bar, ...]:
    """Bars of equal width up to the 99th percentile, and a wider one for the rest, of which the longest would flatten the others."""
    counts = np.bincount(lengths)
    of_percent = percentiles(lengths)
    low, high, longest = of_percent[0], of_percent[99], of_percent[100]
    width = _round_width((high - low + 1) / NUM_BARS)
    firsts = range(low // width * width, high + 1, width)
    bars = [Bar(first, first + width - 1, int(counts[first : first + width].sum())) for first in firsts]
    if longest > bars[-1].last:
        beyond = bars[-1].last + 1
        bars.append(Bar(beyond, longest, int(counts[beyond:].sum())))
    return tuple(bars)


def _round_width(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10


def _as_json(duplicates: Duplicates) -> dict[str, Any]:
    return {
        "samples": duplicates.num_documents,
        "examples": [[mine + 1, other + 1] for mine, other in duplicates.examples],
    }
