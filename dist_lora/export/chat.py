"""``dist-lora generate``: one answer, or a chat that streams, by an adapter beside its base on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dist_lora.config.schema import Config
from dist_lora.data.chat import encode_prompt
from dist_lora.errors import ConfigError
from dist_lora.export.generate import generate, stop_ids_of
from dist_lora.herd.facts import resolve_model
from dist_lora.lora.peft_file import open_adapter
from dist_lora.parallel.world import World
from dist_lora.train.build import Trainee, build, folder_of, load_adapter, open_base


def base_name(adapter: Path, base: str | None) -> str:
    """What to load beside ``adapter``: what was said, what its run's config says, or what the adapter itself does."""
    if base is not None:
        return base
    of_run = adapter.parent / "config.yaml"
    if of_run.is_file():
        return str(yaml.safe_load(of_run.read_text())["model"]["name"])
    name = open_adapter(adapter).base.name
    if name is None:
        raise ConfigError(f"{adapter} does not say which model it was trained on; name it: --base MODEL")
    return name


def find_base(adapter: Path, base: str | None) -> Path:
    """The folder of the base that ``adapter`` belongs to.

    Raises:
        ConfigError: it is neither here nor on the hub.
    """
    return folder_of(resolve_model(base_name(adapter, base)), World.alone())


def open_for_answers(adapter: Path, *, base: str | None, world: World) -> Trainee:
    """The base whole on this process, with the adapter's values beside it."""
    found = open_adapter(adapter)  # its headers; the tensors are read once, below
    config = Config.model_validate(
        {
            "run": "generate",
            "model": {"name": base_name(adapter, base)},
            "lora": {
                "rank": found.rank,
                "alpha": found.scale * found.rank,  # of rsLoRA too
                "targets": list(found.targets),
                "layers": "all" if found.layers is None else list(found.layers),
            },
            "data": {"train": "-"},
        }
    )
    trainee = build(config, open_base(config, world), world)
    load_adapter(trainee.adapters, adapter, config=config, world=world)
    trainee.model.eval()
    return trainee


def chat(adapter: Path, *, base: str | None, prompt: str | None, system: str | None, max_new_tokens: int) -> None:
    """Answer ``prompt`` on stdout, or hold a chat on the terminal until it is closed (Ctrl-D).

    Raises:
        ConfigError: the prompt is empty.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is empty; give the text to answer, or leave it out for a chat")
    trainee = open_for_answers(adapter, base=base, world=World.alone())
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        asked = prompt if prompt is not None else _ask()
        if asked is None:
            return
        messages.append({"role": "user", "content": asked})
        answer = _answer(trainee, messages, max_new_tokens=max_new_tokens, show=_write)
        print(flush=True)
        if prompt is not None:
            return
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    try:
        while not (asked := input("> ").strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return asked


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer(
    trainee: Trainee, messages: list[dict[str, Any]], *, max_new_tokens: int, show: Callable[[str], None]
) -> str:
    tokenizer = trainee.base.tokenizer
    ids: list[int] = []
    shown = ""

    def on_token(token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character that is cut in two by the tokens decodes to a mark that a later token replaces.
        if not text.endswith("\ufffd"):
            show(text[len(shown) :])
            shown = text

    answers = generate(
        trainee.model,
        [encode_prompt(messages, tokenizer=tokenizer)],
        stop_ids=stop_ids_of(trainee.base.folder, tokenizer),
        max_new_tokens=max_new_tokens,
        world=World.alone(trainee.model.inv_freq.device),
        on_token=on_token,
    )
    return str(tokenizer.decode(answers[0]))
