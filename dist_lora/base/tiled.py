"""Causal attention on a CPU by matrix products of tiles: for documents of 512 tokens torch's kernel takes 1.4 times as long (torch 2.13).

A tile is some queries of a document, of all heads, with all keys up to the last of these queries. Its scores stay in the
caches; the backward computes them again, so that only query, key and value are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# T tokens of all documents, H query heads, G key and value heads (H is a multiple of G), E width of a head
# N queries of a tile, L keys: those of its document up to its last query

_SCORES, _QUERIES = 2**20, 64  # of a tile, at most; of 32 to 192 queries, 64 were the fastest


def tiled_attention(bounds: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attended values ``(T, H, E)`` of query ``(T, H, E)``, key and value ``(T, G, E)``, within each document of ``bounds``."""
    attended: Tensor = _Tiled.apply(bounds, query, key, value)  # type: ignore[no-untyped-call]
    return attended


def _tiles(bounds: tuple[int, ...], num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each tile."""
    for first, last in zip(bounds, bounds[1:], strict=False):
        start = first
        while start < last:
            step = max(1, min(_QUERIES, _SCORES // (num_heads * (start - first + _QUERIES))))
            stop = min(start + step, last)
            yield slice(start, stop), slice(first, stop)
            start = stop


class _Scratch:
    """Memory for the tiles of one call, one after the other in the same places."""

    def __init__(self, query: Tensor, key: Tensor, tiles: list[tuple[slice, slice]]) -> None:
        self.groups, self.width = key.shape[1], query.shape[2]
        self.per_group = query.shape[1] // self.groups
        self.scale = 1 / math.sqrt(self.width)
        largest = max((_num(q) * _num(k) for q, k in tiles), default=0)
        self._flat = query.new_empty(2, query.shape[1] * largest)
        num_queries = max((_num(q) for q, _ in tiles), default=0)
        self._future = query.new_full((num_queries, num_queries), -math.inf).triu_(1)

    def scores(self, which: int, queries: slice, keys: slice) -> Tensor:
        """``(G, H / G * N, L)``, one of two."""
        rows, columns = self.per_group * _num(queries), _num(keys)
        return self._flat[which, : self.groups * rows * columns].view(self.groups, rows, columns)

    def rows(self, heads: Tensor, queries: slice) -> Tensor:
        """A copy of a tile's heads ``(N, H, E)``, those of one key head together: ``(G, H / G * N, E)``."""
        grouped = heads[queries].view(-1, self.groups, self.per_group, self.width)
        return grouped.permute(1, 2, 0, 3).reshape(self.groups, -1, self.width)

    def write(self, rows: Tensor, heads: Tensor, queries: slice) -> None:
        """The reverse of ``rows``."""
        grouped = rows.view(self.groups, self.per_group, -1, self.width).permute(2, 0, 1, 3)
        heads[queries].view(grouped.shape).copy_(grouped)

    def weights(self, rows: Tensor, keys: Tensor, at: tuple[slice, slice]) -> Tensor:
        """Softmax ``(G, H / G * N, L)`` of the scores of ``rows`` and keys ``(G, E, T)``."""
        queries, seen = at
        scores = self.scores(0, queries, seen)
        torch.baddbmm(scores, rows, keys[:, :, seen], beta=0, alpha=self.scale, out=scores)
        num = _num(queries)
        in_heads = scores.view(self.groups, self.per_group, num, -1)
        in_heads[..., -num:].add_(self._future[:num, :num])
        weights: Tensor = torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        return weights


def _num(part: slice) -> int:
    return int(part.stop - part.start)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bounds: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tiles = list(_tiles(bounds, query.shape[1]))
        scratch = _Scratch(query, key, tiles)
        attended = query.new_empty(query.shape)
        keys, values = key.permute(1, 2, 0), value.transpose(0, 1)
        for queries, seen in tiles:
            weights = scratch.weights(scratch.rows(query, queries), keys, (queries, seen))
            scratch.write(torch.bmm(weights, values[:, seen]), attended, queries)
        ctx.save_for_backward(query, key, value)
        ctx.bounds = bounds
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_attended: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        tiles = list(_tiles(ctx.bounds, query.shape[1]))
        scratch = _Scratch(query, key, tiles)
        d_query = query.new_empty(query.shape)
        d_key, d_value = (heads.new_zeros(scratch.groups, len(heads), scratch.width) for heads in (key, value))
        keys, values = key.permute(1, 2, 0), value.permute(1, 2, 0)
        for queries, seen in tiles:
            rows, d_rows = scratch.rows(query, queries), scratch.rows(d_attended, queries)
            weights = scratch.weights(rows, keys, (queries, seen))
            d_value[:, seen].baddbmm_(weights.transpose(1, 2), d_rows)
            d_weights = torch.bmm(d_rows, values[:, :, seen], out=scratch.scores(1, queries, seen))
            d_scores = torch.ops.aten._softmax_backward_data.out(
                d_weights, weights, -1, weights.dtype, grad_input=d_weights
            )
            torch.baddbmm(d_rows, d_scores, keys.transpose(1, 2)[:, seen], beta=0, alpha=scratch.scale, out=d_rows)
            scratch.write(d_rows, d_query, queries)
            d_key[:, seen].baddbmm_(d_scores.transpose(1, 2), rows, alpha=scratch.scale)
        return None, d_query, d_key.transpose(0, 1), d_value.transpose(0, 1)
