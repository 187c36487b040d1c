"""The figures of a set, by hand and by numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_lora.data.token_set import SampleCounts
from dist_lora.overview.command import spread
from dist_lora.overview.figures import PERCENTS, Bar, figures_of, histogram, percentiles
from tests.ranks.tiny import documents

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


@given(lengths)
def test_percentiles_are_numpys_by_counting(drawn):
    expected = [int(np.percentile(drawn, percent, method="inverted_cdf")) for percent in PERCENTS]
    assert list(percentiles(np.array(drawn)).values()) == expected


@given(lengths)
def test_bars_hold_each_length_once_and_are_few(drawn):
    bars = histogram(np.array(drawn))
    assert [bar.num_documents for bar in bars] == [
        sum(bar.first <= length <= bar.last for length in drawn) for bar in bars
    ]
    assert sum(bar.num_documents for bar in bars) == len(drawn)
    assert all(after.first == before.last + 1 for before, after in zip(bars, bars[1:], strict=False))
    assert len(bars) <= 12


def test_a_single_long_sample_leaves_the_bars_of_the_others_as_they_are():
    bars = histogram(np.array([*range(11, 31)] * 10 + [5000]))
    assert bars[:2] == (Bar(10, 11, 10), Bar(12, 13, 20)) and bars[-1] == Bar(32, 5000, 1)
    assert len(bars) == 12


def test_a_small_set_by_hand():
    tokens = documents(seed=0, lengths=[10, 20, 10])
    figures = figures_of(tokens, sources=("a.jsonl",), train=tokens.select(np.array([1])))
    assert figures.num_documents == 3 and figures.num_tokens == 40
    assert figures.lengths == {0: 10, 5: 10, 25: 10, 50: 10, 75: 20, 95: 20, 99: 20, 100: 20}
    # 0.4 of a document isn't trained on.
    assert figures.num_targets == 6 + 12 + 6 and figures.targets[100] == 12
    assert figures.counts == SampleCounts(num_samples=3)
    printed = figures.to_json()
    assert printed["in_train"] == {"samples": 1, "examples": [[2, 2]]}
    assert printed["duplicates"] == {"samples": 0, "examples": []}
    assert [bar for bar in printed["histogram"] if bar[2]] == [[10, 11, 2], [20, 21, 1]] and len(
        printed["histogram"]
    ) == 6


def test_samples_to_show_are_spread_over_the_set():
    assert spread(10, 3) == [0, 4, 9] and spread(2, 5) == [0, 1] and spread(7, 1) == [0] and spread(7, 0) == []
