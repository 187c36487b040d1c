"""A run that is killed at random instants and started again ends with the bytes of one that nothing killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.kills import Hunt, Tally
from tests.e2e.points import INSIDE

KILLS = 20


def hunted(config: Path, folder: Path, **settings: object) -> Tally:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown where the test fails
    hunt = Hunt(folder, config, seed=seed, **settings)  # type: ignore[arg-type]
    try:
        return hunt.run(KILLS)
    finally:
        hunt.close()


def test_a_run_that_is_killed_twenty_times_is_the_run_that_nothing_killed(config, tmp_path) -> None:
    tally = hunted(config, tmp_path)
    assert tally.kills.total() == KILLS
    assert {where for where, _ in tally.kills} >= {*INSIDE, "time"}
    assert tally.repeated > 0


@pytest.mark.slow
def test_so_is_a_run_under_zero3(config, tmp_path) -> None:
    assert hunted(config, tmp_path, engine="zero3").kills.total() == KILLS
