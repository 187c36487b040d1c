"""Records that hold token ids already: ``input_ids`` with what is trained on.

What is trained on is said by ``labels`` as in transformers (the ids themselves, -100 where nothing is learned; not shifted), or by a
mask of 0 and 1 as TRL and transformers' ``return_assistant_tokens_mask`` make it. Nothing is added, not even a first or a last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_lora.data.turns import decoded, shown
from dist_lora.errors import DataError

IGNORED = -100
"""A label without a target: ``ignore_index`` of ``torch.nn.functional.cross_entropy`` and of transformers."""

MASKS = ("loss_mask", "assistant_masks", "completion_mask")
COLUMNS = ("input_ids", "labels", *MASKS, "attention_mask", "position_ids")


@dataclass(frozen=True)
class Tokens:
    """Ids of a document, and which of them are targets; None where the record doesn't say."""

    ids: tuple[int, ...]
    is_target: tuple[bool, ...] | None


def read_tokens(record: Mapping[str, Any]) -> Tokens:
    """The ids and targets of a record.

    Raises:
        DataError: ids, labels or a mask are no lists of whole numbers, differ in length, or contradict each other; the record is padded,
            or holds several documents.
    """
    ids = _numbers(record, "input_ids")
    if not ids:
        raise DataError("input_ids is empty")
    if min(ids) < 0:
        raise DataError(f"input_ids[{ids.index(min(ids))}] is {min(ids)}, which is no id")
    given = {name: _numbers(record, name) for name in COLUMNS[1:] if record.get(name) is not None}
    wrong = [f"{name} {len(values):,}" for name, values in given.items() if len(values) != len(ids)]
    if wrong:
        raise DataError(f"input_ids has {len(ids):,} entries and {', '.join(wrong)}; as many are expected")
    _check_whole(given, len(ids))
    said = {name: _mask(given[name], name) for name in MASKS if name in given}
    if "labels" in given:
        said["labels"] = _labelled(given["labels"], ids)
    first = next(iter(said), None)
    for name, is_target in said.items():
        if first is not None and is_target != said[first]:
            at = next(i for i, pair in enumerate(zip(is_target, said[first], strict=True)) if pair[0] != pair[1])
            raise DataError(f"{first} and {name} contradict each other at entry {at}; leave one of them out")
    return Tokens(tuple(ids), None if first is None else said[first])


def targets_of(tokens: Tokens, *, train_on: Literal["assistant", "last", "all"]) -> list[bool]:
    """Which ids are targets, by the record and ``data.train_on``; the first never is.

    Raises:
        DataError: they contradict each other, or neither says it.
    """
    if train_on == "last":
        raise DataError(
            "data.train_on: last: ids don't say where a turn begins. Remove the setting: labels or a mask decide"
        )
    if tokens.is_target is None and train_on == "assistant":
        raise DataError(
            f"input_ids has neither labels nor a mask ({', '.join(MASKS)}) beside it, so what is trained on isn't known. "
            "Add one, or set data.train_on: all"
        )
    if train_on == "all" and tokens.is_target is not None and not all(tokens.is_target[1:]):
        raise DataError(
            f"data.train_on: all, and the record leaves out {tokens.is_target[1:].count(False):,} of {len(tokens.ids):,} tokens. "
            "Remove the setting, or the labels or mask"
        )
    return [False, *([True] * len(tokens.ids) if tokens.is_target is None else tokens.is_target)[1:]]


def check_vocabulary(ids: tuple[int, ...], *, vocab: int) -> None:
    """Raise DataError if an id has no row in a vocabulary of ``vocab`` tokens."""
    largest = max(ids)
    if largest >= vocab:
        raise DataError(
            f"input_ids[{ids.index(largest)}] is {largest}, and the model has {vocab:,} tokens (ids 0 to {vocab - 1}): the records "
            "were made by another model's tokenizer"
        )


def _numbers(record: Mapping[str, Any], name: str) -> list[int]:
    values = decoded(record[name], name)
    if not isinstance(values, list | tuple):
        raise DataError(f"{name} is {shown(values)}; a list of whole numbers is expected")
    is_mask = name in MASKS or name == "attention_mask"
    for index, value in enumerate(values):
        if not isinstance(value, int) or (isinstance(value, bool) and not is_mask):
            raise DataError(f"{name}[{index}] is {shown(value)}; a whole number is expected")
    return [int(value) for value in values]


def _mask(values: list[int], name: str) -> tuple[bool, ...]:
    for index, value in enumerate(values):
        if value not in (0, 1):
            raise DataError(f"{name}[{index}] is {value}; 0 or 1 is expected")
    return tuple(value == 1 for value in values)


def _labelled(labels: list[int], ids: list[int]) -> tuple[bool, ...]:
    """Which entries have a label: each must be the id at its place."""
    wrong = [i for i, label in enumerate(labels) if label not in (IGNORED, ids[i])]
    if wrong:
        at = wrong[0]
        is_shifted = all(label in (IGNORED, following) for label, following in zip(labels, ids[1:], strict=False))
        why = "; they are shifted by one, and transformers' labels aren't" if is_shifted else ""
        raise DataError(f"labels[{at}] is {labels[at]}; the id at its place, {ids[at]}, or {IGNORED} is expected{why}")
    return tuple(label != IGNORED for label in labels)


def _check_whole(given: Mapping[str, list[int]], num_tokens: int) -> None:
    """Refuse padding, and several documents in one record: their tokens would attend to each other."""
    attended = given.get("attention_mask")
    if attended is not None and any(value != 1 for value in attended):
        raise DataError(
            f"attention_mask isn't 1 at {sum(value != 1 for value in attended):,} of {num_tokens:,} entries. Leave padding out: "
            "nothing is padded here"
        )
    positions = given.get("position_ids")
    if positions is not None and positions != list(range(num_tokens)):
        raise DataError(
            "position_ids doesn't count from 0: the record holds several documents, or a part of one. Write a record for each; "
            "train.packing packs them"
        )
