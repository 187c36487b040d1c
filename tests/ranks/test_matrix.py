"""Every way to place a run trains the same adapters: pairs of settings here, all of them where there is time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests import turns
from tests.ranks.matrix import (
    ADAPTER_TOLERANCE,
    BASES,
    ENGINES,
    TOLERANCE,
    WORLDS,
    Cell,
    Matrix,
    all_cells,
    is_refused,
    pairwise,
)


@pytest.fixture(scope="module")
def matrix(tiny_llama) -> Iterator[Matrix]:
    made = Matrix(tiny_llama("llama31"))
    yield made
    made.close()


def assert_equal(matrix: Matrix, cell: Cell) -> None:
    outcome = matrix.run(cell)
    assert not outcome.refused, outcome.refused
    losses, norms, adapters = outcome.differs_from(matrix.reference(cell.base))
    assert losses < TOLERANCE and norms < TOLERANCE and adapters < ADAPTER_TOLERANCE, (losses, norms, adapters)


PAIRS = pairwise([c for c in all_cells() if not is_refused(c)])


@pytest.mark.parametrize(
    "cell",
    turns.in_suite(*(cell for cell in PAIRS if cell.engine != "none" and cell.world == "2"), of=PAIRS),
    ids=lambda c: "-".join(map(str, vars(c).values())),
)
def test_each_pair_of_settings_has_the_numbers_of_one_process(matrix, cell) -> None:
    assert_equal(matrix, cell)


@pytest.mark.turn(of=12)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_all_settings_have_the_numbers_of_one_process(matrix, engine, base, world, recompute) -> None:
    place = (engine, base, world, recompute)
    cells = [cell for cell in all_cells() if (cell.engine, cell.base, cell.world, cell.recompute) == place]
    assert len(cells) == len(all_cells()) / 54
    for cell in cells:
        if is_refused(cell):
            assert matrix.run(cell).refused
        else:
            assert_equal(matrix, cell)


def test_every_engine_and_base_runs_somewhere_in_all_settings() -> None:
    ran = {(cell.engine, cell.base) for cell in all_cells() if not is_refused(cell)}
    assert ran == set(itertools.product(ENGINES, BASES))


@pytest.mark.slow
def test_bases_differ_so_that_equal_means_something(matrix) -> None:
    losses = [matrix.reference(base).losses for base in BASES]
    assert all(
        abs(a[0] - b[0]) > 1e-4 for a, b in [(losses[0], losses[1]), (losses[1], losses[2]), (losses[0], losses[2])]
    )


def test_pairs_of_settings_are_each_in_a_chosen_cell() -> None:
    cells = [
        Cell(e, b, w, "node", "replicate", "none", r) for e in "ab" for b in "cd" for w in "ef" for r in (False, True)
    ]
    chosen = pairwise(cells)
    assert len(chosen) < len(cells) / 2
    for first, second in ((0, 1), (0, 2), (1, 2), (0, 6), (1, 6), (2, 6)):
        pairs = {(tuple(vars(c).values())[first], tuple(vars(c).values())[second]) for c in chosen}
        assert len(pairs) == 4
