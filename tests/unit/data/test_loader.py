"""Batches: each sample once an epoch, the same steps on every rank, labels that fit their tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lora.data.loader import EvalBatches, Loader, deal
from dist_lora.data.token_set import TokenSet


def token_set(lengths, *, sample_ids=None) -> TokenSet:
    """Document i holds the ids 100 i, 100 i + 1, ...; its odd places and its first token are targets."""
    lengths = np.array(lengths, np.int64)
    ids = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint32)
    is_target = np.concatenate([np.arange(n) % 2 == 1 for n in lengths])
    starts = np.cumsum(lengths) - lengths
    is_target[starts] = True
    num_targets = np.array([int((np.arange(1, n) % 2 == 1).sum()) for n in lengths])
    sample_ids = np.arange(len(lengths)) if sample_ids is None else np.array(sample_ids)
    return TokenSet(ids, is_target, starts, lengths, num_targets, sample_ids)


def loaders(tokens, *, world_size, packing=True, global_batch=4, micro_batch=1, seed=0, sequence_length=16):
    return [
        Loader(
            tokens,
            sequence_length=sequence_length,
            packing=packing,
            global_batch=global_batch,
            micro_batch=micro_batch,
            seed=seed,
            world_rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


def seen(batches):
    return sorted(i for batch in batches for micro in batch.micro_batches for i in micro.sample_ids)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", range(1, 10))
@pytest.mark.parametrize(("global_batch", "micro_batch"), [(4, 1), (3, 2), (16, 2)])
def test_each_sample_once_an_epoch_and_the_same_passes_on_all_ranks(
    num_samples, world_size, packing, global_batch, micro_batch
):
    tokens = token_set([2 + 3 * i % 7 for i in range(num_samples)])
    ranks = loaders(tokens, world_size=world_size, packing=packing, global_batch=global_batch, micro_batch=micro_batch)
    for epoch in range(2):
        in_epoch = []
        num_steps = ranks[0].steps_in_epoch(epoch)
        for step in range(epoch * num_steps, (epoch + 1) * num_steps):
            batches = [rank.batch(step) for rank in ranks]
            in_epoch += batches
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            assert seen(batches) == sorted(batches[0].sample_ids)
            assert {batch.epoch for batch in batches} == {epoch}
            targets = sum(len(micro.labels) for batch in batches for micro in batch.micro_batches)
            assert targets == batches[0].target_tokens > 0
            held = [micro for batch in batches for micro in batch.micro_batches if micro.sample_ids]
            assert sum(len(micro.ids) for micro in held) == batches[0].tokens
            # A token attends to those of its document up to itself.
            assert {int(sum((micro.positions + 1).sum() for micro in held))} == {batch.pairs for batch in batches}
        assert seen(in_epoch) == list(range(num_samples))


@pytest.mark.parametrize("packing", [True, False])
def test_what_a_step_learns_does_not_depend_on_the_number_of_ranks(packing):
    tokens = token_set(np.random.default_rng(0).integers(2, 16, 50))
    for step in (0, 3, 17, 40):
        alone = loaders(tokens, world_size=1, packing=packing, seed=3)[0].batch(step)
        for world_size in (2, 3):
            together = [rank.batch(step) for rank in loaders(tokens, world_size=world_size, packing=packing, seed=3)]
            assert seen(together) == seen([alone])
            assert {batch.sample_ids for batch in together} == {alone.sample_ids}
            assert {batch.target_tokens for batch in together} == {alone.target_tokens}


def test_labels_are_the_tokens_that_follow_and_documents_stand_apart():
    tokens = token_set([5, 3, 2], sample_ids=[7, 8, 9])
    (loader,) = loaders(tokens, world_size=1, global_batch=1, micro_batch=1, sequence_length=10)
    (micro,) = loader.batch(0).micro_batches
    assert micro.sample_ids == (7, 8, 9)
    assert micro.ids.tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 200, 201]
    assert micro.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert micro.starts.tolist() == [0, 5, 8, 10]
    assert micro.target_index.tolist() == [0, 2, 5, 8]
    assert micro.labels.tolist() == [1, 3, 101, 201]
    assert {micro.ids.dtype, micro.positions.dtype, micro.target_index.dtype, micro.labels.dtype} == {torch.int64}
    assert micro.starts.dtype == torch.int32


@given(
    st.lists(st.integers(2, 16), min_size=1, max_size=30),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_target_but_first_tokens_is_learned_in_its_document(lengths, micro_batch, packing, seed):
    tokens = token_set(lengths)
    (loader,) = loaders(tokens, world_size=1, packing=packing, micro_batch=micro_batch, seed=seed)
    learned = []
    for step in range(loader.steps_in_epoch(0)):
        for micro in loader.batch(step).micro_batches:
            bounds = micro.starts.tolist()
            assert bounds[0] == 0 and bounds[-1] == len(micro.ids) == len(micro.positions)
            assert micro.positions.tolist() == [i for a, b in itertools.pairwise(bounds) for i in range(b - a)]
            assert micro.labels.tolist() == micro.ids[micro.target_index + 1].tolist()
            assert (micro.positions[micro.target_index + 1] == micro.positions[micro.target_index] + 1).all()
            learned += micro.labels.tolist()
    assert sorted(learned) == sorted(100 * i + place for i, n in enumerate(lengths) for place in range(1, n, 2))


def test_any_step_is_the_same_asked_first_or_in_turn():
    tokens = token_set(np.random.default_rng(1).integers(2, 16, 40))
    in_turn = loaders(tokens, world_size=2, micro_batch=2)[1]
    batches = [in_turn.batch(step) for step in range(30)]
    for step in (29, 0, 13):
        at_once = loaders(tokens, world_size=2, micro_batch=2)[1].batch(step)
        assert at_once.sample_ids == batches[step].sample_ids
        for one, other in zip(at_once.micro_batches, batches[step].micro_batches, strict=True):
            assert one.sample_ids == other.sample_ids and one.ids.tolist() == other.ids.tolist()


def test_epochs_and_seeds_have_their_own_order():
    tokens = token_set([4] * 20)
    orders = {
        tuple(i for step in steps for i in loaders(tokens, world_size=1, seed=seed)[0].batch(step).sample_ids)
        for seed, steps in ((0, range(2)), (0, range(2, 4)), (1, range(2)), (-1, range(2)))
    }
    assert len(orders) == 4


def test_the_order_of_a_seed_never_changes():
    """Frozen: another order would make a resumed run repeat samples."""
    (loader,) = loaders(token_set([4] * 8), world_size=1, packing=False, global_batch=8, seed=5)
    assert [loader.batch(step).sample_ids for step in range(2)] == FROZEN


FROZEN = [(2, 4, 3, 1, 5, 0, 6, 7), (7, 4, 5, 1, 6, 0, 2, 3)]


@given(st.lists(st.integers(2, 16), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_step_is_located_as_by_counting(lengths, global_batch, seed):
    (loader,) = loaders(token_set(lengths), world_size=1, global_batch=global_batch, seed=seed)
    counted = [(epoch, index) for epoch in range(3) for index in range(loader.steps_in_epoch(epoch))]
    assert [loader.locate(step) for step in range(len(counted))] == counted
    for step, (epoch, _) in enumerate(counted):
        assert loader.batch(step).epoch == epoch
    for epoch in range(3):
        steps = [step for step, (of, _) in enumerate(counted) if of == epoch]
        assert sorted(i for step in steps for i in loader.batch(step).sample_ids) == list(range(len(lengths)))


def test_a_step_after_millions_of_samples_is_asked_for_directly(monkeypatch):
    tokens = token_set([4] * 100)
    (loader,) = loaders(tokens, world_size=1)
    plans = []
    monkeypatch.setattr(loader, "_plan_of", lambda epoch, plan=loader._plan_of: plans.append(epoch) or plan(epoch))
    step = 7 * 1_000_000 + 3
    assert loader.locate(step) == (1_000_000, 3)
    assert loader.batch(step).epoch == 1_000_000
    assert plans == [1_000_000]


class Counting:
    """A file's array that counts what is read of it."""

    def __init__(self, values):
        self.values, self.num_read = values, 0

    def __getitem__(self, wanted):
        found = self.values[wanted]
        self.num_read += len(found)
        return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_million_samples_are_skipped_without_being_read(packing):
    lengths = np.full(1_000_000, 4)
    ids, is_target = Counting(np.arange(lengths.sum(), dtype=np.uint32)), Counting(np.ones(lengths.sum(), bool))
    tokens = TokenSet(ids, is_target, np.cumsum(lengths) - lengths, lengths, lengths - 1, np.arange(len(lengths)))
    ranks = loaders(tokens, world_size=2, packing=packing, global_batch=8)
    last = ranks[0].steps_in_epoch(0) - 1
    batches = [rank.batch(last) for rank in ranks]
    assert len(batches[0].sample_ids) == (32 if packing else 8)
    assert seen(batches) == sorted(batches[0].sample_ids)
    assert ids.num_read == is_target.num_read == batches[0].tokens


def test_dealing_balances_counts_and_tokens():
    assert deal([9, 1, 1, 9, 5], world_size=2) == [[0, 4], [1, 2, 3]]
    assert deal([3], world_size=3) == [[0], [], []]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5))
def test_dealing_gives_each_sequence_to_one_rank(tokens, world_size):
    hands = deal(tokens, world_size=world_size)
    assert sorted(itertools.chain(*hands)) == list(range(len(tokens)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    loads = [sum(tokens[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= 2 * max(tokens)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 7])
def test_evaluation_sees_each_document_once_in_passes_that_ranks_do_not_change(num_samples, world_size, packing):
    tokens = token_set([3 + i for i in range(num_samples)])
    cut = {"micro_batch": 1, "sequence_length": 16, "packing": packing}
    alone = list(EvalBatches(tokens, **cut, world_rank=0, world_size=1))
    ranks = [EvalBatches(tokens, **cut, world_rank=rank, world_size=world_size) for rank in range(world_size)]
    passes = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(of) for of in passes]
    assert len({len(of) for of in passes}) == 1
    real = sorted((micro.sample_ids, micro.labels.tolist()) for of in passes for micro in of if micro.sample_ids)
    assert real == sorted((micro.sample_ids, micro.labels.tolist()) for micro in alone)
    assert sorted(i for ids, _ in real for i in ids) == list(range(num_samples))
    assert sum(len(micro.labels) for of in passes for micro in of) == ranks[0].target_tokens


def test_evaluation_packs_only_where_the_training_does():
    tokens = token_set([3, 4, 5, 6, 7])
    passes = {
        packing: [micro.sample_ids for micro in EvalBatches(
            tokens, micro_batch=2, sequence_length=12, packing=packing, world_rank=0, world_size=1)]
        for packing in (True, False)
    }  # fmt: skip
    assert passes == {True: [(4, 2, 3, 1), (0,)], False: [(0, 1), (2, 3), (4,)]}


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_that_stops_at_any_step_goes_on_with_the_samples_that_follow(packing):
    """64 samples, 3 epochs, the last step of each smaller; whoever goes on does so on other ranks."""
    tokens = token_set(np.random.default_rng(2).integers(2, 17, 64))

    def samples(steps, world_size):
        ranks = loaders(tokens, world_size=world_size, packing=packing, global_batch=5, micro_batch=2, seed=9)
        of_steps = []
        for step in steps:
            batches = [rank.batch(step) for rank in ranks]
            assert seen(batches) == sorted(batches[0].sample_ids)
            of_steps.append(batches[0].sample_ids)
        return of_steps

    num_steps = 3 * loaders(tokens, world_size=1, packing=packing, global_batch=5)[0].steps_in_epoch(0)
    whole = samples(range(num_steps), 2)
    assert sorted(itertools.chain(*whole)) == sorted(3 * list(range(64)))
    assert len(whole[num_steps // 3 - 1]) < len(whole[0]), "no step is smaller"
    for stop in range(num_steps + 1):
        assert samples(range(stop), 2) + samples(range(stop, num_steps), 1 + stop % 3) == whole
