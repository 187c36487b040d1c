"""Packing: every document once, never too much in a sequence, as tight as plain best fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lora.data.pack import pack_best_fit


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """The textbook's loop; the lengths' sums of its sequences."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


def packed(lengths, capacity, order=None):
    return pack_best_fit(
        np.array(lengths),
        capacity=capacity,
        order=np.arange(len(lengths)) if order is None else np.array(order),
    )


def test_a_small_case_by_hand():
    assert [list(bin_) for bin_ in packed([3, 7, 5, 2, 3], 10)] == [[1, 0], [2, 4, 3]]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40), st.randoms())
def test_sequences_are_those_of_the_textbooks_loop_whatever_the_order(lengths, capacity, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    bins = packed(lengths, capacity, order)
    assert sorted(document for bin_ in bins for document in bin_) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in bin_) for bin_ in bins) == best_fit_one_by_one(lengths, capacity)


def test_the_order_decides_which_of_equal_documents_are_together():
    first, second = (packed([5] * 8, 10, order) for order in (range(8), [0, 7, 1, 6, 2, 5, 3, 4]))
    assert [list(bin_) for bin_ in first] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(bin_) for bin_ in second] == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_a_million_documents_are_packed_tightly():
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 1_000_000).astype(np.int64).clip(1, 2048)
    bins = pack_best_fit(lengths, capacity=2048, order=np.arange(len(lengths)))
    assert sum(len(bin_) for bin_ in bins) == len(lengths)
    assert lengths.sum() / (len(bins) * 2048) > 0.999


def test_a_document_longer_than_a_sequence_is_our_mistake():
    with pytest.raises(AssertionError, match="lengths from 2 to 11, capacity 10"):
        packed([2, 11], 10)
