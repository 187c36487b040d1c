"""Text of messages."""

from __future__ import annotations

import pytest

from dist_lora.text import duration, without_cpp_stack


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


def test_a_duration_is_as_a_person_says_it() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]
