"""The work behind ``generate``: an adapter opened with the base that it belongs to, or a whole model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dist_lora.base.index import WeightIndex, open_index
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.chat.chat import ChatModel, chat, continue_text
from dist_lora.chat.prompts import Prompt, encode_prompts, read_prompts, write_answers
from dist_lora.config.schema import Config
from dist_lora.data.chat import SampleKind
from dist_lora.engines.precision import set_products
from dist_lora.errors import ConfigError
from dist_lora.evaluation.generate import generate, stop_ids_of
from dist_lora.files import refuse_file
from dist_lora.lora.find_base import find_base
from dist_lora.lora.origin import RunOrigin, origin_of
from dist_lora.pace import pace
from dist_lora.train.build import Base, Trainee, build, check_adapter, load_adapter, open_base
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class OpenedModel:
    """A base, and what is loaded on it: checked as far as it can be without its weights, which aren't read yet."""

    config: Config
    base: Base
    adapter: Path | None

    def load(self, world: World) -> Trainee:
        """All of it in this process; without an adapter the base, with adapters that change nothing."""
        set_products(is_deterministic=False)
        trainee = build(self.config, self.base, world)
        if self.adapter is not None:
            load_adapter(trainee.adapters, self.adapter, world=world)
        trainee.model.eval()
        return trainee


def open_model(folder: Path, adapter: Path | None, world: World) -> OpenedModel:
    """The base in ``folder``, quantized as in the adapter's run and with its chat template.

    Raises:
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    index, origin = open_index(folder, allow_bytes=True), RunOrigin() if adapter is None else origin_of(adapter)
    quant = _quant_of(index, adapter, trained=origin.quant)
    config = Config.model_validate(
        {"run": "generate", "model": {"name": _as_folder(folder), "quant": quant}, "data": {"train": "-"}}
    )
    base = open_base(config, world, template=origin.chat_template, index=index)
    if adapter is not None:
        config = check_adapter(adapter, config=config, base=base, world=world)
    return OpenedModel(config, base, adapter)


def _as_folder(folder: Path) -> str:
    """The folder by a name that no member of the herd has."""
    return str(folder) if folder.is_absolute() else os.path.join(os.curdir, folder)


def open_for_answers(adapter: Path, *, base: str | None, world: World) -> Trainee:
    """The whole base in this process and the adapter loaded; see ``open_model`` and ``find_base``."""
    return open_model(find_base(adapter, base), adapter, world).load(world)


def _quant_of(base: WeightIndex, adapter: Path | None, *, trained: str | None) -> str:
    """The quantization to load a base in: the one it was trained in; a base that is stored in NF4 can be nothing else."""
    if not open_base_on_disk(base.folder, quant="nf4", index=base).nf4:
        return trained or "none"
    if trained not in (None, "nf4"):
        log.warning(
            f"{adapter} was trained on its base in {trained}, and {base.folder} is stored in NF4: the answers are of NF4"
        )
    return "nf4"


def answer(
    adapter: Path, *, base: str | None, prompt: str | None, system: str | None, is_plain: bool, max_new_tokens: int
) -> None:
    """``dist-lora generate``: answer ``prompt`` on stdout, or hold a chat on the terminal.

    The prompt is written as in the adapter's run: by the chat template, as it is, or as Stanford Alpaca's instruction. It is
    continued as it is also if ``is_plain`` is set, or the model has no chat template.

    Raises:
        ConfigError: the prompt is empty, or a system message is given for plain text.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty; give the text to answer, or leave the option out for a chat")
    trainee = open_for_answers(adapter, base=base, world=World.alone())
    tokenizer = trainee.base.tokenizer
    model = ChatModel(trainee.model, tokenizer, stop_ids_of(trainee.base.folder, tokenizer), max_new_tokens)
    kind = "text" if is_plain else prompt_kind(adapter, has_template=tokenizer.chat_template is not None)
    if kind == "chat":
        chat(model, prompt=prompt, system=system)
    elif system is not None:
        raise ConfigError("--system: plain text is continued here, which has no system message; leave the option out")
    else:
        continue_text(model, prompt=prompt, is_instruction=kind == "instruction")


def prompt_kind(adapter: Path, *, has_template: bool) -> SampleKind:
    """How a prompt is written for an adapter: as in its run; of several kinds, the first in ``SampleKind``.

    Raises:
        ConfigError: the adapter is a Guard's, or of a kind that isn't known.
    """
    kinds = origin_of(adapter).kinds
    if not kinds:
        log.info(
            f"{adapter} doesn't say how its prompts were written: {'a chat' if has_template else 'plain text'} is assumed"
        )
        return "chat" if has_template else "text"
    if "guard" in kinds:
        raise ConfigError(
            f"{adapter} is a Guard's: it judges conversations by the categories of its config, and doesn't answer. `dist-lora eval` "
            "says how well it judges"
        )
    known: tuple[SampleKind, ...] = get_args(SampleKind)
    kind = next((kind for kind in known if kind in kinds), None)
    if kind is None:
        raise ConfigError(
            f"{adapter} was trained on {', '.join(kinds)}, which this version doesn't know. Update dist-lora"
        )
    if len(kinds) > 1:
        log.warning(
            f"{adapter} was trained on prompts of several kinds ({', '.join(kinds)}): this one is written as {kind}; --plain "
            "continues it as it is"
        )
    return kind


PROMPTS_AT_ONCE = 16


def answer_file(
    adapter: Path,
    *,
    base: str | None,
    prompts: Path,
    out: Path,
    system: str | None,
    is_plain: bool,
    max_new_tokens: int,
) -> int:
    """``dist-lora generate --prompts``: writes each prompt with its answer to ``out``; returns their number.

    Raises:
        ConfigError: ``out`` exists, or ``prompts`` can't be read.
        SaveError: ``out`` can't be written.
        what ``answers_to`` raises.
    """
    refuse_file(out, option="--out")
    asked = read_prompts(prompts)
    answers = answers_to(asked, adapter, base=base, system=system, is_plain=is_plain, max_new_tokens=max_new_tokens)
    write_answers(asked, answers, out=out)
    return len(asked)


def answers_to(
    asked: Sequence[Prompt],
    adapter: Path,
    *,
    base: str | None,
    system: str | None,
    is_plain: bool,
    max_new_tokens: int,
) -> list[str]:
    """The answers to some prompts, in their order, by an adapter and its base in this process.

    Raises:
        ConfigError: a system message is given for plain text.
        DataError: the chat template refuses prompts, or they don't fit the context; names each.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    world = World.alone()
    trainee = open_for_answers(adapter, base=base, world=world)
    tokenizer = trainee.base.tokenizer
    kind = "text" if is_plain else prompt_kind(adapter, has_template=tokenizer.chat_template is not None)
    if kind != "chat" and system is not None:
        raise ConfigError("--system: plain text is continued here, which has no system message; leave the option out")
    context = trainee.base.shape.context
    encoded = encode_prompts(asked, tokenizer=tokenizer, kind=kind, system=system, context=context)
    stop_ids = stop_ids_of(trainee.base.folder, tokenizer)
    answers: list[str] = []
    num_cut = 0
    with pace("answering prompts") as advance:
        for first in range(0, len(encoded), PROMPTS_AT_ONCE):
            some = encoded[first : first + PROMPTS_AT_ONCE]
            ids = generate(
                trainee.model, some, stop_ids=stop_ids, max_new_tokens=max_new_tokens, world=world, is_checked=True
            )
            num_cut += sum(len(prompt) + len(answer) >= context for prompt, answer in zip(some, ids, strict=True))
            answers += [str(tokenizer.decode(answer)) for answer in ids]
            advance(len(answers), len(encoded))
    if num_cut:
        log.warning(f"{num_cut:,} of {len(asked):,} answers end at the model's context of {context:,} tokens")
    return answers
