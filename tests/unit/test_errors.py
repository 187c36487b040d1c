"""Exit codes: whose mistake an error is."""

from __future__ import annotations

import errno
import os

import pytest

from dist_lora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DistLoraError,
    RankError,
    SaveError,
    StopNow,
    WeightsError,
    cannot_write,
    exit_code_of,
)


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EEXIST", "ENAMETOOLONG"])
def test_a_place_that_can_never_be_written_is_the_users_mistake(name: str) -> None:
    error = cannot_write("runs: can't be written", refused(getattr(errno, name)))
    assert isinstance(error, SaveError) and exit_code_of(error) == 2
    assert str(error) == "runs: can't be written"


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ESTALE"])
def test_a_full_or_faulty_disk_is_not_the_users_mistake(name: str) -> None:
    assert exit_code_of(cannot_write("runs: can't be written", refused(getattr(errno, name)))) == 1


@pytest.mark.parametrize("kind", [AdapterError, WeightsError, CheckpointError])
def test_a_file_that_this_user_may_not_read_is_not_damaged(kind: type[DistLoraError]) -> None:
    for number, code in ((errno.EACCES, 2), (errno.EIO, 4)):
        inner, outer = kind("a file can't be read"), kind("the folder can't be read")
        inner.__cause__, outer.__cause__ = refused(number), inner
        assert exit_code_of(outer) == code, "through whatever has passed it on"
    assert exit_code_of(kind("damaged")) == 4


def test_other_errors_have_the_code_of_their_kind() -> None:
    errors = (ConfigError("x"), RankError("x", exit_code=3), StopNow("x"), ValueError("x"))
    assert [exit_code_of(error) for error in errors] == [2, 3, 75, 1]
