"""How far long work has come, and how long it still takes."""

from __future__ import annotations

import re

import pytest

from dist_lora import pace as module
from dist_lora.pace import pace
from dist_lora.text import size


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that the clock shows."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_with_a_clock_says_what_is_left_now_and_then(clock, caplog) -> None:
    caplog.set_level("INFO", "dist_lora")
    with pace("loading the base", unit=size) as advance:
        for seconds, done in ((5, 2**30), (11, 2 * 2**30), (12, 3 * 2**30), (22, 4 * 2**30), (90, 8 * 2**30)):
            clock[0] = 100.0 + seconds
            advance(done, 8 * 2**30)
    texts = [record.message for record in caplog.records]
    assert all(re.match(r"[0-2][0-9]:[0-5][0-9]:[0-5][0-9]  ", text) for text in texts)
    assert [text[10:] for text in texts] == [
        "loading the base: 2.00 GiB of 8.00 GiB (25%), about 33 s left",
        "loading the base: 4.00 GiB of 8.00 GiB (50%), about 22 s left",
    ]


def test_a_rank_that_does_not_report_shows_nothing(clock, caplog) -> None:
    caplog.set_level("INFO", "dist_lora")
    with pace("evaluating", is_shown=False) as advance:
        clock[0] += 60
        advance(1, 2)
    assert not caplog.records


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch, capsys) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pace("merging", unit=size) as advance:
        advance(2**30, 2**31)
    shown = capsys.readouterr().err
    assert "merging" in shown and "1.00 GiB of 2.00 GiB" in shown and "left" in shown
