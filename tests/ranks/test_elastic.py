"""A checkpoint goes on under any engine, number of ranks and placement: pairs of settings here, all where there is time."""

from __future__ import annotations

import pytest

from tests.ranks.elastic import Elastic, Move, all_moves, placements
from tests.ranks.matrix import ADAPTER_TOLERANCE, TOLERANCE, pairwise


@pytest.fixture(scope="module")
def elastic(ranks, tiny_llama, tmp_path_factory) -> Elastic:
    return Elastic(tmp_path_factory.mktemp("elastic"), tiny_llama("llama31"), ranks)


def assert_equal(elastic: Elastic, move: Move) -> None:
    moved = elastic.move(move)
    assert moved.losses < TOLERANCE and moved.norms < TOLERANCE and moved.adapters < ADAPTER_TOLERANCE, (move, moved)
    assert moved.rates_are_equal, move
    assert moved.is_bit_for_bit or move.saved != move.gone_on, (move, moved)


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("move", pairwise(all_moves()), ids=lambda m: f"{m.base}: {m.saved} -> {m.gone_on}")
def test_each_pair_of_settings_goes_on_to_the_numbers_of_the_run_that_stayed(elastic, move) -> None:
    assert_equal(elastic, move)


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_run_that_goes_on_where_it_was_saved_has_the_bytes_of_one_that_nothing_interrupted(elastic, engine) -> None:
    for placement in placements():
        if (placement.engine, placement.world) == (engine, "3"):
            assert_equal(elastic, Move("nf4", *vars(placement).values(), *vars(placement).values()))


@pytest.mark.turn(of=18)
@pytest.mark.parametrize("saved", placements(), ids=str)
def test_all_placements_go_on_to_the_numbers_of_the_run_that_stayed(elastic, saved) -> None:
    moves = [move for move in all_moves() if move.base == "nf4" and move.saved == saved]
    assert len(moves) == len(placements())
    for move in moves:
        assert_equal(elastic, move)
