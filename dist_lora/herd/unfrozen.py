"""Which weights of the base ``train.unfreeze`` trains. Needs no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from dist_lora.config.schema import Config, Quant, UnfreezeSection
from dist_lora.errors import ConfigError
from dist_lora.herd.names import names_ending
from dist_lora.herd.shape import Shape
from dist_lora.text import count, first_few, ranges

_ENDS = ("model.embed_tokens", "lm_head")


def unfrozen_weights(config: Config, shape: Shape) -> tuple[str, ...]:
    """Names of the linears and norms whose weights are trained, in the model's order: ``model.layers.3.mlp.up_proj``.

    Raises:
        ConfigError: more layers than the model has; a pattern is no regular expression, takes too long, or matches nothing, or the
            embedding or the head; a linear that is quantized.
    """
    section = config.train.unfreeze
    return () if section is None else _unfrozen(section.model_dump_json(), shape, config.model.quant)


# Kept, since a search for what fits asks for the same hundreds of times.
@functools.lru_cache(maxsize=16)
def _unfrozen(unfreeze: str, shape: Shape, quant: Quant) -> tuple[str, ...]:
    section = UnfreezeSection.model_validate_json(unfreeze)
    if section.last_layers > shape.num_layers:
        raise ConfigError(
            f"train.unfreeze.last_layers: found {section.last_layers}, expected at most {shape.num_layers} (the model has "
            f"{count(shape.num_layers, 'layer')})"
        )
    names = [name.removesuffix(".weight") for name in shape.tensor_shapes()]
    first = shape.num_layers - section.last_layers
    chosen = {name for name in names if (layer := layer_of(name)) is not None and layer >= first}
    if section.norms:
        chosen |= {name for name in names if name.endswith("norm")}
    chosen |= _matched(section.patterns, [*dict.fromkeys((*names, *_ENDS))])
    _refuse_quantized(chosen, shape, quant)
    return tuple(name for name in names if name in chosen)


def trained_weights(config: Config, shape: Shape) -> int:
    """How many weights a config trains: of adapters, of tokens' rows, and unfrozen ones.

    Raises:
        ConfigError: see ``unfrozen_weights`` and ``Shape.trained_weights``.
    """
    return shape.trained_weights(config.lora) + shape.unfrozen_weights(unfrozen_weights(config, shape))


def describe_unfrozen(names: Sequence[str]) -> str:
    """``q_proj k_proj input_layernorm of layers 30-31, down_proj of layers 0-29, norm``."""
    layers_of: dict[str, list[int]] = {}
    for name in names:
        layer = layer_of(name)
        layers_of.setdefault(name.rpartition(".")[2], []).extend([] if layer is None else [layer])
    alike: dict[str, list[str]] = {}
    for kind, layers in layers_of.items():
        alike.setdefault(ranges(layers) if layers else "", []).append(kind)
    return ", ".join(" ".join(kinds) + f" of layers {layers}" * bool(layers) for layers, kinds in alike.items())


def layer_of(name: str) -> int | None:
    """The layer of a weight by its full name; None outside of the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    setting = "train.unfreeze.patterns"
    matched: set[str] = set()
    for text in patterns:
        found = {*names_ending(text.removesuffix("$").removesuffix(".weight"), names, setting=setting)}
        if not found:
            raise ConfigError(
                f"{setting}: {text!r} matches no weight of the model; expected the end of a name like "
                f"{names[1]} or model.norm, or a regular expression for it"
            )
        if ends := found.intersection(_ENDS):
            raise ConfigError(
                f"{setting}: {text!r} matches {' and '.join(sorted(ends))}, and embedding and head are not trained whole. "
                "Name the layers' linears and norms"
            )
        matched |= found
    return matched


def _refuse_quantized(names: set[str], shape: Shape, quant: Quant) -> None:
    linears = [name for name in shape.linear_names() if name in names and name not in shape.unquantized]
    if quant != "none" and linears:
        raise ConfigError(
            f"train.unfreeze: {first_few(linears)} {'is' if len(linears) == 1 else 'are'} stored in {quant} (model.quant), whose codes "
            "have no gradient. Set model.quant: none, or unfreeze the norms alone and adapt the linears by lora"
        )
