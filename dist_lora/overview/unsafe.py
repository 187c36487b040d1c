"""What of a run's training samples a Guard finds unsafe: each message of a conversation is judged, after those before it."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.base.hub import fetch_model
from dist_lora.chat.command import OpenedModel, open_model
from dist_lora.config.guard import CATEGORIES, Category
from dist_lora.config.schema import Config
from dist_lora.data.chat import chat_of
from dist_lora.data.columns import sources_of
from dist_lora.data.guard import GuardRules, Judged
from dist_lora.data.guard_ids import encode_guard_prompt, first_ids
from dist_lora.data.own_format import own_format
from dist_lora.data.records import Chat, Continuation, Instruction, Sample, named_format, read_sample
from dist_lora.data.sources import Records, read_records
from dist_lora.data.turns import Role, Turn
from dist_lora.errors import ConfigError, DataError
from dist_lora.herd.models import resolve_model
from dist_lora.lora.adapter_folder import check_adapter_folder, is_adapter_folder
from dist_lora.lora.find_base import find_base
from dist_lora.lora.origin import RunOrigin, origin_of
from dist_lora.pace import pace
from dist_lora.text import count
from dist_lora.train.guard import guard_version, unsafe_prompts
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

SAMPLES_AT_ONCE = 64
BATCH = 4  # prompts in a forward pass
NUM_SHOWN = 5


@dataclass(frozen=True)
class UnsafeSamples:
    """What a Guard found in the records of ``data.train``, all that are there.

    Args:
        guard: its name, as it was given.
        num_samples: all records, ``num_judged`` those of which every message was judged.
        where: of each record with an unsafe message "file.jsonl:7"; of these ``by_user`` have one of the user's, ``by_assistant`` one
            of the assistant's.
        num_too_long: records with a message that doesn't fit the Guard's context together with those before it.
        num_empty: records without a message that is text.
    """

    guard: str
    num_samples: int
    num_judged: int
    where: tuple[str, ...]
    by_user: int
    by_assistant: int
    num_too_long: int
    num_empty: int

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "by": self.guard,
            "samples": self.num_samples,
            "judged": self.num_judged,
            "unsafe": len(self.where),
            "unsafe_by_user": self.by_user,
            "unsafe_by_assistant": self.by_assistant,
            "too_long": self.num_too_long,
            "without_text": self.num_empty,
            "where": list(self.where),
        }

    def lines(self) -> Iterator[str]:
        """As a paragraph of ``dist-lora data``."""
        yield f"unsafe  by {self.guard}"
        share = f" ({len(self.where) / self.num_judged:.1%})" if self.num_judged else ""
        by = f": {self.by_user:,} by a user's message, {self.by_assistant:,} by an assistant's" if self.where else ""
        yield f"  samples     {len(self.where):,} of {self.num_judged:,}{share}{by}"
        if self.where:
            rest = len(self.where) - NUM_SHOWN
            yield f"  at          {', '.join(self.where[:NUM_SHOWN])}" + (
                f" and {rest:,} more (--json: all)" * (rest > 0)
            )
        if self.num_too_long:
            yield f"  not judged  {count(self.num_too_long, 'sample')} longer than the Guard's context"
        if self.num_empty:
            yield f"  not judged  {count(self.num_empty, 'sample')} without a message that is text"


@dataclass(frozen=True)
class Guard:
    """A Guard whose weights aren't read yet, and how it is asked."""

    name: str
    model: OpenedModel
    rules: GuardRules


def open_guard(name: str, world: World) -> Guard:
    """An adapter's folder with its base, or a whole Guard by its member's name, folder or hub id.

    Checks all that can be checked without its weights; one of the hub is downloaded. An adapter is asked with the categories that it was trained on, if its ``dist_lora.json`` has them; else with Llama Guard 3's.

    Raises:
        ConfigError: there is neither, or the adapter is no Guard's.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:  # of pathlib: no such user
        raise ConfigError(f"--guard: {name}: {error}") from None
    # A name with a slash whose first part is a folder here is no hub id.
    is_path = folder.is_dir() or (len(folder.parts) > 1 and folder.parent.is_dir())
    if is_path and not (folder / "config.json").is_file():
        check_adapter_folder(folder)
    if not is_adapter_folder(folder):
        try:
            resolved = resolve_model(name)
            model = open_model(resolved.folder or fetch_model(resolved.hub_id or name), None, world)
        except ConfigError as error:
            raise ConfigError(str(error).replace("model.name", "--guard")) from None
        return _guard(name, model, RunOrigin())
    origin = origin_of(folder)
    if origin.kinds and "guard" not in origin.kinds:
        raise ConfigError(
            f"--guard: {name} was trained on {', '.join(origin.kinds)}, so it answers and doesn't judge. Name the adapter of a run with "
            "data.format: guard, or a Llama Guard 3"
        )
    if not origin.guard_categories:
        log.warning(f"{name} doesn't say which categories it was trained on: it is asked with Llama Guard 3's own")
    return _guard(name, open_model(find_base(folder, None), folder, world), origin)


def _guard(name: str, model: OpenedModel, origin: RunOrigin) -> Guard:
    """Raises ConfigError if the tokenizer can't write a Guard's prompt or verdict."""
    version = origin.guard_version or guard_version("auto", model.base.shape)
    categories = tuple(Category(*pair) for pair in origin.guard_categories) or CATEGORIES[version]
    try:
        encode_guard_prompt([Turn("user", "-")], categories, tokenizer=model.base.tokenizer, version=version)
        first_ids(model.base.tokenizer)
    except DataError as error:
        raise ConfigError(f"--guard: {name}: {error}") from None
    return Guard(name, model, GuardRules(version, categories))


def unsafe_of(config: Config, guard: Guard, world: World) -> UnsafeSamples:
    """Load the Guard and judge all records of ``data.train``, whatever of them is then cut, dropped or held out.

    Raises:
        DataError: a record can't be read, or holds token ids and no text; names its place.
    """
    records, trainee = _records_of(config), guard.model.load(world)
    context = trainee.base.shape.context
    where: list[str] = []
    by: Counter[Role] = Counter()
    num_judged = num_too_long = num_empty = 0
    with pace("judging samples") as advance:
        for first in range(0, len(records), SAMPLES_AT_ONCE):
            chosen = range(first, min(first + SAMPLES_AT_ONCE, len(records)))
            asked: list[tuple[int, Role, list[int]]] = []
            for index in chosen:
                prompts = [
                    (index, turns[-1].role, _prompt(turns, guard)) for turns in prefixes(_turns_at(records, index))
                ]
                if any(len(ids) >= context for *_, ids in prompts):
                    num_too_long += 1
                elif not prompts:
                    num_empty += 1
                else:
                    num_judged += 1
                    asked += prompts
            found = unsafe_prompts(trainee, [ids for *_, ids in asked], batch=BATCH, world=world)
            unsafe = [(index, role) for (index, role, _), is_unsafe in zip(asked, found, strict=True) if is_unsafe]
            where += [records.where(index) for index in dict.fromkeys(index for index, _ in unsafe)]
            by.update(role for _, role in dict.fromkeys(unsafe))
            advance(chosen.stop, len(records))
    return UnsafeSamples(
        guard.name, len(records), num_judged, tuple(where), by["user"], by["assistant"], num_too_long, num_empty
    )


def _records_of(config: Config) -> Records:
    names, readings = sources_of(config.data, "train")
    fmt, own = named_format(config.data.format), own_format(config.data.format)
    return read_records(names, fmt=fmt, which="train", is_fetched=True, readings=readings, own=own)


def _turns_at(records: Records, index: int) -> list[Turn]:
    try:
        record, fmt = records.converted(index)
        return judged_turns(read_sample(record, fmt=fmt))
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from None


def _prompt(turns: Sequence[Turn], guard: Guard) -> list[int]:
    tokenizer = guard.model.base.tokenizer
    return encode_guard_prompt(turns, guard.rules.categories, tokenizer=tokenizer, version=guard.rules.version)


def judged_turns(sample: Sample) -> list[Turn]:
    """A sample as a Guard reads it: messages with text, of user and assistant by turns.

    System messages, answers of tools and calls without text are left out; messages of one role that then follow each other are
    joined by a blank line. A text without a prompt is one message of the user's, as Llama Guard judges a text alone.

    Raises:
        DataError: the sample is token ids.
    """
    said: list[tuple[Role, str]]
    if isinstance(sample, Instruction):
        sample = chat_of(sample)
    if isinstance(sample, Chat | Judged):
        said = [(turn.role, turn.content or "") for turn in sample.turns]
    elif isinstance(sample, Continuation):
        said = [("user", sample.prompt), ("assistant" if sample.prompt.strip() else "user", sample.completion)]
    else:
        raise DataError("it holds token ids, and a Guard judges texts: leave --guard out, or name the texts' own file")
    spoken = [(role, text.strip()) for role, text in said if role in ("user", "assistant") and text.strip()]
    return [
        Turn(role, "\n\n".join(text for _, text in group))
        for role, group in itertools.groupby(spoken, key=lambda turn: turn[0])
    ]


def prefixes(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The conversation up to each of its messages."""
    return (turns[:end] for end in range(1, len(turns) + 1))
