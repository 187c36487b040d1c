"""Which rank ended a run, of those that failed."""

from __future__ import annotations

import signal

import pytest

from dist_lora.supervision.local_ranks import EXIT_LOST_PEER, cause_of

KILLED, ABORTED = -signal.SIGKILL, -signal.SIGABRT


@pytest.mark.parametrize(
    ("failed", "cause"),
    [
        ({1: 2}, 1),
        ({0: EXIT_LOST_PEER, 1: KILLED}, 1),
        ({0: KILLED, 1: 1}, 0),  # the first to end
        ({0: ABORTED, 1: 1}, 1),  # NCCL's watchdog aborts a rank whose collective another has left
        ({2: EXIT_LOST_PEER, 0: ABORTED}, 0),
        ({1: EXIT_LOST_PEER, 0: EXIT_LOST_PEER}, 1),
    ],
)
def test_the_rank_that_ended_the_run_is_not_one_that_noticed_it(failed: dict[int, int], cause: int) -> None:
    assert cause_of(failed) == cause
