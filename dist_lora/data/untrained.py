"""Tokens that the data need and the base was never trained on: found before the training.

A base model has rows for tokens that its pretraining never used; all of them are zero, or equal as they were
initialized. The adapters leave embedding and head frozen, so the model can't learn to read or write such a token: it
can't distinguish it from the others, and an answer that should end in one never ends. ``lora.train_tokens`` trains their rows.
Looked at are the tokens that a tokenizer has beside its text's own: special ones, and others that were added.

Letters: N documents, T tokens, V rows of the vocabulary, D model width.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dist_lora.base.index import WeightIndex
from dist_lora.base.stored_shape import EMBEDDING, HEAD
from dist_lora.base.stream import read_rows
from dist_lora.data.template import added_ids
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
    """Ids of some tokens in a data set: those with a token after them, and those that are targets."""

    read: tuple[int, ...]
    written: tuple[int, ...]


def check_special_tokens(
    token_set: TokenSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    index: WeightIndex,
    is_tied: bool,
    on_untrained: Literal["error", "allow"],
    trained: Sequence[int] = (),
    world: World,
) -> None:
    """Refuse, or warn of, training on tokens that the base was never trained on. All ranks call it.

    The first rank reads the data once and the rows of these tokens, a few MB, on behalf of all ranks.

    Args:
        is_tied: the head is the embedding.
        trained: ids of ``lora.train_tokens``: nothing is wrong with their rows, but one that no sample has is a warning.
        on_untrained: the setting ``data.untrained_tokens``.

    Raises:
        DataError: there are such tokens, all named.
        WeightsError: the base's file can't be read.
    """

    def check() -> None:
        names = {number: name for name, number in added_ids(tokenizer).items()}
        used = tokens_in_use(token_set, ids=sorted({*names, *trained}), vocab=index.tensors[EMBEDDING].shape[0])
        faults = _faults(used, names, index=index, is_tied=is_tied, trained=trained)
        if faults and on_untrained == "error":
            raise DataError(_refusal(faults))
        for fault in [fault for of_token in faults.values() for fault in of_token]:
            log.warning(f"data.untrained_tokens: allow: training although {fault}")
        unused = [number for number in trained if number not in {*used.read, *used.written}]
        if unused:
            named = first_few([f"{tokenizer.convert_ids_to_tokens(number)} ({number})" for number in unused])
            log.warning(f"lora.train_tokens: no sample of data.train has {named}: nothing teaches what it means")

    world.on_first("the tokens of data.train", check)


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


def _faults(
    used: TokensInUse, names: dict[int, str], *, index: WeightIndex, is_tied: bool, trained: Sequence[int]
) -> dict[str, list[str]]:
    """Sentences for each token by its name, one for each tensor: "its row of lm_head.weight is zero"."""
    parts = [(EMBEDDING, used.read)]
    parts.append((EMBEDDING if is_tied else HEAD, used.written))
    faults: dict[tuple[str, str], str] = {}  # in order, each once: a tied row is checked twice
    for tensor, of_part in parts:
        wanted = [number for number in of_part if number not in trained]
        if not wanted:
            continue
        # A row is compared with the others, so all special tokens' rows are read.
        rows = _bytes_of_rows(index, tensor, [number for number in names if number < index.tensors[tensor].shape[0]])
        counts = Counter(rows.values())
        for number in wanted:
            token = f"{names[number]} ({number})"
            if rows[number] == b"":
                faults[names[number], tensor] = f"{token}: its row of {tensor} is zero"
            elif counts[rows[number]] > 1:
                alike = [names[other] for other, row in rows.items() if row == rows[number] and other != number]
                faults[names[number], tensor] = f"{token}: its row of {tensor} is also that of {first_few(alike)}"
    by_token: dict[str, list[str]] = {}
    for (name, _), fault in faults.items():
        by_token.setdefault(name, []).append(fault)
    return by_token


def _bytes_of_rows(index: WeightIndex, tensor_name: str, ids: Sequence[int]) -> dict[int, bytes]:
    """The bytes of rows ``(D,)`` of a tensor on disk by row number; empty if the row is zero or close to it."""
    numbers = sorted(ids)
    rows = read_rows(index.tensors[tensor_name], numbers)
    is_zero = (rows.float().abs().amax(dim=1) <= NEAR_ZERO).tolist()
    content = rows.view(torch.uint8).numpy()
    return {number: b"" if is_zero[i] else content[i].tobytes() for i, number in enumerate(numbers)}


def _refusal(faults: Mapping[str, Sequence[str]]) -> str:
    listed = "".join(f"\n  {fault}" for of_token in faults.values() for fault in of_token)
    return (
        f"data.train needs tokens that this base was never trained on:{listed}\n"
        "The rows of embedding and head stay frozen beside the adapters, so the model can't learn to read these tokens or to end an "
        f"answer with them. Train their rows too: lora.train_tokens: {json.dumps(list(faults), ensure_ascii=False)}; or "
        "use the model's Instruct version (like model.name: 3.1-8b-instruct); or train on plain text, which "
        "ends in <|end_of_text|> (data.format: text or prompt-completion); or set a data.chat_template without these "
        "tokens. To train anyway: data.untrained_tokens: allow"
    )
