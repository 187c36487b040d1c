"""Measurements of a machine (``dist-lora doctor --out FILE``), used in place of a vendor's figures. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_lora.config.schema import QUANTIZED
from dist_lora.errors import ConfigError, cannot_write
from dist_lora.files import write_output

FORMAT = 1
Range = tuple[float, float]  # from slow to fast, per second


@dataclass(frozen=True)
class Product:
    """Operations per second of a matmul of ``(tokens, width)`` and ``(out, width)``; of attention over tokens, heads, widths."""

    tokens: int
    width: int
    out: int
    flops_per_s: Range


@dataclass(frozen=True)
class AtSize:
    """Bytes per second at ``num_bytes``: of elementwise work, by its result; of a collective, by its whole tensor."""

    num_bytes: int
    bytes_per_s: Range


@dataclass(frozen=True)
class Link:
    """A collective along an axis: bytes that a rank receives per second, as in a ring, and the latency of a small one."""

    by_size: tuple[AtSize, ...]
    latency_s: float

    def bytes_per_s(self, num_bytes: float) -> Range:
        """The rate at the nearest measured size."""
        return _nearest_size(self.by_size, num_bytes)


@dataclass(frozen=True)
class Measured:
    """The rates that a rank reaches while all ranks of the machine are busy.

    Args:
        device: in words; a GPU if ``is_gpu``, else a CPU.
        dtype: bf16 or fp32, of the measured matmuls.
        memory_bytes: of a rank's device; on a CPU a rank's share of the host's.
        attention: forward and backward of one document: its tokens, heads (``width``) and width of a head (``out``).
        dense_weights_per_s: by quantization, weights dequantized per second.
        elementwise: work that reads and writes every number once, by size.
        call_s: time of a call of a small operator, with its share of the backward.
        links: by axis ("within a node", "between nodes", "over all ranks") and collective ("all-gather", "all-reduce").
    """

    device: str
    is_gpu: bool
    dtype: str
    num_nodes: int
    ranks_per_node: int
    memory_bytes: int
    host_bytes: int
    products: tuple[Product, ...]
    attention: tuple[Product, ...]
    dense_weights_per_s: Mapping[str, Range]
    elementwise: tuple[AtSize, ...]
    call_s: float
    links: Mapping[str, Mapping[str, Link]]

    def product_flops_per_s(self, tokens: int, width: int, out: int) -> Range:
        """The rate of the measured matmul that is nearest in all three sizes."""
        return _nearest(self.products, (tokens, width, out)).flops_per_s

    def attention_flops_per_s(self, tokens: int, heads: int, head_dim: int) -> Range:
        """The rate of the nearest measured document."""
        return _nearest(self.attention, (tokens, heads, head_dim)).flops_per_s

    def elementwise_bytes_per_s(self, num_bytes: float) -> Range:
        """The rate at the nearest measured size."""
        return _nearest_size(self.elementwise, num_bytes)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, **asdict(self)}


def _nearest_size(rates: Iterable[AtSize], num_bytes: float) -> Range:
    return min(rates, key=lambda rate: abs(math.log(rate.num_bytes / max(1.0, num_bytes)))).bytes_per_s


def _nearest(products: Iterable[Product], sizes: tuple[int, int, int]) -> Product:
    def distance(product: Product) -> float:
        pairs = zip((product.tokens, product.width, product.out), sizes, strict=True)
        return sum(math.log(measured / wanted) ** 2 for measured, wanted in pairs)

    return min(products, key=distance)


def write_measured(measured: Measured, path: Path) -> None:
    """Write the measurements to a file.

    Raises:
        SaveError: the file can't be written.
    """
    try:
        write_output(path, json.dumps(measured.to_json(), indent=1) + "\n")
    except OSError as error:
        raise cannot_write(
            f"--out: {path} can't be written: {error.strerror or error}. Name a file in a writable folder.", error
        ) from error


def read_measured(path: Path) -> Measured:
    """The measurements in a file of ``dist-lora doctor --out``.

    Raises:
        ConfigError: there is no such file, or it isn't one of measurements.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise ValueError("it was written by another version")
        links = {
            axis: {kind: Link(_at_sizes(link["by_size"]), _above_0(link["latency_s"])) for kind, link in kinds.items()}
            for axis, kinds in tree["links"].items()
        }
        return Measured(
            device=str(tree["device"]),
            is_gpu=bool(tree["is_gpu"]),
            dtype=_one_of(tree["dtype"], ("bf16", "fp32")),
            num_nodes=_count(tree["num_nodes"]),
            ranks_per_node=_count(tree["ranks_per_node"]),
            memory_bytes=_count(tree["memory_bytes"]),
            host_bytes=_count(tree["host_bytes"]),
            products=_products(tree["products"]),
            attention=_products(tree["attention"]),
            dense_weights_per_s={name: _range(tree["dense_weights_per_s"][name]) for name in QUANTIZED},
            elementwise=_at_sizes(tree["elementwise"]),
            call_s=_above_0(tree["call_s"]),
            links=links,
        )
    except OSError as error:
        raise ConfigError(f"--measured: {path}: {error.strerror or error}. {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--measured: {path} is not a file of measurements ({type(error).__name__}: {error}). {_REMEDY}"
        ) from error


_REMEDY = "Make one: dist-lora doctor --out FILE, with as many ranks as a run has."


def _products(rows: object) -> tuple[Product, ...]:
    return tuple(
        Product(_count(row["tokens"]), _count(row["width"]), _count(row["out"]), _range(row["flops_per_s"]))
        for row in _rows(rows)
    )


def _at_sizes(rows: object) -> tuple[AtSize, ...]:
    return tuple(AtSize(_count(row["num_bytes"]), _range(row["bytes_per_s"])) for row in _rows(rows))


def _rows(rows: object) -> list[Mapping[str, Any]]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("a table has no rows")
    return rows


def _range(pair: object) -> Range:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{pair!r} is not slow and fast")
    slow, fast = _above_0(pair[0]), _above_0(pair[1])
    if slow > fast:
        raise ValueError(f"{slow:g} is not slower than {fast:g}")
    return slow, fast


def _above_0(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a number above 0")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a whole number of at least 1")
    return value


def _one_of(value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is not one of {', '.join(choices)}")
    return str(value)


def slowest_of(ranges: Iterable[Range]) -> Range:
    """The rate of the slowest rank, which a step waits for."""
    pairs = list(ranges)
    return min(slow for slow, _ in pairs), min(fast for _, fast in pairs)
