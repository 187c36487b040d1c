"""What a rank does at its end, besides what ``tests/e2e`` shows of several."""

from __future__ import annotations

import pytest

from dist_lora.errors import ConfigError, StoppedOnRequest
from dist_lora.supervision.run_rank import joined
from tests.ranks.tiny import config_of


@pytest.mark.parametrize("error", [ConfigError("why"), StoppedOnRequest("why"), KeyError("why")])
def test_what_waits_for_a_server_is_closed_once_the_error_is_told(error: Exception) -> None:
    told: list[str] = []

    def fails() -> None:
        told.append("closed")
        raise SystemExit("a signal by which a launcher ends the wait")

    with (
        pytest.raises(SystemExit) as ended,
        joined(None, config_of("unused"), report=lambda error, who: told.append(type(error).__name__)) as world,
    ):
        world.closing.callback(fails)
        raise error
    assert told == [type(error).__name__, "closed"] and ended.value.code == getattr(error, "exit_code", 1)
