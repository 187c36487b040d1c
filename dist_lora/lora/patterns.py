"""Ranks and alphas by patterns, and the scale of rsLoRA, as the rank and alpha of each linear. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dist_lora.config.schema import Config, LoraSection, ModuleAdapter
from dist_lora.errors import ConfigError
from dist_lora.herd.names import names_ending
from dist_lora.herd.shape import Shape, module_path
from dist_lora.herd.unfrozen import unfrozen_weights


def with_linears(config: Config, shape: Shape) -> Config:
    """The config with the rank and alpha of each linear that has an adapter, as everything that computes takes it.

    Raises:
        ConfigError: see ``with_patterns`` and ``unfrozen_weights``.
    """
    section = with_patterns(config.lora, num_layers=shape.num_layers)
    section = without_adapters_on(section, unfrozen_weights(config, shape), num_layers=shape.num_layers)
    return config.model_copy(update={"lora": section})


def adapters_of(section: LoraSection, *, num_layers: int) -> dict[str, ModuleAdapter]:
    """The adapters of a config on a model, by the full name of the linear, in the model's order.

    Raises:
        ConfigError: ``lora.layers`` or ``lora.modules`` names a layer that the model doesn't have.
    """
    layers, targets = section.layer_indices(num_layers), section.target_names()
    names = [module_path(target, layer=layer) for layer in layers for target in targets]
    if section.modules is None:
        return {name: ModuleAdapter(name=name, rank=section.rank, alpha=section.alpha) for name in names}
    by_name = {module.name: module for module in section.modules}
    return {name: by_name[name] for name in names if name in by_name}


def with_patterns(section: LoraSection, *, num_layers: int) -> LoraSection:
    """The section with ``scaling``, ``ranks`` and ``alphas`` resolved: everything that computes takes it so.

    An alpha is then the one that gives the scale when it is divided by the rank: for ``scaling: sqrt_rank`` alpha times the rank's
    square root. ``modules`` lists the linears where they differ; else ``rank`` and ``alpha`` say all.

    Source: rsLoRA, arXiv 2312.03732. Patterns are matched as PEFT 0.21 does (``get_pattern_key``): the first that matches counts.

    Raises:
        ConfigError: a pattern is no regular expression, takes too long, or matches none of the adapted linears; or a layer is named
            that the model doesn't have.
    """
    if not section.has_patterns:
        return section
    names = list(adapters_of(section, num_layers=num_layers))
    ranks = _matched(section.ranks or {}, names, setting="lora.ranks")
    alphas = _matched(section.alphas or {}, names, setting="lora.alphas")

    def alpha_of(alpha: float, rank: int) -> float:
        return alpha * math.sqrt(rank) if section.scaling == "sqrt_rank" else alpha

    modules = []
    for name in names:
        rank = int(ranks.get(name, section.rank))
        modules.append(ModuleAdapter(name=name, rank=rank, alpha=alpha_of(alphas.get(name, section.alpha), rank)))
    is_alike = len({(module.rank, module.alpha) for module in modules}) == 1
    return section.model_copy(
        update={
            "scaling": "rank",
            "ranks": None,
            "alphas": None,
            "rank": modules[0].rank if is_alike else section.rank,
            "alpha": modules[0].alpha if is_alike else alpha_of(section.alpha, section.rank),
            "modules": None if is_alike else modules,
        }
    )


def without_adapters_on(section: LoraSection, unfrozen: Sequence[str], *, num_layers: int) -> LoraSection:
    """The section, after ``with_patterns``, without adapters on what is trained itself: ``modules`` names the others."""
    adapters = adapters_of(section, num_layers=num_layers)
    if adapters.keys().isdisjoint(unfrozen):
        return section
    return section.model_copy(update={"modules": [adapters[name] for name in adapters if name not in {*unfrozen}]})


def _matched(patterns: Mapping[str, float], names: list[str], *, setting: str) -> dict[str, float]:
    """The number of the first pattern that matches, for each name that one does."""
    found: dict[str, float] = {}
    unused = []
    for text, number in patterns.items():
        matching = names_ending(text, names, setting=setting)
        if not matching:
            unused.append(text)
        for name in matching:
            found.setdefault(name, number)
    if unused:
        raise ConfigError(
            f"{setting}: {', '.join(map(repr, unused))} matches none of the adapted linears; expected the end of a name like "
            f"{names[0]}, or a regular expression for it"
        )
    return found
