"""Documents that are there twice are counted as a plain comparison of all of them counts them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lora.data import duplicates
from dist_lora.data.duplicates import Duplicates, duplicates_between, duplicates_within, warn_of_duplicates
from dist_lora.data.token_set import TokenSet
from dist_lora.world.world import World

# Few letters and short: many are equal, some in their ids alone.
documents = st.lists(st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=2), min_size=1)


def token_set(drawn, *, first_row=0) -> TokenSet:
    ids, is_target = (np.array([pair[part] for document in drawn for pair in document]) for part in (0, 1))
    lengths = np.array([len(document) for document in drawn])
    rows = np.arange(first_row, first_row + len(drawn))
    return TokenSet(ids.astype(np.uint32), is_target.astype(bool), np.cumsum(lengths) - lengths, lengths, lengths, rows)


@pytest.fixture(autouse=True, params=[2, 100_000])
def at_once(request, monkeypatch):
    monkeypatch.setattr(duplicates, "_AT_ONCE", request.param)


@given(documents)
def test_within_a_set_each_document_is_compared_with_the_ones_before_it(drawn):
    pairs = []
    for later, document in enumerate(drawn):
        earlier = [index for index in range(later) if drawn[index] == document]
        pairs += [(later, earlier[-1])] if earlier else []
    assert duplicates_within(token_set(drawn)) == Duplicates(len(pairs), tuple(pairs[:3]))


@given(documents, documents)
def test_between_two_sets_the_first_equal_one_is_named(held_out, train):
    pairs = [(row + 50, train.index(document)) for row, document in enumerate(held_out) if document in train]
    found = duplicates_between(token_set(held_out, first_row=50), token_set(train))
    assert found == Duplicates(len(pairs), tuple(pairs[:3]))


def test_a_run_is_warned_of_held_out_samples_that_it_trains_on_and_of_nothing_else(caplog):
    one, two, three = ([(n, True)] for n in (1, 2, 3))
    train = token_set([one, two, two])
    world = World.alone()
    warn_of_duplicates(token_set([three]), train, name="data.eval", world=world)
    assert not caplog.records
    warn_of_duplicates(token_set([three, two]), train, name="data.eval", world=world)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.message == (
        "data.eval: 1 of 2 samples are also in data.train (sample 2 is sample 2 there): on these it measures what was learned "
        "by heart. Remove them from one of the two"
    )
