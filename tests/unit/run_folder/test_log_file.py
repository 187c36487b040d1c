"""A run's log: what its attempts have said, with the time."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from dist_lora.run_folder.log_file import append_to_log, open_log, to_log_file

LOGGER = logging.getLogger("dist_lora")


@pytest.fixture(autouse=True)
def _no_handler_is_left():
    before, level = list(LOGGER.handlers), LOGGER.level
    LOGGER.setLevel(logging.INFO)
    yield
    LOGGER.handlers[:], LOGGER.level = before, level


def test_the_log_has_all_attempts_with_their_times_and_what_another_rank_reports(tmp_path: Path) -> None:
    append_to_log(tmp_path, "before there is a run")
    assert not list(tmp_path.iterdir())
    open_log(tmp_path)
    LOGGER.info("loaded the base")
    to_log_file("step 1/2")
    append_to_log(tmp_path, "error: rank 1 of 2 on gpu-b: out of memory")
    open_log(tmp_path)
    LOGGER.warning("truncated")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = [line[20:] for line in lines]
    assert said[0].startswith("=== dist-lora ") and said[4].startswith("=== dist-lora ")
    assert said[1:4] == ["loaded the base", "step 1/2", "error: rank 1 of 2 on gpu-b: out of memory"]
    assert said[5:] == ["truncated"], "once, though it was opened twice"


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    open_log(tmp_path)
    LOGGER.info("one")
    LOGGER.info("two")
    append_to_log(tmp_path, "three")
    err = capsys.readouterr().err
    assert err.count("log.txt can't be written: [Errno 28] No space left on device") == 1 and "Traceback" not in err
