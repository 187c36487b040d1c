"""Whether an adapter on disk is the one that a config attaches to a model: by its headers, and settings taken from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dist_lora.config.schema import LINEARS, Config, LoraSection, ModuleAdapter, UnfreezeSection
from dist_lora.errors import AdapterError, ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.herd.unfrozen import describe_unfrozen, unfrozen_weights
from dist_lora.lora.adapter_reader import AdapterOnDisk
from dist_lora.lora.patterns import adapters_of
from dist_lora.lora.tokens import HEAD_ROWS
from dist_lora.text import first_few, ranges


def settings_of(adapter: AdapterOnDisk) -> dict[str, Any]:
    """The settings of ``lora`` that attach this adapter. ``modules`` is None where rank, alpha, targets and layers say all."""
    modules = list(adapter.modules.values())
    if not modules:
        return {"modules": [], "train_tokens": list(adapter.tokens)}
    layers = sorted({module.layer for module in modules})
    is_alike = len({(module.rank, module.alpha) for module in modules}) == 1
    is_plain = is_alike and len(modules) == len(layers) * len(adapter.targets)
    return {
        "rank": modules[0].rank if is_alike else adapter.rank,
        "alpha": modules[0].alpha if is_alike else adapter.scale * adapter.rank,
        "dropout": adapter.dropout,
        "targets": "all" if adapter.targets == LINEARS else list(adapter.targets),
        "layers": "all" if adapter.layers is None else list(adapter.layers),
        "modules": None if is_plain else modules,
        "train_tokens": list(adapter.tokens),
    }


def with_settings_of(config: Config, adapter: AdapterOnDisk) -> Config:
    """The config with each setting of ``lora`` that it leaves out as the adapter has it, and ``train.unfreeze`` likewise.

    ``check_fit`` has compared the others.
    """
    section, settings = config.lora, settings_of(adapter)
    given = section.model_fields_set - ({"modules"} if section.modules is None else set())
    lora = section.model_copy(update={name: value for name, value in settings.items() if name not in given})
    config = config.model_copy(update={"lora": lora})
    if config.train.unfreeze is None and adapter.unfrozen:
        unfreeze = UnfreezeSection(patterns=[re.escape(name) for name in adapter.unfrozen])
        config = config.model_copy(update={"train": config.train.model_copy(update={"unfreeze": unfreeze})})
    return config


def check_fit(adapter: AdapterOnDisk, *, config: Config, shape: Shape) -> None:
    """Check that the adapter belongs on a model of this shape, and is what ``lora`` and ``train.unfreeze`` train of it.

    Raises:
        ConfigError: its linears have other widths or layers than the model's, or a setting contradicts it.
        AdapterError: it lacks linears that its own config names.
    """
    faults = list(_faults_on_model(adapter, shape))
    if faults:
        raise ConfigError(f"{adapter.folder} doesn't fit this model: {'; '.join(faults)}. Name its own base.")
    lacking = adapter.lacking(shape.num_layers)
    if lacking:
        raise AdapterError(
            f"{adapter.folder} is incomplete: its config names {len(lacking):,} linears that it has no tensors for, "
            f"{first_few(lacking)}. Copy it again; or it belongs to a model of fewer layers than {shape.num_layers}."
        )
    faults = [*_contradictions(adapter, config.lora, shape), *_other_unfrozen(adapter, config, shape)]
    if faults:
        raise ConfigError(
            f"{adapter.folder} is not the adapter that the config defines:\n  "
            + "\n  ".join(faults)
            + "\nLeave these settings out, and they are taken from the adapter."
        )


def _faults_on_model(adapter: AdapterOnDisk, shape: Shape) -> Iterator[str]:
    outside = [module.layer for module in adapter.modules.values() if module.layer >= shape.num_layers]
    if outside:
        yield f"it has layers {ranges(outside)}, and the model has 0-{shape.num_layers - 1}"
    differing = []
    for name, (first, second) in adapter.pairs.items():
        expected = shape.linear_shapes()[adapter.modules[name].linear]
        if (second.shape[0], first.shape[1]) != expected:
            differing.append(f"{name} is {expected[0]} x {expected[1]}, its B A {second.shape[0]} x {first.shape[1]}")
    if differing:
        yield first_few(differing)
    shapes = shape.tensor_shapes()
    for name, weight in adapter.weights.items():
        if weight.shape != shapes.get(f"{name}.weight"):
            yield f"{name} is {shapes.get(f'{name}.weight')}, its whole weight {weight.shape}"
    beyond = [token for token in adapter.tokens if token >= shape.vocab]
    if beyond:
        yield f"it has rows of tokens {ranges(beyond)}, and the model's vocabulary ends at {shape.vocab - 1:,}"
    for name, rows in adapter.rows.items():
        if rows.shape[1] != shape.hidden:
            yield f"{name} has a width of {rows.shape[1]:,}, and the model {shape.hidden:,}"
    if HEAD_ROWS in adapter.rows and shape.tied:
        yield "it has rows of a head of its own, and the model's head is its embedding"


def _contradictions(adapter: AdapterOnDisk, section: LoraSection, shape: Shape) -> Iterator[str]:
    """Each setting that ``section`` was given and that says something else than the adapter, with both values."""
    yield from _differing_tokens(section, adapter)
    if section.modules is not None:
        yield from _differing_modules(adapters_of(section, num_layers=shape.num_layers), adapter)
        return
    given, own = section.model_fields_set, LoraSection.model_construct(**settings_of(adapter))
    if "rank" in given and section.rank != own.rank:
        yield f"lora.rank: {section.rank} in the config, {own.rank} in the adapter"
    if "alpha" in given and not math.isclose(section.alpha, own.alpha, rel_tol=1e-6):
        why = f" (lora_alpha {adapter.alpha:g} with rsLoRA, a scale of {adapter.scale:g})" * adapter.config.has_rslora
        yield f"lora.alpha: {section.alpha:g} in the config, {own.alpha:g} in the adapter{why}"
    targets, own_targets = section.target_names(), own.target_names()
    if "targets" in given and targets != own_targets:
        yield f"lora.targets: {' '.join(targets)} in the config, {' '.join(own_targets)} in the adapter"
    layers, own_layers = section.layer_indices(shape.num_layers), own.layer_indices(shape.num_layers)
    if "layers" in given and layers != own_layers:
        yield f"lora.layers: {ranges(layers)} in the config, {ranges(own_layers)} in the adapter"


def _other_unfrozen(adapter: AdapterOnDisk, config: Config, shape: Shape) -> Iterator[str]:
    unfrozen = unfrozen_weights(config, shape)
    if config.train.unfreeze is not None and set(unfrozen) != set(adapter.unfrozen):
        has = describe_unfrozen(adapter.unfrozen) or "none"
        yield f"train.unfreeze: {describe_unfrozen(unfrozen)} in the config, {has} in the adapter"


def _differing_tokens(section: LoraSection, adapter: AdapterOnDisk) -> Iterator[str]:
    """A plan has no tokenizer, and compares the number of tokens where some are names."""
    named = section.train_tokens
    if "train_tokens" not in section.model_fields_set:
        return
    is_all_ids = all(isinstance(token, int) for token in named)
    if set(named) != set(adapter.tokens) if is_all_ids else len(named) != len(adapter.tokens):
        has = f"ids {ranges(adapter.tokens)}" if adapter.tokens else "none"
        yield f"lora.train_tokens: {', '.join(map(str, named)) or 'none'} in the config, {has} in the adapter"


def _differing_modules(config: Mapping[str, ModuleAdapter], adapter: AdapterOnDisk) -> Iterator[str]:
    names = sorted({*config, *adapter.modules})
    differing = [name for name in names if not _is_same(config.get(name), adapter.modules.get(name))]
    if differing:
        config_has, adapter_has = (_in_words(where.get(differing[0])) for where in (config, adapter.modules))
        rest = f" (and {len(differing) - 1:,} more)" if len(differing) > 1 else ""
        yield f"lora.modules: {differing[0]} has {config_has} in the config, {adapter_has} in the adapter{rest}"


def _is_same(first: ModuleAdapter | None, second: ModuleAdapter | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.rank == second.rank and math.isclose(first.alpha, second.alpha, rel_tol=1e-6)


def _in_words(module: ModuleAdapter | None) -> str:
    return "no adapter" if module is None else f"rank {module.rank} and alpha {module.alpha:g}"
