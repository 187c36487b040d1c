"""The work behind ``generate``: an adapter opened with the base that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_lora.chat.chat import ChatModel, chat, continue_text
from dist_lora.chat.prompts import encode_prompts, read_prompts, refuse_existing, write_answers
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.evaluation.generate import generate, stop_ids_of
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.find_base import base_name
from dist_lora.lora.origin import origin_of
from dist_lora.train.build import Trainee, build, check_adapter, load_adapter, open_base
from dist_lora.world.world import World


def open_for_answers(adapter: Path, *, base: str | None, world: World) -> Trainee:
    """The whole base in this process, with the adapter loaded."""
    headers = open_adapter(adapter)  # the tensors are read once, below
    config = Config.model_validate(
        {
            "run": "generate",
            "model": {"name": base_name(adapter, base)},
            "lora": {
                "rank": headers.rank,
                "alpha": headers.scale * headers.rank,  # of rsLoRA too
                "targets": list(headers.targets),
                "layers": "all" if headers.layers is None else list(headers.layers),
            },
            "data": {"train": "-", "chat_template": origin_of(adapter).chat_template},
        }
    )
    base_on_disk = open_base(config, world)
    check_adapter(adapter, config=config, base=base_on_disk, world=world)
    trainee = build(config, base_on_disk, world)
    load_adapter(trainee.adapters, adapter, world=world)
    trainee.model.eval()
    return trainee


def answer(
    adapter: Path, *, base: str | None, prompt: str | None, system: str | None, is_plain: bool, max_new_tokens: int
) -> None:
    """``dist-lora generate``: answer ``prompt`` on stdout, or hold a chat on the terminal.

    The prompt is continued as plain text, without a chat template, if ``is_plain`` is set, the adapter was trained on
    plain text, or the model has no chat template.

    Raises:
        ConfigError: the prompt is empty, or a system message is given for plain text.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty; give the text to answer, or leave the option out for a chat")
    trainee = open_for_answers(adapter, base=base, world=World.alone())
    tokenizer = trainee.base.tokenizer
    model = ChatModel(trainee.model, tokenizer, stop_ids_of(trainee.base.folder, tokenizer), max_new_tokens)
    if not (is_plain or origin_of(adapter).is_plain or tokenizer.chat_template is None):
        chat(model, prompt=prompt, system=system)
    elif system is not None:
        raise ConfigError("--system: plain text is continued here, which has no system message; leave the option out")
    else:
        continue_text(model, prompt=prompt)


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
        DataError: lines are no prompts, or the chat template refuses them.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
        SaveError: ``out`` can't be written.
    """
    refuse_existing(out)
    asked = read_prompts(prompts)
    world = World.alone()
    trainee = open_for_answers(adapter, base=base, world=world)
    tokenizer = trainee.base.tokenizer
    is_plain = is_plain or origin_of(adapter).is_plain or tokenizer.chat_template is None
    if is_plain and system is not None:
        raise ConfigError("--system: plain text is continued here, which has no system message; leave the option out")
    encoded = encode_prompts(asked, tokenizer=tokenizer, is_plain=is_plain, system=system)
    stop_ids = stop_ids_of(trainee.base.folder, tokenizer)

    def answers_to(some: Sequence[list[int]]) -> list[str]:
        ids = generate(trainee.model, some, stop_ids=stop_ids, max_new_tokens=max_new_tokens, world=world)
        return [str(tokenizer.decode(answer)) for answer in ids]

    write_answers(asked, encoded, out=out, batch=PROMPTS_AT_ONCE, answer=answers_to)
    return len(asked)
