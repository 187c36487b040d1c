"""What an adapter has learned, linear by linear: the singular values of dW = scale B A, and W's norm. Needs no torch.

``learned.json`` in an adapter's folder records both, bound to the adapter's tensors by their checksum. W is the base's
weight as its files hold it: before ``model.quant`` rounds it, which changes a norm by less than 1 %.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_lora.config.schema import LINEARS, MODULE_NAME, ModuleAdapter
from dist_lora.errors import AdapterError
from dist_lora.files import file_exists, links_out, write_whole
from dist_lora.lora.origin import ORIGIN_FILE, read_adapter_json
from dist_lora.text import count, figure, first_few, span

LEARNED_FILE = "learned.json"
FORMAT = 1
SHARE = 0.9  # of the squared norm, for ``directions``
_DIGITS = 7  # those of fp32

_SMALLEST = 1e-50  # no weight in fp32 has a norm between zero and this

# Beyond what products of fp32 can be, and within what their squares may be in fp64.
Size = Annotated[float, Field(ge=0, le=1e100)]


@dataclass(frozen=True)
class LearnedLinear:
    """One linear's change dW = scale B A.

    Args:
        singular_values: of dW, R of them, the largest first; all zero if B or A is.
        weight_norm: the Frobenius norm of W; None if it isn't known.
    """

    name: str
    singular_values: tuple[float, ...]
    weight_norm: float | None = None

    @property
    def layer(self) -> int:
        """The layer of its linear."""
        return int(self.name.split(".")[2])

    @property
    def linear(self) -> str:
        """The last part of its linear's name."""
        return self.name.rpartition(".")[2]

    @property
    def rank(self) -> int:
        """LoRA's rank R here: the most directions that dW can have."""
        return len(self.singular_values)

    @property
    def norm(self) -> float:
        """The Frobenius norm of dW."""
        return math.hypot(*self.singular_values)

    @property
    def relative(self) -> float | None:
        """The norm of dW as a part of W's; None if that isn't known or is zero."""
        return None if not self.weight_norm or self.weight_norm < _SMALLEST else self.norm / self.weight_norm

    @property
    def effective_rank(self) -> float:
        """exp(-sum p log p) with p = s / sum(s): R if all directions are equally strong, 1 if there is one, 0 without any.

        Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
        """
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values if value / (total or 1.0) > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def directions(self) -> int:
        """The fewest directions that hold ``SHARE`` of dW's squared norm; 0 if dW is zero."""
        largest = self.singular_values[0]
        squares = [(value / largest) ** 2 for value in self.singular_values] if largest else []
        enough, held = SHARE * math.fsum(squares), 0.0
        for number, square in enumerate(squares, 1):
            held += square
            if held >= enough * (1 - 1e-9):  # a sum in another order
                return number
        return 0


@dataclass(frozen=True)
class Learned:
    """What an adapter has learned on each of its linears, in the model's order."""

    linears: tuple[LearnedLinear, ...]

    @cached_property
    def has_weight_norms(self) -> bool:
        """Whether W's norm is known, and not zero, for every linear."""
        return all(linear.relative is not None for linear in self.linears)

    def size_of(self, linear: LearnedLinear) -> float:
        """How large a change is: as a part of W, or the norm of dW where W's isn't known of every linear."""
        relative = linear.relative if self.has_weight_norms else None
        return linear.norm if relative is None else relative

    def to_json(self) -> dict[str, Any]:
        """By the linears' names: as recorded."""
        return {
            linear.name: {
                "singular_values": [_rounded(value) for value in linear.singular_values],
                "weight_norm": None if linear.weight_norm is None else _rounded(linear.weight_norm),
            }
            for linear in self.linears
        }


def learned_from(
    values: Mapping[str, Sequence[float]], weight_norms: Mapping[str, float], modules: Iterable[ModuleAdapter]
) -> Learned:
    """What is recorded of ``modules``: their singular values, and the norms of W as far as they are known."""
    in_order = sorted(modules, key=lambda module: (module.layer, LINEARS.index(module.linear)))
    return Learned(
        tuple(
            LearnedLinear(module.name, tuple(values[module.name]), weight_norms.get(module.name)) for module in in_order
        )
    )


# The file


class _Linear(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    singular_values: list[Size] = Field(min_length=1)
    weight_norm: Size | None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    weights: str | None
    linears: dict[Annotated[str, Field(pattern=MODULE_NAME)], _Linear] = Field(min_length=1)


def write_learned(folder: Path, record: Learned, *, weights: str | None) -> None:
    """Write ``learned.json`` into an adapter's folder, whole or not at all.

    Args:
        weights: the checksum of the adapter's tensors; None for an adapter without one (PEFT's).

    Raises:
        OSError: it can't be written.
    """
    content = {"format": FORMAT, "weights": weights, "linears": record.to_json()}
    write_whole(folder / LEARNED_FILE, json.dumps(content) + "\n")


def read_learned(folder: Path) -> Learned | None:
    """What is recorded in an adapter's folder; None if nothing is: it was written by PEFT, or by an older version.

    Raises:
        AdapterError: the record is damaged, is of other tensors than those beside it, or a link out of the folder.
    """
    file = folder / LEARNED_FILE
    if not file_exists(file):
        return None
    if links := links_out(folder, (LEARNED_FILE, ORIGIN_FILE)):
        raise AdapterError(
            f"{folder} has links that point outside of it: {first_few(links)}. Nothing is read from there: put the files "
            "themselves into the folder."
        )
    again = f"Remove it, and compute it anew: dist-lora learned {folder}"
    try:
        recorded = _File.model_validate(read_adapter_json(file))
    except ValidationError as error:
        fault = error.errors()[0]
        raise AdapterError(f"{file} is damaged: {'.'.join(map(str, fault['loc']))}: {fault['msg']}. {again}") from error
    if recorded.format != FORMAT:
        raise AdapterError(f"{file} has format {recorded.format}, and format {FORMAT} is supported. Update dist-lora.")
    origin = folder / ORIGIN_FILE
    weights = read_adapter_json(origin).get("weights") if file_exists(origin) else None
    if weights is not None and weights != recorded.weights:
        raise AdapterError(
            f"{file} was computed from other weights ({recorded.weights}) than those beside it ({weights}). {again}"
        )
    return Learned(
        tuple(
            LearnedLinear(name, tuple(sorted(one.singular_values, reverse=True)), one.weight_norm)
            for name, one in recorded.linears.items()
        )
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


# In words


def learned_table(record: Learned) -> list[list[str]]:
    """A row for each projection under a row of heads: how much changed, and in how many directions."""
    of = "|dW| / |W|" if record.has_weight_norms else "|dW|"
    rows = [
        [
            "",
            "linears",
            "rank",
            f"{of}, median",
            "largest",
            "in layer",
            "effective rank, median",
            f"directions for {SHARE:.0%}, median",
        ]
    ]
    for name in LINEARS:
        linears = [linear for linear in record.linears if linear.linear == name]
        if not linears:
            continue
        largest = max(linears, key=record.size_of)
        rows.append(
            [
                name,
                f"{len(linears):,}",
                span(linear.rank for linear in linears),
                _size(statistics.median(map(record.size_of, linears)), record),
                _size(record.size_of(largest), record),
                str(largest.layer),
                figure(statistics.median(linear.effective_rank for linear in linears)),
                f"{statistics.median(linear.directions for linear in linears):g}",
            ]
        )
    return rows


def sentences(record: Learned) -> Iterator[str]:
    """Where most changed, and in how many directions, of the numbers at hand."""
    changed = [linear for linear in record.linears if linear.norm > 0]
    if not changed:
        yield f"Nothing is learned: dW is zero in all {count(len(record.linears), 'linear')}."
        return
    if len(changed) < len(record.linears):
        yield f"dW is zero in {len(record.linears) - len(changed):,} of {count(len(record.linears), 'linear')}."
    most = sorted(changed, key=record.size_of, reverse=True)
    sizes = dict.fromkeys(_size(record.size_of(linear), record) for linear in (most[-1], most[0]))
    subject = "dW is {} of W by norm" if record.has_weight_norms else "The norm of dW is {}"
    where = ", ".join(f"layer {linear.layer} {linear.linear}" for linear in most[:3])
    yield f"{subject.format(' to '.join(sizes))}, most in {where}."
    half = statistics.median_low([linear.directions for linear in changed])
    rank = span(linear.rank for linear in changed)
    middle = figure(statistics.median(linear.effective_rank for linear in changed))
    of_half = f"In half of the {count(len(changed), 'linear')}, " if len(changed) > 1 else ""
    yield (
        f"{of_half}{half} or fewer of {rank} directions hold {SHARE:.0%} of dW's squared "
        f"norm; the median effective rank is {middle}."
    )


def _size(value: float, record: Learned) -> str:
    return f"{figure(100 * value)}%" if record.has_weight_norms else figure(value)
