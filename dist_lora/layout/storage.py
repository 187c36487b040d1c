"""Bytes of the base's weights in each storage format."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import assert_never

from dist_lora.config.schema import Quant
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape, module_path

FP32 = 4  # bytes per number
NF4_BLOCK = 64  # weights that share a scale


def nf4_refusal(out: int, width: int) -> str | None:
    """Why a matrix ``(out, width)`` can't be stored in NF4, or None if it can: its rows must be whole blocks."""
    if width % NF4_BLOCK == 0:
        return None
    return (
        f"nf4 splits each row into blocks of {NF4_BLOCK} weights, and a linear of ({out:,}, {width:,}) "
        f"has {width % NF4_BLOCK} left over in each: set model.quant to int8 or none."
    )


def check_quant(shape: Shape, quant: Quant, model_name: str | None) -> None:
    """Raise ``ConfigError`` if a linear of the model can't be quantized to ``quant``."""
    for linear, sizes in quantized_linears(shape).items() if quant == "nf4" else ():
        why = nf4_refusal(*sizes)
        if why is not None:
            raise ConfigError(f"model.quant: nf4 can't store {model_name}: {linear}: {why}")


def quantized_linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears that a quantized base quantizes in some layer: all but those of ``shape.unquantized``."""
    shapes = shape.linear_shapes()
    if not shape.unquantized:
        return shapes
    chosen = {name.rpartition(".")[2] for name in shape.linear_names() if name not in shape.unquantized}
    return {linear: sizes for linear, sizes in shapes.items() if linear in chosen}


def quantized_share(shape: Shape) -> float:
    """The part of the linears' weights that a quantized base quantizes: 1, unless a publisher left some unquantized."""
    if not shape.unquantized:
        return 1.0
    sizes = {linear: out * width for linear, (out, width) in shape.linear_shapes().items()}
    left = sum(sizes[name.rpartition(".")[2]] for name in shape.unquantized)
    return 1 - left / (shape.num_layers * shape.weights_of_linears())


@dataclass(frozen=True)
class BasePart:
    """A frozen parameter: ``rows`` rows of ``row_bytes``; ``block`` is its layer, None outside the layers.

    ``item_bytes`` of each number as it is stored; 1 for a quantized layer of which only its size is known.
    """

    name: str
    rows: int
    row_bytes: int
    block: int | None
    item_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.rows * self.row_bytes

    def shard_bytes(self, num_ranks: int) -> int:
        """Bytes of the largest shard, sharded by rows."""
        return math.ceil(self.rows / num_ranks) * self.row_bytes


def base_parts(shape: Shape, *, quant: Quant, item_bytes: int, unfrozen: Collection[str] = ()) -> list[BasePart]:
    """Every frozen parameter as a run stores it: the layers' linears quantized, everything else in ``item_bytes``.

    So are the linears of ``shape.unquantized``. Those of ``unfrozen`` are trained, and no part of it.

    With ``shape.given_parameters`` a layer is one part, of as many rows of the hidden size as its weights fill, rounded up.
    """
    parts = [BasePart("embed_tokens", shape.vocab, shape.hidden * item_bytes, None, item_bytes)]
    for layer in range(shape.num_layers):
        if shape.given_parameters is not None:
            row_bytes = sum(size for _, size, _ in _row_bytes(quant, shape.hidden, item_bytes))
            rows = math.ceil(shape.weights_of_a_layer() / shape.hidden)
            parts.append(BasePart("weights", rows, row_bytes, layer, item_bytes if quant == "none" else 1))
            continue
        for name, (out, width) in shape.linear_shapes().items():
            if module_path(name, layer=layer) in unfrozen:
                continue
            kept = "none" if module_path(name, layer=layer) in shape.unquantized else quant
            parts += [
                BasePart(f"{name}.{part}", out, row_bytes, layer, size)
                for part, row_bytes, size in _row_bytes(kept, width, item_bytes)
            ]
        norms = [f"model.layers.{layer}.{norm}" for norm in ("input_layernorm", "post_attention_layernorm")]
        parts += [
            BasePart(f"norm{i}", shape.hidden, item_bytes, layer, item_bytes)
            for i, norm in enumerate(norms, 1)
            if norm not in unfrozen
        ]
    if shape.given_parameters is None and "model.norm" not in unfrozen:
        parts.append(BasePart("norm", shape.hidden, item_bytes, None, item_bytes))
    if not shape.tied:
        parts.append(BasePart("lm_head", shape.vocab, shape.hidden * item_bytes, None, item_bytes))
    return parts


def _row_bytes(quant: Quant, width: int, item_bytes: int) -> Iterator[tuple[str, int, int]]:
    """The parts of a linear: their name, the bytes of a row, and of each number."""
    match quant:
        case "none":
            yield "weight", width * item_bytes, item_bytes
        case "nf4":
            yield "codes", width // 2, 1
            yield "absmax", FP32 * (width // NF4_BLOCK), FP32
        case "int8":
            yield "codes", width, 1
            yield "scale", FP32, FP32
        case _:
            assert_never(quant)
