"""A run that is killed at random instants and started again ends with the bytes of one that nothing killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.kills import CONFIGS, Hunt, Tally
from tests.e2e.points import INSIDE
from tests.turns import seed_of


def hunted(config: Path, folder: Path, num_kills: int, **settings: object) -> Tally:
    hunt = Hunt(folder, config, seed=seed_of("kills"), **settings)  # type: ignore[arg-type]
    try:
        return hunt.run(num_kills)
    finally:
        hunt.close()


@pytest.mark.slow
def test_a_run_that_is_killed_a_few_times_is_the_run_that_nothing_killed(config, tmp_path) -> None:
    assert hunted(config, tmp_path, 4).kills.total() == 4


@pytest.mark.turn(of=8)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_runs_that_are_killed_twenty_times_wherever_they_are_are_the_run_that_nothing_killed(
    config, tmp_path, engine
) -> None:
    tally = hunted(config, tmp_path, 20, engine=engine)
    assert tally.kills.total() == 20
    assert {where for where, _ in tally.kills} >= {*INSIDE, "time"}
    assert tally.repeated > 0


@pytest.mark.turn(of=8)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("data", ["mixture", "guard", "tokens", "unfrozen"])
def test_whatever_is_trained_is_what_it_would_be_if_nothing_had_killed_it(tiny_llama, tmp_path, engine, data) -> None:
    # A tied head has the embedding's rows.
    tally = hunted(
        CONFIGS[data](tmp_path, tiny_llama("llama32" if data == "tokens" else "llama31")), tmp_path, 5, engine=engine
    )
    assert tally.kills.total() == 5
