"""Checksums of a rank's frozen tensors, which prove that a run didn't change them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_lora.errors import WeightsError
from dist_lora.text import first_few

_WORD_BYTES = 8
_CHUNK_WORDS = 2**20
_MULTIPLIER = 0x5851F42D4C957F2D  # odd, its bits well mixed (Knuth's MMIX)


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A 64-bit checksum of each named local tensor, over every byte and its position.

    A sum, modulo 2^64, of the tensor's 8-byte words, each times an odd multiplier that depends on its position: any
    single changed bit changes it, and so does a swap of two words, almost surely. It is computed on the tensor's
    device, so that a shard on a GPU stays there; it takes 24 MiB more at peak. Local: no communication.
    """
    return {name: _checksum(tensor) for name, tensor in tensors}


def check_untouched(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raise ``WeightsError``, naming the tensors, where a part of the frozen base isn't as it was loaded."""
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        raise WeightsError(
            f"the frozen base changed during the run: {len(changed):,} of {len(before):,} tensors of this rank aren't "
            f"as they were loaded: {first_few(changed)}. Memory or a library is at fault, and the adapters were "
            "trained on a damaged base: check the machine, and resume from an earlier checkpoint."
        )


def _checksum(tensor: Tensor) -> int:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = content.numel() // _WORD_BYTES
    words = content[: num_words * _WORD_BYTES]
    if words.storage_offset() % _WORD_BYTES:
        words = words.clone()  # to view them as 8-byte words, they must be aligned
    total = 0
    for first in range(0, num_words, _CHUNK_WORDS):
        chunk = words[first * _WORD_BYTES : (first + _CHUNK_WORDS) * _WORD_BYTES].view(torch.int64)
        total += _weighted_sum(chunk, first)
    rest = content[num_words * _WORD_BYTES :]
    total += _weighted_sum(rest.to(torch.int64), num_words) + content.numel()
    return total % 2**64


def _weighted_sum(words: Tensor, first: int) -> int:
    # int64 wraps around: products and sums are exact modulo 2^64.
    multipliers = torch.arange(first, first + words.numel(), device=words.device, dtype=torch.int64)
    multipliers.mul_(_MULTIPLIER - 2**64 if _MULTIPLIER >= 2**63 else _MULTIPLIER).bitwise_or_(1)
    return int(multipliers.mul_(words).sum()) if words.numel() else 0
