"""A finished adapter or merged model as the model card and the rules about servers see it."""

from __future__ import annotations

from pathlib import Path

from dist_lora.base.index import read_model_json
from dist_lora.herd.models import member_of
from dist_lora.lora.adapter_reader import AdapterOnDisk, open_adapter
from dist_lora.lora.card import Recipe
from dist_lora.lora.origin import BaseIdentity, facts_of
from dist_lora.lora.servers import AdapterFiles, Served, serve_adapter, serve_merged


def recipe_of(adapter: AdapterOnDisk) -> Recipe:
    """What was adapted, and how."""
    return Recipe.of(
        list(adapter.modules.values()),
        dropout=adapter.dropout,
        layers=adapter.layers if adapter.config.layers is not None else None,
        has_rslora=adapter.config.has_rslora,
        tokens=adapter.tokens,
        unfrozen=adapter.unfrozen,
    )


def servers_of_adapter(folder: Path) -> list[Served]:
    """What each server does with the adapter in ``folder``. Reads its JSON files and the header of its weights.

    Raises:
        ConfigError, AdapterError: see ``open_adapter``.
    """
    adapter = open_adapter(folder)
    member = member_of(adapter.base.name)
    widths = [width for first, second in adapter.pairs.values() for width in (first.shape[1], second.shape[0])]
    known = facts_of(folder).num_layers or (member.shape.num_layers if member is not None else None)
    return serve_adapter(
        AdapterFiles(
            rank=adapter.rank,
            alpha=adapter.alpha,
            has_rslora=adapter.config.has_rslora,
            modules=list(adapter.modules.values()),
            num_layers=known or _least_layers(adapter),
            min_width=min(widths, default=0),
            unfrozen=adapter.unfrozen,
            vocab=member.shape.vocab if member is not None else None,
            has_tokens=bool(adapter.tokens),
        )
    )


def _least_layers(adapter: AdapterOnDisk) -> int:
    """The layers of a base that nothing tells of: those that are adapted, and another one where the config names layers."""
    highest = max((module.layer for module in adapter.modules.values()), default=0)
    return highest + (1 if adapter.config.layers is None else 2)


def servers_of_merged(folder: Path, *, base: BaseIdentity, dtype: str) -> list[Served]:
    """What each server does with the merged model in ``folder``; ``dtype`` is that of its weights (``F32``)."""
    config = read_model_json(folder / "config.json")
    return serve_merged(config, is_float32=dtype == "F32", is_member=member_of(base.name) is not None)
