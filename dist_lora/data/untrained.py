"""Special tokens that the data need and the base was never trained on: found before the training.

A base model has rows for tokens that its pretraining never used; all of them are zero, or equal as they were
initialized. The adapters leave embedding and head frozen, so the model can't learn to read or write such a token: it
can't distinguish it from the others, and an answer that should end in one never ends.

Letters: N documents, T tokens, V rows of the vocabulary, D model width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dist_lora.base.index import WeightIndex, open_weights
from dist_lora.base.stored_shape import EMBEDDING, HEAD
from dist_lora.base.stream import SliceReader
from dist_lora.data.template import special_ids
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import DataError
from dist_lora.text import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_lora.world.world import World

NEAR_ZERO = 1e-16
"""A row whose weights are all smaller was never trained: weight decay reduces the initial values to this."""

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class TokensInUse:
    """Ids of special tokens in a data set: those with a token after them, and those that are targets."""

    read: tuple[int, ...]
    written: tuple[int, ...]


def check_special_tokens(
    token_set: TokenSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    index: WeightIndex,
    is_tied: bool,
    on_untrained: Literal["error", "allow"],
    world: World,
) -> None:
    """Refuse, or warn of, training on special tokens that the base was never trained on. All ranks call it.

    The first rank reads the data once and the rows of the special tokens, a few MB, on behalf of all ranks.

    Args:
        is_tied: the head is the embedding.
        on_untrained: the setting ``data.untrained_tokens``.

    Raises:
        DataError: there are such tokens, all named.
        WeightsError: the base's file can't be read.
    """

    def check() -> None:
        names = {number: name for name, number in special_ids(tokenizer).items()}
        used = tokens_in_use(token_set, ids=sorted(names), vocab=index.tensors[EMBEDDING].shape[0])
        faults = _faults(used, names, index=index, is_tied=is_tied)
        if faults and on_untrained == "error":
            raise DataError(_refusal(faults))
        for fault in faults:
            log.warning(f"data.untrained_tokens: allow: training although {fault}")

    world.on_first("the special tokens of data.train", check)


def tokens_in_use(token_set: TokenSet, *, ids: Sequence[int], vocab: int) -> TokensInUse:
    """Which of the tokens ``ids`` the documents use, and how. Reads the data once, in order.

    The last token of a document is not read, since nothing follows it. The first one is not written. Every id is below
    ``vocab`` (``model_limits.check_limits``).
    """
    is_wanted = np.zeros(vocab, bool)
    is_wanted[[number for number in ids if number < vocab]] = True
    is_read, is_written = np.zeros(vocab, bool), np.zeros(vocab, bool)
    order = np.argsort(token_set.starts, kind="stable")
    starts = token_set.starts[order]
    ends = starts + token_set.lengths[order]
    all_ids, is_target = np.asarray(token_set.ids), np.asarray(token_set.is_target)
    for begin, some in token_set.pieces(all_ids):
        positions = begin + np.flatnonzero(is_wanted[some])
        document = np.searchsorted(starts, positions, side="right") - 1
        inside = (document >= 0) & (positions < ends[document])
        positions, document = positions[inside], document[inside]
        is_read[all_ids[positions[positions < ends[document] - 1]]] = True
        is_written[all_ids[positions[is_target[positions] & (positions > starts[document])]]] = True
    return TokensInUse(tuple(np.flatnonzero(is_read).tolist()), tuple(np.flatnonzero(is_written).tolist()))


def _faults(used: TokensInUse, names: dict[int, str], *, index: WeightIndex, is_tied: bool) -> list[str]:
    """A sentence for each token and tensor: "its row of lm_head.weight is zero"."""
    parts = [(EMBEDDING, used.read)]
    parts.append((EMBEDDING if is_tied else HEAD, used.written))
    faults: dict[str, None] = {}  # in order, each once: a tied row is checked twice
    for tensor, wanted in parts:
        if not wanted:
            continue
        # A row is compared with the others, so all special tokens' rows are read.
        rows = _read_rows(index, tensor, [number for number in names if number < index.tensors[tensor].shape[0]])
        counts = Counter(rows.values())
        for number in wanted:
            token = f"{names[number]} ({number})"
            if rows[number] == b"":
                faults[f"{token}: its row of {tensor} is zero"] = None
            elif counts[rows[number]] > 1:
                alike = [names[other] for other, row in rows.items() if row == rows[number] and other != number]
                faults[f"{token}: its row of {tensor} is also that of {first_few(alike)}"] = None
    return list(faults)


def _read_rows(index: WeightIndex, tensor_name: str, ids: Sequence[int]) -> dict[int, bytes]:
    """The bytes of rows ``(D,)`` of a tensor on disk by row number; empty if the row is zero or close to it."""
    tensor = index.tensors[tensor_name]
    rows: dict[int, bytes] = {}
    reader = SliceReader()
    with open_weights(tensor.file) as descriptor:
        for first, count in _runs(sorted(ids)):
            for start, some in reader.slices(tensor, descriptor=descriptor, first_row=first, num_rows=count):
                is_zero = (some.float().abs().amax(dim=1) <= NEAR_ZERO).tolist()
                content = some.view(torch.uint8).numpy()
                rows |= {start + i: b"" if is_zero[i] else content[i].tobytes() for i in range(len(some))}
    return rows


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _refusal(faults: list[str]) -> str:
    listed = "".join(f"\n  {fault}" for fault in faults)
    return (
        f"data.train needs special tokens that this base was never trained on:{listed}\n"
        "Embedding and head stay frozen, so no adapter can teach the model to read them or to end an answer with them. "
        "Use the model's Instruct version (like model.name: 3.1-8b-instruct); or train on plain text, which "
        "ends in <|end_of_text|> (data.format: text or prompt-completion); or set a data.chat_template without these "
        "tokens. To train anyway: data.untrained_tokens: allow"
    )
