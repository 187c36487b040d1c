"""A Guard's verdicts on held-out samples, from the logits of the first token after each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_lora.base.llama import Llama
from dist_lora.data.guard import categories_in
from dist_lora.data.guard_ids import first_ids
from dist_lora.data.loader import MicroBatch
from dist_lora.data.prefetch import on_device
from dist_lora.data.token_set import TokenSet
from dist_lora.evaluation.evaluate import never_stop
from dist_lora.evaluation.verdicts import Sample
from dist_lora.world.world import World

# N samples, D documents of a micro-batch, V vocabulary


@dataclass(frozen=True)
class HeldOutVerdicts:
    """What is true of a held-out set, read from its tokens."""

    samples: tuple[Sample, ...]
    starts: np.ndarray  # int64 (N,): where each document's verdict begins in it
    places: dict[int, int]  # a document's row in the source: its place among the samples


def read_verdicts(tokens: TokenSet, *, tokenizer: Any) -> HeldOutVerdicts:
    """The verdict of each document of a set of format guard, with its categories by name."""
    samples, starts = [], []
    for index in range(len(tokens)):
        ids, is_target = tokens.document(index)
        start = int(np.argmax(is_target))
        starts.append(start)
        prompt, verdict = (_text(part, tokenizer) for part in (ids[:start], ids[start:]))
        names = categories_in(prompt)
        codes = verdict.partition("\n")[2].partition("<|eot_id|>")[0].split(",")
        violated = tuple(names[int(code[1:]) - 1] for code in codes if code)
        samples.append(Sample(tuple(names), violated))
    places = {int(row): place for place, row in enumerate(tokens.sample_ids)}
    assert len(places) == len(samples), f"{len(samples)} documents of {len(places)} records: a form is one too many"
    return HeldOutVerdicts(tuple(samples), np.array(starts, np.int64), places)


def _text(ids: np.ndarray, tokenizer: Any) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@torch.no_grad()
def verdict_margins(
    model: Llama,
    batches: Iterable[MicroBatch],
    *,
    held_out: HeldOutVerdicts,
    tokenizer: Any,
    logits: Callable[[MicroBatch, Tensor], Tensor],
    world: World,
    check_stop: Callable[[], None] = never_stop,
) -> np.ndarray:
    """The logit of unsafe less that of safe at each sample's first verdict token, float64 ``(N,)``. All ranks call it.

    Each sample is computed by one rank, and the batches don't depend on the number of ranks: nor do the margins.

    Args:
        logits: gives those ``(D, V)`` of some tokens' next ones, by their places in a micro-batch.
        check_stop: see ``evaluate.held_out_loss``.
    """
    was_training = model.training
    model.eval()
    safe, unsafe = first_ids(tokenizer)
    margins = torch.zeros(len(held_out.samples), dtype=torch.float64, device=world.device)
    try:
        for batch in on_device(batches, world.device):
            check_stop()
            places = [held_out.places[row] for row in batch.sample_ids]
            ends = np.array(batch.bounds[: len(places)], np.int64) + held_out.starts[places] - 1  # of the prompts
            # A rank without documents computes a row too: a sharded base is gathered by all.
            found = logits(batch, torch.tensor(ends.tolist() or [0], device=world.device)).double()
            if places:
                margins[places] = found[:, unsafe] - found[:, safe]
            world.progress.advance()
    finally:
        model.train(was_training)
    world.sum(margins)
    return margins.cpu().numpy()
