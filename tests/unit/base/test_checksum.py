"""A number for each frozen tensor that any changed byte changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lora.base.checksum import check_untouched, checksums
from dist_lora.errors import WeightsError


def number(tensor: torch.Tensor) -> int:
    return checksums([("t", tensor)])["t"]


def by_hand(content: bytes) -> int:
    """The same sum in Python's integers: words of 8 bytes, then single bytes, each times an odd number of its place."""
    whole = len(content) // 8
    words = [int.from_bytes(content[8 * i : 8 * i + 8], "little", signed=True) for i in range(whole)]
    values = words + list(content[8 * whole :])
    return (sum(((i * 0x5851F42D4C957F2D) | 1) * value for i, value in enumerate(values)) + len(content)) % 2**64


@given(st.binary(max_size=200))
def test_it_is_the_sum_that_its_words_say(content: bytes) -> None:
    assert number(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)) == by_hand(
        content
    )


@given(st.binary(min_size=1, max_size=100), st.data())
def test_any_flipped_bit_changes_it(content: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    first, second = (torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in (content, changed))
    assert number(first) != number(second)


def test_chunks_and_alignment_do_not_matter(monkeypatch) -> None:
    values = torch.randn(1001)
    whole = number(values)
    assert number(torch.cat([torch.zeros(1), values])[1:]) == whole  # begins in the middle of a word
    monkeypatch.setattr("dist_lora.base.checksum._CHUNK_WORDS", 7)
    assert number(values) == whole == by_hand(values.numpy().tobytes())


def test_exchanged_rows_and_bf16_nans_show() -> None:
    values = torch.arange(64, dtype=torch.float32).view(8, 8)
    assert number(values) != number(values.flip(0))
    nan = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert number(nan) != number(nan.flip(0))


def test_changed_tensors_are_named() -> None:
    before = checksums((f"w{i}", torch.full((4,), float(i))) for i in range(9))
    check_untouched(before, dict(before))
    after = {name: value + (name != "w3") for name, value in before.items()}
    with pytest.raises(
        WeightsError, match=r"8 of 9 tensors of this rank .*: w0, w1, w2, w4, w5 and 3 more\. "
    ) as raised:
        check_untouched(before, after)
    assert raised.value.exit_code == 4
