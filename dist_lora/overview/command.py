"""The work behind ``dist-lora data``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lora.base.hub import fetch_model
from dist_lora.base.tokenizer_files import WITHOUT_WEIGHTS
from dist_lora.config.schema import Config
from dist_lora.data.chat import load_tokenizer, pieces_of
from dist_lora.data.model_limits import warn_of_context
from dist_lora.data.own_format import own_format
from dist_lora.data.token_set import TokenSet
from dist_lora.herd.models import refuse_shape, resolve_model
from dist_lora.herd.shape import Shape, read_shape
from dist_lora.overview.duration import Hours, Steps, hours_of, steps_of
from dist_lora.overview.figures import SetFigures, figures_of
from dist_lora.overview.pictures import lines_of, print_document
from dist_lora.overview.unsafe import open_guard, unsafe_of
from dist_lora.train.command import loader_of, num_steps_of, tokens_of
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class TextModel:
    """A model as far as its data depend on it: no weights."""

    folder: Path
    shape: Shape
    tokenizer: Any


@dataclass(frozen=True)
class RunData:
    """The sets of a run as it trains on them, by the names of their settings; the first is ``data.train``."""

    model: TextModel
    sets: Mapping[str, TokenSet]
    sources: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Overview:
    """What is printed of a run's data."""

    sets: Mapping[str, SetFigures]
    steps: Steps
    hours: Hours


def look(config: Config, *, num_samples: int, as_json: bool, guard: str | None = None) -> None:
    """``dist-lora data``: print what the data of a run are, and what of them ``guard`` finds unsafe (see ``open_guard``).

    Raises:
        ConfigError, DataError, WeightsError: as ``train`` does, of the config, the data and the tokenizer.
        AdapterError: the Guard's adapter is damaged.
    """
    own = own_format(config.data.format)
    if own is not None:
        log.info(str(own.code))
    opened = None if guard is None else open_guard(guard, World.alone())  # before a large set is tokenized
    data = open_data(config)
    unsafe = None if opened is None else unsafe_of(config, opened, World.alone())
    overview = overview_of(config, data)
    tokens = data.sets["data.train"]
    chosen = spread(len(tokens), num_samples)
    if as_json:
        guarded = {} if unsafe is None else {"guard": unsafe.to_json()}
        samples = [_sample(tokens, index, data.model) for index in chosen]
        print(
            json.dumps(
                {"run": config.run, "model": config.model.name, **_as_json(overview), **guarded, "samples": samples}
            )
        )
        return
    print("\n".join(lines_of(config, overview.sets, overview.steps, overview.hours)))
    if unsafe is not None:
        print("\n" + "\n".join(unsafe.lines()))
    for index in chosen:
        print_document(tokens, index, tokenizer=data.model.tokenizer)


def open_data(config: Config) -> RunData:
    """The sets of a run, tokenized by this process or from the cache, as ``train`` would take them from there.

    Needs no weights of the base, no GPU and no other process.

    Raises:
        ConfigError, DataError, WeightsError: see ``look``.
    """
    world = World.alone(torch.device("cpu"))
    model = open_model(config)
    warn_of_context(sequence_length=config.train.sequence_length, context=model.shape.context, world=world)
    train, held_out = tokens_of(config, model, world)
    sets, section = {"data.train": train}, config.data
    sets |= {f"data.eval.{name}".rstrip("."): of_set for name, of_set in held_out.items()}
    names: dict[str, str | list[str] | float] = {"data.train": [one.path for one in section.train_sets()]}
    if isinstance(section.eval, float):
        names["data.eval"] = section.eval
    names |= {f"data.eval.{name}".rstrip("."): source for name, source in section.eval_files().items()}
    return RunData(model, sets, {name: _sources_of(names[name]) for name in sets})


def open_model(config: Config) -> TextModel:
    """Sizes and tokenizer of the config's model; of a hub's model no other file is fetched.

    Raises:
        ConfigError: there is no such model, or only its sizes.
        WeightsError: its config.json or its tokenizer can't be read.
    """
    refuse_shape(config.model)
    resolved = resolve_model(config.model.name)
    folder = resolved.folder
    if folder is None:
        assert resolved.hub_id is not None
        folder = fetch_model(resolved.hub_id, wanted=WITHOUT_WEIGHTS)
    shape = read_shape(folder)
    return TextModel(folder, shape, load_tokenizer(folder, chat_template=config.data.chat_template))


def overview_of(config: Config, data: RunData) -> Overview:
    """All figures of the sets. Reads them once each, and the training set once more for each held-out one."""
    train = data.sets["data.train"]
    figures = {
        name: figures_of(tokens, sources=data.sources[name], train=None if tokens is train else train)
        for name, tokens in data.sets.items()
    }
    loader = loader_of(config, train, World.alone(torch.device("cpu")))
    steps = steps_of(config, loader, num_steps=num_steps_of(config, loader))
    return Overview(figures, steps, hours_of(config, data.model.shape, steps))


def spread(num_documents: int, num_samples: int) -> list[int]:
    """At most so many documents, the first and the last among them, at equal distances."""
    return sorted({int(index) for index in np.linspace(0, num_documents - 1, min(num_samples, num_documents))})


def _sources_of(names: str | list[str] | float) -> tuple[str, ...]:
    if isinstance(names, float):
        return (f"{names:g} of data.train",)
    return (names,) if isinstance(names, str) else tuple(names)


def _as_json(overview: Overview) -> dict[str, Any]:
    return {
        "sets": {name: figures.to_json() for name, figures in overview.sets.items()},
        "training": overview.steps.to_json(),
        "time": overview.hours.to_json(),
    }


def _sample(tokens: TokenSet, index: int, model: TextModel) -> dict[str, Any]:
    ids, is_target = tokens.document(index)
    pieces: Iterator[tuple[str, bool]] = pieces_of(ids.tolist(), is_target.tolist(), tokenizer=model.tokenizer)
    return {
        "sample": int(tokens.sample_ids[index]) + 1,
        "tokens": len(ids),
        "target_tokens": int(tokens.num_targets[index]),
        "pieces": [{"text": text, "is_target": is_trained} for text, is_trained in pieces],
    }
