"""Mixtures: each set's share at any time, the same batches on any ranks, and what is said of them."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.data.mixture import MixedSequences, Mixture
from dist_lora.data.pack import pack_best_fit
from dist_lora.data.token_set import TokenSet, split_eval
from dist_lora.errors import ConfigError, DataError
from dist_lora.simulation.simulate import full_batches
from dist_lora.world.world import World


def token_set(*lengths_of_sets) -> TokenSet:
    """Sets of documents of these lengths; all ids of a document are its number, and half of them are targets."""
    lengths = np.array([n for lengths in lengths_of_sets for n in lengths], np.int64)
    ids = np.repeat(np.arange(len(lengths)), lengths).astype(np.uint32)
    is_target = np.concatenate([np.arange(n) > (n - 1) // 2 for n in lengths])
    num_targets = np.array([n - 1 - (n - 1) // 2 for n in lengths])
    set_starts = tuple(itertools.accumulate((len(own) for own in lengths_of_sets[:-1]), initial=0))
    return TokenSet(
        ids,
        is_target,
        np.cumsum(lengths) - lengths,
        lengths,
        num_targets,
        np.arange(len(lengths)),
        set_starts=set_starts,
    )


def mixture_of(weights, by="samples"):
    return Mixture(tuple("abcdefghijkl"[: len(weights)]), tuple(weights), by)


def loader(tokens, weights, *, by="samples", world_rank=0, world_size=1, packing=False, global_batch=4, seed=0):
    return Loader(
        tokens,
        sequence_length=16,
        packing=packing,
        global_batch=global_batch,
        micro_batch=2,
        seed=seed,
        world_rank=world_rank,
        world_size=world_size,
        mixture=mixture_of(weights, by),
    )


def sets_of(tokens, sample_ids):
    return Counter(np.searchsorted(tokens.set_starts, sample_ids, side="right") - 1)


WEIGHTS = st.lists(st.floats(0.001, 1000).map(lambda weight: float(f"{weight:.3g}")), min_size=1, max_size=9)


@given(WEIGHTS, st.lists(st.integers(1, 9), min_size=9, max_size=9), st.integers(1, 7), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_after_any_number_of_steps_each_set_is_within_one_sample_of_its_share(weights, sizes, global_batch, seed):
    tokens = token_set(*([4] * size for size in sizes[: len(weights)]))
    run = loader(tokens, weights, global_batch=global_batch, seed=seed)
    total, seen = sum(map(Fraction, weights)), Counter()
    for step in range(60):
        batch = run.batch(step)
        assert len(batch.sample_ids) == global_batch
        seen += sets_of(tokens, batch.sample_ids)
        for index, weight in enumerate(weights):
            share = Fraction(weight) / total * global_batch * (step + 1)
            assert abs(seen[index] - share) < 1.001, (step, index)  # 0.001: the test takes weights as binary fractions


def test_a_set_never_has_a_whole_sequence_more_than_its_share() -> None:
    mixed = MixedSequences(token_set([4], [4], [4]), mixture_of([8, 1, 1]), sequence_length=16, packing=False, seed=0)
    assert [int(one[0]) for one in mixed.sequences(0, 5)] == [0, 0, 0, 0, 1]  # of five the first set's share is four


@pytest.mark.parametrize("by", ["samples", "target_tokens"])
@given(WEIGHTS, st.lists(st.lists(st.integers(2, 16), min_size=1, max_size=30), min_size=9, max_size=9))
@settings(max_examples=15, deadline=None)
def test_packed_sets_and_trained_tokens_are_within_the_largest_sequence_of_their_shares(by, weights, lengths):
    tokens = token_set(*lengths[: len(weights)])
    counted = np.ones(len(tokens), int) if by == "samples" else tokens.num_targets
    mixed = MixedSequences(tokens, mixture_of(weights, by), sequence_length=16, packing=True, seed=1)
    sequences = mixed.sequences(0, 120)
    starts = [*tokens.set_starts, len(tokens)]
    every = [first + documents for first, last in itertools.pairwise(starts) for documents in
             pack_best_fit(tokens.lengths[first:last], capacity=16, order=np.arange(last - first))]  # fmt: skip
    largest = max(int(counted[sequence].sum()) for sequence in [*every, *sequences])
    amounts = np.zeros(len(weights))
    for sequence in sequences:
        (own,) = sets_of(tokens, sequence)  # of one set alone
        amounts[own] += counted[sequence].sum()
        assert tokens.lengths[sequence].sum() <= 16
        assert (abs(amounts - np.array(weights) / sum(weights) * amounts.sum()) < 1.001 * largest).all()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("by", ["samples", "target_tokens"])
def test_ranks_and_stops_do_not_change_what_a_step_learns(packing, by):
    draws = np.random.default_rng(0)
    tokens = token_set(draws.integers(2, 17, 40), draws.integers(2, 9, 5), draws.integers(9, 17, 11))

    def learned(steps, world_size):
        """Whatever the number of ranks, and asked first for the last of the steps: a resumed run begins there."""
        found = {}
        for step in reversed(steps):
            batches = [
                loader(tokens, [0.5, 0.2, 0.3], by=by, packing=packing, world_rank=rank, world_size=world_size, seed=3)
                .batch(step)
                for rank in range(world_size)
            ]  # fmt: skip
            micros = [micro for batch in batches for micro in batch.micro_batches if micro.sample_ids]
            assert sorted(i for micro in micros for i in micro.sample_ids) == sorted(batches[0].sample_ids)
            assert {batch.target_tokens for batch in batches} == {sum(len(micro.labels) for micro in micros)}
            assert len({(batch.sample_ids, batch.epoch, len(batch.micro_batches)) for batch in batches}) == 1
            found[step] = batches[0].sample_ids, batches[0].epoch
        return [found[step] for step in steps]

    in_turn = loader(tokens, [0.5, 0.2, 0.3], by=by, packing=packing, seed=3)
    whole = [(in_turn.batch(step).sample_ids, in_turn.batch(step).epoch) for step in range(20)]
    for world_size in (1, 2, 3):
        assert learned(range(12, 20), world_size) == whole[12:]
    assert len({ids for ids, _ in whole}) == 20


def test_a_set_is_seen_whole_before_it_begins_again_in_another_order():
    tokens = token_set([4] * 6, [4] * 50)
    run = loader(tokens, [0.5, 0.5], global_batch=8)
    small = [i for step in range(6) for i in run.batch(step).sample_ids if i < 6]
    passes = [tuple(small[at : at + 6]) for at in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) == 4


def test_a_packed_set_is_packed_anew_in_each_pass_and_its_sequences_are_in_any_order() -> None:
    tokens = token_set([16] * 3 + [4] * 12)  # 3 sequences of one, and 3 of four
    mixed = MixedSequences(tokens, mixture_of([1]), sequence_length=16, packing=True, seed=0)
    passes = [[tuple(sorted(one)) for one in mixed.sequences(at, at + 6)] for at in range(0, 36, 6)]
    assert all(sorted(i for one in found for i in one) == list(range(15)) for found in passes)
    assert len({frozenset(found) for found in passes}) == 6
    assert len({tuple(len(one) for one in found) for found in passes}) > 2


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_kept_of_the_counts_changes_nothing(packing, monkeypatch) -> None:
    tokens = token_set([4] * 7, [6] * 3, [9, 2, 2, 5])

    def made() -> MixedSequences:
        return MixedSequences(tokens, mixture_of([3, 1, 2]), sequence_length=16, packing=packing, seed=0)

    whole, few = made(), made()
    wanted = [(one.tolist(), whole.epoch_of(at)) for at, one in enumerate(whole.sequences(0, 40))]
    monkeypatch.setattr("dist_lora.data.mixture._EVERY", 3)
    for at in (31, 2, 39, 9, 12):
        assert ([one.tolist() for one in few.sequences(at, at + 1)], few.epoch_of(at)) == (
            [wanted[at][0]],
            wanted[at][1],
        )
    assert [few.end_of(epoch) for epoch in range(4)] == [whole.end_of(epoch) for epoch in range(4)]


def test_an_epoch_ends_with_the_step_in_which_the_last_set_was_seen_whole():
    tokens = token_set([4] * 10, [4] * 3)
    run = loader(tokens, [3, 1], global_batch=4)  # each step 3 of the first set, whose tenth is in the fourth step
    assert [run.steps_in_epoch(epoch) for epoch in range(3)] == [4, 3, 3]  # 10, 20, 30 samples: in steps 4, 7, 10
    assert [run.batch(step).epoch for step in range(8)] == [0, 0, 0, 0, 1, 1, 1, 2]
    assert [run.locate(step) for step in (0, 3, 4, 7)] == [(0, 0), (0, 3), (1, 0), (2, 0)]
    seen = Counter(i for step in range(4) for i in run.batch(step).sample_ids)
    assert seen.keys() == set(range(13)) and max(seen.values()) <= 2


def test_the_order_of_a_mixture_never_changes():
    """Frozen: another order would make a resumed run repeat samples."""
    run = loader(token_set([4] * 3, [4] * 5), [1, 2], global_batch=6, seed=5)
    assert [run.batch(step).sample_ids for step in range(2)] == FROZEN
    tokens = token_set([4, 2, 9, 3, 3], [5, 16, 2, 7])
    packed = loader(tokens, [1, 2], by="target_tokens", packing=True, global_batch=3, seed=5)
    assert [packed.batch(step).sample_ids for step in range(3)] == FROZEN_PACKED


FROZEN = [(6, 2, 3, 4, 1, 7), (5, 0, 4, 7, 2, 3)]
FROZEN_PACKED = [(8, 5, 7, 6, 3, 1), (2, 0, 4, 6, 8, 5, 7), (3, 1, 6, 2, 0, 4)]


def test_weights_are_shares_in_any_unit_and_exact():
    assert mixture_of([0.7, 0.2, 0.1]).parts() == mixture_of([70, 20, 10]).parts() == (7, 2, 1)
    assert mixture_of([1e-07, 1]).parts() == (1, 10**7)


def test_the_fingerprint_is_of_the_samples_their_sets_and_shares():
    tokens, other_sets = token_set([4] * 3, [4] * 5), token_set([4] * 4, [4] * 4)
    of = [
        loader(tokens, [1, 2]), loader(tokens, [2, 1]), loader(tokens, [1, 2], by="target_tokens"),
        loader(other_sets, [1, 2]),
    ]  # fmt: skip
    assert len({one.fingerprint for one in of}) == 4
    assert loader(token_set([4] * 3, [5] * 5), [1, 2]).fingerprint not in {one.fingerprint for one in of}
    assert of[0].fingerprint == loader(tokens, [0.5, 1.0], packing=True, world_size=3).fingerprint
    assert tokens.fingerprint() == other_sets.fingerprint()  # as it was, where there are no weights


def test_lines_tell_shares_and_what_is_repeated():
    run = loader(token_set([4] * 100, [4] * 10), [0.75, 0.25])
    assert run.mixed is not None
    assert run.mixed.lines(400) == [
        "mixture   75.00% of the samples from a: 100 samples, seen 3 times",
        "mixture   25.00% of the samples from b: 10 samples, seen 10 times",
    ]
    (warning,) = run.mixed.repeated(400)
    assert warning.startswith("data.train: b (10 samples) is seen 10.0 times in this run, each time in a new order.")
    assert run.mixed.repeated(160) == [] and len(run.mixed.repeated(161)) == 1  # b is seen 4 times in 160 sequences
    by_tokens = loader(token_set([4] * 100, [4] * 10), [0.75, 0.25], by="target_tokens")
    assert by_tokens.mixed is not None and " of the trained tokens from a" in by_tokens.mixed.lines(4)[0]


def test_passes_count_sequences_by_what_is_packed_into_them_or_trained_on_in_them() -> None:
    packed = loader(token_set([4] * 8, [4] * 4), [1, 1], packing=True).mixed  # 2 sequences of 4 samples, and 1
    assert packed is not None and packed.passes(4) == [1, 2]
    # 4 samples of 2 targets, and 4 of 4: two of the first to each of the second.
    by_targets = loader(token_set([4] * 4, [8] * 4), [1, 1], by="target_tokens").mixed
    assert by_targets is not None and by_targets.passes(6) == [1, 0.5]


@pytest.mark.parametrize(("names", "weights"), [((), ()), (("a", "b"), (1.0,)), (("a", "b"), (1.0, 0.0))])
def test_a_mixture_has_a_weight_above_zero_for_each_of_its_sets(names, weights) -> None:
    with pytest.raises(AssertionError):
        Mixture(names, weights)


def test_a_set_without_samples_is_refused_by_name():
    tokens = token_set([4] * 3, [4] * 3)
    train, _ = split_eval(tokens, fraction=0.5, seed=0)
    assert train.set_starts == (0, 3)
    with pytest.raises(DataError, match=r"no sample of b is left to train on, and its weight asks for some"):
        loader(tokens.select(np.arange(3)), [1, 1])


def test_an_epoch_that_never_ends_is_refused_and_a_number_of_steps_is_not():
    run = loader(token_set([4] * 1000, [4]), [1e-9, 1])
    assert run.batch(0).sample_ids == (1000,) * 4
    with pytest.raises(
        ConfigError, match=r"until each set was seen 1 time there are about 1,000,000,001,000 sequences, .* weight of a"
    ):
        run.steps_in_epoch(0)
    small = loader(token_set([4], [4] * 1000), [1e-9, 1])
    with pytest.raises(ConfigError, match=r"there are about 1,000,000,001 sequences, .* weight of a"):
        small.steps_in_epoch(0)


def test_whole_epochs_are_counted_up_to_a_number_of_sequences(monkeypatch) -> None:
    run = loader(token_set([4] * 10, [4] * 3), [3, 1])  # 10 / 3 x 4 = 13.3 sequences an epoch
    assert run.mixed is not None
    monkeypatch.setattr("dist_lora.data.mixture._MAX_SEQUENCES", 13)
    with pytest.raises(ConfigError, match=r"until each set was seen 1 time there are about 13 sequences"):
        run.mixed.end_of(1)
    monkeypatch.setattr("dist_lora.data.mixture._MAX_SEQUENCES", 14)
    assert run.mixed.end_of(1) == 13
    with pytest.raises(ConfigError, match=r"until each set was seen 2 times there are about 27 sequences"):
        run.mixed.end_of(2)


def test_a_simulation_has_full_sequences_whatever_sets_its_config_has():
    sets = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    config = Config.model_validate(
        {
            "run": "it",
            "model": {"name": "3.2-1b"},
            "data": {"train": sets},
            "train": {"global_batch": 3, "micro_batch": 1},
        }
    )
    made = full_batches(config, World.alone())
    assert made.mixed is None and made.batch(0).tokens == 3 * 2048
