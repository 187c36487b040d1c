"""A Guard's samples as token ids: Llama Guard 3's prompt in a user's turn, and the verdict, which alone is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_lora.config.guard import Category, GuardVersion
from dist_lora.data.chat import Encoded, encode_plain
from dist_lora.data.guard import GuardRules, Judged, forms_of, prompt_text, verdict_text
from dist_lora.data.records import read_sample, unused_columns
from dist_lora.data.template import special_ids
from dist_lora.data.turns import Turn
from dist_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGIN, _HEADER, _END_HEADER, _END_TURN = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def encode_judged(
    record: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, rules: GuardRules, sample: int
) -> list[Encoded]:
    """Ids and targets of one record in each of its forms (see ``forms_of``), not truncated.

    A special token's name inside a text is encoded as ordinary text.

    Raises:
        DataError: the record isn't of format guard, or the tokenizer isn't Llama 3's.
    """
    judged = read_sample(record, fmt="guard")
    assert isinstance(judged, Judged)
    unused = [f"column {name!r} is not used" for name in unused_columns(record, fmt="guard")]
    unused += [f"key {key!r} of a message is not used" for turn in judged.turns for key in turn.extras]
    documents = []
    for form in forms_of(judged, rules=rules, sample=sample):
        prompt = encode_guard_prompt(judged.turns, form.categories, tokenizer=tokenizer, version=rules.version)
        verdict = [*_plain(verdict_text(form.violated), tokenizer), special_ids(tokenizer)[_END_TURN]]
        is_target = [False] * len(prompt) + [True] * len(verdict)
        documents.append(Encoded(prompt + verdict, is_target, tuple(dict.fromkeys(unused)), "guard"))
    return documents


def encode_guard_prompt(
    turns: Sequence[Turn],
    categories: Sequence[Category],
    *,
    tokenizer: PreTrainedTokenizerBase,
    version: GuardVersion,
) -> list[int]:
    """The ids before a verdict: to the two line breaks after the assistant's header.

    Raises:
        DataError: the tokenizer lacks a special token of Llama 3's turns.
    """
    known = special_ids(tokenizer)
    lacking = [name for name in SPECIAL_TOKENS if name not in known]
    if lacking:
        raise DataError(
            f"format guard needs the special tokens {', '.join(lacking)}, which the tokenizer lacks: take Llama Guard 3, or "
            "another Llama 3"
        )
    header, end_header = known[_HEADER], known[_END_HEADER]
    text = prompt_text(turns, categories, version=version)
    return [
        *(known[_BEGIN], header, *_plain("user", tokenizer), end_header, *_plain(f"\n\n{text}", tokenizer)),
        *(known[_END_TURN], header, *_plain("assistant", tokenizer), end_header, *_plain("\n\n", tokenizer)),
    ]


def first_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids with which the verdicts safe and unsafe begin.

    Raises:
        DataError: both begin with the same one.
    """
    safe, unsafe = (_plain(word, tokenizer)[0] for word in ("safe", "unsafe"))
    if safe == unsafe:
        raise DataError("the tokenizer writes safe and unsafe with the same first token, by which they are told apart")
    return safe, unsafe


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for token, _ in encode_plain(text, tokenizer)]
