"""Proof that what is frozen stays so: a number for each local tensor, of all of its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_lora.errors import WeightsError
from dist_lora.text import first_few

_WORD_BYTES = 8
_CHUNK_WORDS = 2**20
_MULTIPLIER = 0x5851F42D4C957F2D  # odd, its bits well mixed (Knuth's MMIX)


def checksums(shares: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A 64-bit number for each named local tensor, made of every byte and its place.

    A sum, modulo 2^64, of the tensor's 8-byte words, each times an odd number of its place: any single changed
    bit changes it, and so does an exchange of two words, nearly surely. It is computed where the tensor lies, so that
    a shard on a GPU stays there; peak memory is 24 MiB beside it. Local: no communication.
    """
    return {name: _checksum(tensor) for name, tensor in shares}


def check_untouched(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raise ``WeightsError``, naming the tensors, where a part of the frozen base is not as it was filled."""
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        raise WeightsError(
            f"the frozen base was changed while the run went on: {len(changed):,} of {len(before):,} tensors of this "
            f"rank are not as they were filled: {first_few(changed)}. Memory or a library is at fault, and the "
            "adapters were trained beside a damaged base: check the machine, and go on from an earlier checkpoint."
        )


def _checksum(tensor: Tensor) -> int:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = content.numel() // _WORD_BYTES
    words = content[: whole * _WORD_BYTES]
    if words.storage_offset() % _WORD_BYTES:
        words = words.clone()  # a view as 8-byte words needs their alignment
    total = 0
    for first in range(0, whole, _CHUNK_WORDS):
        chunk = words[first * _WORD_BYTES : (first + _CHUNK_WORDS) * _WORD_BYTES].view(torch.int64)
        total += _weighed(chunk, first)
    rest = content[whole * _WORD_BYTES :]
    total += _weighed(rest.to(torch.int64), whole) + content.numel()
    return total % 2**64


def _weighed(words: Tensor, first: int) -> int:
    # int64 wraps around: products and sums are exact modulo 2^64.
    places = torch.arange(first, first + words.numel(), device=words.device, dtype=torch.int64)
    places.mul_(_MULTIPLIER - 2**64 if _MULTIPLIER >= 2**63 else _MULTIPLIER).bitwise_or_(1)
    return int(places.mul_(words).sum()) if words.numel() else 0
