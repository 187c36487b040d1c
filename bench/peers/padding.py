"""Batches as peers take them: rows of one length."""

from __future__ import annotations

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def padded(documents: list[tuple[list[int], list[int]]]) -> Batch:
    """Ids, labels and mask ``(documents, longest)``; no mask where all are of one length."""
    longest = max(len(ids) for ids, _ in documents)
    batch = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in documents]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in documents]),
    }
    if any(len(ids) < longest for ids, _ in documents):
        batch["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in documents])
    return batch
