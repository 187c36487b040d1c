"""Counts, figures and times in messages read as a person writes them."""

from __future__ import annotations

import pytest

from dist_lora.text import count, duration, figure, time_range, without_cpp_stack


def test_one_of_a_thing_is_singular() -> None:
    assert [count(n, "rank") for n in (0, 1, 2, 2048)] == ["0 ranks", "1 rank", "2 ranks", "2,048 ranks"]
    assert [count(n, "process is", "processes are") for n in (1, 3)] == ["1 process is", "3 processes are"]


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "0 s"),
        (0.00042, "0.00042 s"),
        (1.25, "1.25 s"),
        (59.96, "1 min"),
        (110, "1 min 50 s"),
        (3599.9, "1 h"),
        (5340, "1 h 29 min"),
        (86_399, "1 d"),
        (5.34e5, "6 d 4 h"),
    ],
)
def test_a_time_is_written_in_two_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_range_of_seconds_names_its_unit_once() -> None:
    assert time_range(1.25, 3.58) == "1.25 to 3.58 s"
    assert time_range(31.7, 110) == "31.7 s to 1 min 50 s"
    assert time_range(1350, 5340) == "22 min 30 s to 1 h 29 min"


@pytest.mark.parametrize(
    "number, expected",
    [
        (0, "0"),
        (5340, "5,340"),
        (1_234_567, "1,230,000"),
        (999.6, "1,000"),
        (89.04, "89"),
        (1.25, "1.25"),
        (4.2e-5, "0.000042"),
    ],
)
def test_a_figure_has_three_digits_and_no_exponent(number: float, expected: str) -> None:
    assert figure(number) == expected


@pytest.mark.parametrize(
    "message, shown",
    [
        ("The client socket has timed out after 60000ms while trying to connect to (a, 1).\n"
         "Exception raised from throwTimeoutError at ../torch/csrc/distributed/c10d/socket.cpp:1029 (most recent call "
         "first):\nframe #0: c10::Error::Error(c10::SourceLocation) + 0x80 (0x7f in libc10.so)\nframe #1: x",
         "The client socket has timed out after 60000ms while trying to connect to (a, 1)."),
        ("NCCL error\nframe #0: c10::Error\nframe #1: main", "NCCL error"),
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:1", "[pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
    ],
)  # fmt: skip
def test_a_stack_of_cpp_is_no_part_of_a_message(message: str, shown: str) -> None:
    assert without_cpp_stack(message) == shown
