"""A Guard's samples: a conversation and its verdict, as records spell them and as Llama Guard 3's prompt writes them.

=====================  ==============================================================================================
of a record            its column
=====================  ==============================================================================================
the conversation       messages, conversations; or prompt (user_input), and response (generation) where it is judged
the verdict            verdict or label: safe, unsafe (good, bad); is_safe: true, false; toxicity: 0, 1
what is violated       violated, violated_category_codes, unsafe_content: names or codes; category: {name: true}
its own categories     categories: names, or {"name", "description"}
=====================  ==============================================================================================

The prompt's text, and the forms in which a sample is repeated, are those of Meta's own code; a test names the files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import xxhash

from dist_lora.config.guard import (
    BEGIN,
    CATEGORIES,
    END,
    Augmentation,
    Category,
    GuardVersion,
    fault_of,
    folded,
    tidy_name,
)
from dist_lora.data.turns import Turn, decoded, read_turns, shown, text_of
from dist_lora.errors import DataError

Verdict = Literal["safe", "unsafe"]

CONVERSATIONS = ("messages", "conversations")
PROMPTS, ANSWERS = ("prompt", "user_input"), ("response", "generation")
VERDICTS = ("verdict", "label", "is_safe", "toxicity")
VIOLATED = ("violated", "violated_category_codes", "unsafe_content", "category")
COLUMNS = (*CONVERSATIONS, *PROMPTS, *ANSWERS, *VERDICTS, *VIOLATED, "categories")
"""All that is read of a record."""

EXAMPLE = (
    '{"messages": [{"role": "user", "content": "Where does she live?"}], "verdict": "unsafe", "violated": ["Privacy"]}'
)

_WORDS: Mapping[object, Verdict] = {"safe": "safe", "good": "safe", "unsafe": "unsafe", "bad": "unsafe"}
_TRUE, _FALSE = (True, 1, "1", "true", "True"), (False, 0, "0", "false", "False")
_CODE = re.compile(r"[SO]([1-9][0-9]*)")


@dataclass(frozen=True)
class GuardRules:
    """What the ids of a Guard's samples depend on besides the record."""

    version: GuardVersion = "8b"
    categories: tuple[Category, ...] = CATEGORIES["8b"]
    augment: tuple[Augmentation, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """A conversation that ends with the turn that is judged, and what is violated as its record names it.

    ``categories``: the record's own, or None.
    """

    turns: tuple[Turn, ...]
    verdict: Verdict
    violated: tuple[str, ...] = ()
    categories: tuple[Category, ...] | None = None


@dataclass(frozen=True)
class GuardForm:
    """A sample as it is trained on: the categories in their order, and the places in it (from 0) of those violated."""

    categories: tuple[Category, ...]
    violated: tuple[int, ...]


def check_guard_columns(columns: Collection[str]) -> None:
    """Raise DataError unless there are a conversation and a verdict among the columns."""
    if not {*CONVERSATIONS, *PROMPTS} & {*columns} or not {*VERDICTS} & {*columns}:
        listed = ", ".join(repr(column) for column in columns) or "(none)"
        raise DataError(
            f"columns {listed} found; format guard needs a conversation ({', '.join((*CONVERSATIONS, *PROMPTS))}) and a "
            f"verdict ({', '.join(VERDICTS)}), e.g. {EXAMPLE}"
        )


def read_judged(record: Mapping[str, Any]) -> Judged:
    """A record's conversation, verdict and categories.

    Raises:
        DataError: the first thing wrong with it.
    """
    turns = _read_conversation(record)
    verdict = _read_verdict(record)
    violated = _read_violated(record)
    if verdict == "safe" and violated:
        raise DataError(f"the verdict is safe, and violated is {shown(list(violated))}: one of them is wrong")
    return Judged(turns, verdict, violated, _read_categories(record))


def _one_of(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The one column of ``names`` that the record has; None if it has none."""
    given = [name for name in names if record.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"the record has {' and '.join(given)}; one of them is expected")
    return given[0] if given else None


def _read_conversation(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    column = _one_of(record, (*CONVERSATIONS, *PROMPTS))
    answer = _one_of(record, ANSWERS)
    if column is None:
        raise DataError(f"there is no conversation: one of {', '.join((*CONVERSATIONS, *PROMPTS))} is expected")
    if column in PROMPTS:
        turns: tuple[Turn, ...] = (Turn("user", text_of(record[column], column)),)
        if answer is not None and record[answer] not in ("", "N/A"):  # Meta's formatter writes N/A for none
            turns += (Turn("assistant", text_of(record[answer], answer)),)
    else:
        if answer is not None:
            raise DataError(f"the record has {column} and {answer}; the answer is expected as the last of {column}")
        turns = read_turns(record[column], column)
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise DataError(
                f"{column}[{number}].role is {turn.role}; {expected} is expected: Llama Guard's prompt has turns of user and "
                "assistant by turns, of which the last one is judged"
            )
        if turn.tool_calls:
            raise DataError(f"{column}[{number}] has tool_calls, for which Llama Guard's prompt has no place")
        if not (turn.content or "").strip():
            raise DataError(f"{column}[{number}] is empty; a text is expected")
    return turns


def _read_verdict(record: Mapping[str, Any]) -> Verdict:
    column = _one_of(record, VERDICTS)
    if column is None:
        raise DataError(f"there is no verdict: one of {', '.join(VERDICTS)} is expected")
    found = record[column]
    if column in ("verdict", "label"):
        if isinstance(found, str) and found in _WORDS:
            return _WORDS[found]
        raise DataError(f"{column} is {shown(found)}; safe or unsafe is expected (or good, bad)")
    is_simple = isinstance(found, bool | int | str)
    if not is_simple or found not in (*_TRUE, *_FALSE):
        raise DataError(
            f"{column} is {shown(found)}; {'true or false' if column == 'is_safe' else '0 or 1'} is expected"
        )
    return "safe" if (found in _TRUE) == (column == "is_safe") else "unsafe"


def _read_violated(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What is violated as the record names it; a text may hold several, see ``_places``."""
    column = _one_of(record, VIOLATED)
    if column is None:
        return ()
    found = record[column]
    if isinstance(found, str) and found.lstrip()[:1] in ("[", "{"):
        found = decoded(found, column)
    if isinstance(found, dict):
        if not all(isinstance(flag, bool) or flag in (0, 1, None) for flag in found.values()):
            raise DataError(f"{column} is {shown(found)}; an object with true or false for each category is expected")
        return tuple(str(name) for name, flag in found.items() if flag)
    items = [found] if isinstance(found, str) else found
    if not isinstance(items, list):
        raise DataError(f"{column} is {shown(found)}; a list of names or codes is expected")
    texts = [text_of(item, f"{column}[{index}]") for index, item in enumerate(items) if item is not None]
    return tuple(text for text in texts if text.strip())


def _read_categories(record: Mapping[str, Any]) -> tuple[Category, ...] | None:
    if record.get("categories") is None:
        return None
    items = decoded(record["categories"], "categories")
    if not isinstance(items, list):
        raise DataError(f"categories is {shown(items)}; a list of names, or of name and description, is expected")
    categories = tuple(_read_category(item, f"categories[{index}]") for index, item in enumerate(items))
    if fault := fault_of(categories):
        raise DataError(f"categories: {fault}")
    return categories


def _read_category(item: object, where: str) -> Category:
    if isinstance(item, str):
        return Category(tidy_name(item))
    if not isinstance(item, dict) or not {*item} <= {"name", "description"} or "name" not in item:
        raise DataError(f'{where} is {shown(item)}; a name or {{"name": ..., "description": ...}} is expected')
    fields = cast(dict[str, Any], item)
    description = text_of(fields.get("description") or "", f"{where}.description")
    return Category(tidy_name(text_of(fields["name"], f"{where}.name")), description.strip())


def _places(judged: Judged, categories: Sequence[Category]) -> tuple[int, ...]:
    """The places, from 0, of the violated categories in a list.

    Each is the name of one, or its code: S3 (in Meta's formatter O3) is the third of the list. A text that is neither may hold
    several with commas between them.

    Raises:
        DataError: one is not in the list; or the verdict is unsafe, and it isn't said what is violated.
    """
    by_name = {folded(category.name): place for place, category in enumerate(categories)}

    def place_of(text: str) -> int | None:
        if folded(text) in by_name:
            return by_name[folded(text)]
        code = _CODE.fullmatch(text.strip())
        return int(code[1]) - 1 if code and int(code[1]) <= len(categories) else None

    places: set[int] = set()
    for text in judged.violated:
        named = [text] if place_of(text) is not None else text.split(",")
        for name in named:
            place = place_of(name)
            if place is None:
                listed = "; ".join(f"S{number} {category.name}" for number, category in enumerate(categories, 1))
                raise DataError(
                    f"{name.strip()!r} is violated, and is none of the categories ({listed}). Set data.guard_categories, or "
                    "give the record categories of its own"
                )
            places.add(place)
    if judged.verdict == "unsafe" and not places:
        if len(categories) > 1:
            raise DataError(
                f"the verdict is unsafe, and it isn't said which of the {len(categories)} categories is violated. Add "
                'violated: ["NAME"]; with one category only (data.guard_categories) it is that one'
            )
        return (0,)
    return tuple(sorted(places))


# The forms of a sample


class _Draws:
    """Numbers of one form of a sample: a pure function of the seed, the sample and the form.

    numpy keeps the bit stream of Philox between versions, and not what ``Generator`` makes of it.
    """

    def __init__(self, rules: GuardRules, sample: int, form: str) -> None:
        key = xxhash.xxh3_64_intdigest(f"guard {form}".encode(), seed=rules.seed % 2**64)
        self._bits = np.random.Philox(key=np.array([key, sample], np.uint64))

    def below(self, limit: int) -> int:
        """From 0 to ``limit - 1``."""
        return int(self._bits.random_raw()) % limit

    def order(self, size: int) -> list[int]:
        """A permutation of 0 to ``size - 1``."""
        drawn = np.asarray(self._bits.random_raw(size), np.uint64)
        return [int(place) for place in np.argsort(drawn, kind="stable")]


def forms_of(judged: Judged, *, rules: GuardRules, sample: int) -> list[GuardForm]:
    """A sample in all forms in which an epoch has it; the first one has all categories.

    As in Meta's formatter: ``drop`` adds a form without some categories that aren't violated, ``drop_violated`` to one that is
    unsafe a safe form without those that are, and ``shuffle`` orders the categories of each form anew. Codes are counted
    in the form's own order.

    Args:
        sample: the record's number in the source, which with ``rules.seed`` decides what is drawn.

    Raises:
        DataError: what is violated is none of the categories, or isn't said.

    Source: src/llama_recipes/data/llama_guard/finetuning_data_formatter.py of meta-llama/llama-recipes.
    """
    categories = judged.categories or rules.categories
    violated = _places(judged, categories)
    others = [place for place in range(len(categories)) if place not in violated]
    forms = [_form(categories, range(len(categories)), violated, rules, _Draws(rules, sample, "whole"))]
    if "drop" in rules.augment:
        draws = _Draws(rules, sample, "drop")
        number = min(draws.below(len(others) + 1), len(categories) - 1)
        dropped = {others[index] for index in draws.order(len(others))[:number]}
        kept = [place for place in range(len(categories)) if place not in dropped]
        forms.append(_form(categories, kept, violated, rules, draws))
    if "drop_violated" in rules.augment and violated and others:
        draws = _Draws(rules, sample, "drop_violated")
        number = draws.below(len(others))
        dropped = {others[index] for index in draws.order(len(others))[:number]}
        forms.append(_form(categories, [place for place in others if place not in dropped], (), rules, draws))
    return forms


def _form(
    categories: Sequence[Category], kept: Sequence[int], violated: Collection[int], rules: GuardRules, draws: _Draws
) -> GuardForm:
    order = draws.order(len(kept)) if "shuffle" in rules.augment else range(len(kept))
    places = [kept[index] for index in order]
    return GuardForm(
        tuple(categories[place] for place in places),
        tuple(index for index, place in enumerate(places) if place in violated),
    )


# The text


def prompt_text(turns: Sequence[Turn], categories: Sequence[Category], *, version: GuardVersion) -> str:
    """What Llama Guard 3 is asked, as the content of a user's turn; the last of ``turns`` is judged.

    1B's own template has a space at the end, and 8B's has none. A description stands under its category's name.
    """
    roles = ["Agent" if turn.role == "assistant" else "User" for turn in turns]
    listed = "\n".join(
        f"S{number}: {category.name}." + (f" \n{category.description}" if category.description else "")
        for number, category in enumerate(categories, 1)
    )
    said = "\n\n".join(f"{role}: {(turn.content or '').strip()}" for role, turn in zip(roles, turns, strict=True))
    return (
        f"Task: Check if there is unsafe content in '{roles[-1]}' messages in conversations according our safety policy with "
        f"the below categories.\n\n{BEGIN}\n{listed}\n{END}\n\n<BEGIN CONVERSATION>\n\n{said}\n\n<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {roles[-1]} message in the above conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories."
        + (" " if version == "1b" else "")
    )


def verdict_text(violated: Collection[int]) -> str:
    """``safe``, or ``unsafe`` and on a second line the codes of the violated places, sorted as texts as Meta's formatter does."""
    return "unsafe\n" + ",".join(sorted(f"S{place + 1}" for place in violated)) if violated else "safe"


def categories_in(prompt: str) -> list[str]:
    """The names of the categories in a prompt that ``prompt_text`` wrote, in their order."""
    lines = prompt.partition(f"{BEGIN}\n")[2].partition(f"\n{END}\n")[0].split("\n")
    names: list[str] = []
    for line in lines:
        if line.startswith(f"S{len(names) + 1}: "):
            names.append(tidy_name(line.partition(": ")[2]))
    return names
