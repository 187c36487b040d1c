"""Causal attention over documents packed one after the other into a flat stream; they don't attend to each other.

There is no padding and no mask: the documents' bounds decide which tokens a token attends to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lora.base.tiled import tiled_attention
from dist_lora.layout.choices import AttentionName

# T tokens of all documents, H query heads, G key and value heads (H is a multiple of G), E width of a head


class Attention(Protocol):
    """What a layer calls: which tokens attend to which is decided here, not in the model."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attended values ``(T, H, E)`` of query ``(T, H, E)``, key and value ``(T, G, E)``."""
        ...


@dataclass(frozen=True)
class Documents:
    """Attention within each document of a flat stream.

    ``bounds`` are the documents' first tokens and, last, the number of tokens: ``(0, 5, 12)`` is two documents
    of 5 and 7 tokens. Backends: ``sdpa`` computes document by document, and so does ``sdpa-repeated``, which gives each
    query head its own copy of key and value, and ``tiled`` by matrix products (see ``tiled.py``); ``varlen`` all at once by a flash kernel (CUDA, 16 bits); ``eager``
    materializes the ``(T, T)`` matrix and is for comparison only.

    ``starts`` are the same bounds as an int32 tensor on the device. Without it they are copied there once, when ``varlen`` or
    ``eager`` first needs them: a copy that waits for the device.
    """

    bounds: tuple[int, ...]
    backend: AttentionName = "sdpa"
    starts: Tensor | None = field(default=None, compare=False)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``Attention``."""
        if self.backend == "varlen":
            return self._varlen(query, key, value)
        if self.backend == "eager":
            return self._eager(query, key, value)
        if self.backend == "tiled":
            return tiled_attention(self.bounds, query, key, value)
        if self.backend == "sdpa-repeated":
            key, value = _repeated(key, query), _repeated(value, query)
        # By split, whose backward is one concatenation: a slice's writes a zero for every other token of the stream.
        lengths = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        documents = zip(*(tensor.split_with_sizes(lengths) for tensor in (query, key, value)), strict=True)
        parts = [causal_attention(q, k, v) for q, k, v in documents]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _starts_on(self, device: torch.device) -> Tensor:
        if self.starts is None:
            object.__setattr__(self, "starts", torch.tensor(self.bounds, dtype=torch.int32, device=device))
        assert self.starts is not None
        return self.starts

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        starts = self._starts_on(query.device)
        longest = max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        attended = varlen_attn(
            query, key, value, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=True
        )
        assert isinstance(attended, Tensor)
        return attended

    def _eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        starts = self._starts_on(query.device)
        tokens = torch.arange(self.bounds[-1], dtype=torch.int32, device=query.device)
        document = torch.searchsorted(starts, tokens, right=True)
        is_attended = (document[:, None] == document[None, :]) & (tokens[:, None] >= tokens[None, :])
        key, value = _repeated(key, query), _repeated(value, query)
        scores = torch.einsum("qhe,khe->hqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~is_attended, -math.inf).float().softmax(dim=-1).to(value.dtype)
        return torch.einsum("hqk,khe->qhe", weights, value)


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    """Keys or values ``(T, H, E)``, one head per head of ``query``, of ``(T, G, E)``."""
    groups = query.shape[1] // heads.shape[1]
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one document: ``(T, H, E)`` of query ``(T, H, E)``, key and value ``(T, G, E)``."""
    heads = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    attended = F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.squeeze(0).transpose(0, 1)
