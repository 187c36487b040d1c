"""What runs have learned as drawings in SVG: the size and the effective rank of each linear's change, and singular values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lora.config.schema import LINEARS
from dist_lora.lora.learned import Learned, LearnedLinear
from dist_lora.run_folder.curves import COLOURS, new_figure, svg_of
from dist_lora.text import figure as digits

_NO_ADAPTER = "#e8e8e8"  # no colour of the map
# Told apart by readers who see few colours and on paper; its lightness grows with the number.
_COLOUR_MAP = "viridis"
_WIDE = 4.0  # times the smallest: beyond it a scale is logarithmic
_NUM_TICKS = 5
_MOST_EDGED = 40  # layers: with more, edges would hide the cells


@dataclass(frozen=True)
class LearnedOfRun:
    """One run's record; ``key`` is unique on its page. ``num_layers``: of its model, as far as it is known."""

    key: str
    record: Learned
    num_layers: int

    @property
    def is_relative(self) -> bool:
        """Whether changes are shown as parts of W."""
        return self.record.has_weight_norms


def learned_plots(runs: Sequence[LearnedOfRun]) -> list[list[str]]:
    """Three drawings of each run. Those of one kind have the same scale in all runs."""
    ranks = _range([linear.effective_rank for run in runs for linear in run.record.linears])
    most = max((linear.rank for run in runs for linear in run.record.linears), default=1)
    return [
        [
            _heat_map(
                run,
                _size_of(run),
                name="size",
                title=f"norm of dW by layer{', % of W' if run.is_relative else ''}",
                limits=_range(
                    [
                        _size_of(other)(linear)
                        for other in runs
                        if other.is_relative == run.is_relative
                        for linear in other.record.linears
                    ]
                ),
            ),
            _heat_map(
                run,
                lambda linear: linear.effective_rank,
                name="rank",
                title="effective rank of dW by layer",
                limits=ranks,
            ),
            _singular_values(run, most=most),
        ]
        for run in runs
    ]


def _size_of(run: LearnedOfRun) -> Callable[[LearnedLinear], float]:
    times = 100.0 if run.is_relative else 1.0
    return lambda linear: times * run.record.size_of(linear)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest; of equal ones a range around them."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (0.9 * low, 1.1 * high) if high > 0 else (0.0, 1.0)


def _is_log(limits: tuple[float, float]) -> bool:
    """Whether one outlier would leave the other cells alike."""
    low, high = limits
    return low > 0 and high / low > _WIDE


def _ticks(limits: tuple[float, float]) -> list[float]:
    """From one end of a scale to the other."""
    low, high = limits
    shares = [number / (_NUM_TICKS - 1) for number in range(_NUM_TICKS)]
    return [low * (high / low) ** share if _is_log(limits) else low + (high - low) * share for share in shares]


def _heat_map(
    run: LearnedOfRun, value_of: Callable[[LearnedLinear], float], *, name: str, title: str, limits: tuple[float, float]
) -> str:
    """A cell for each linear, layers from left to right; those without an adapter are grey."""
    values = {(linear.linear, linear.layer): value_of(linear) for linear in run.record.linears}
    num_layers = max(run.num_layers, 1 + max(layer for _, layer in values))
    cells = [[values.get((linear, layer), math.nan) for layer in range(num_layers)] for linear in LINEARS]
    figure, axes = new_figure(title, x="layer")
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5} if num_layers <= _MOST_EDGED else {}
    drawn = axes.pcolormesh(
        [layer - 0.5 for layer in range(num_layers + 1)],
        [row - 0.5 for row in range(len(LINEARS) + 1)],
        cells,
        cmap=_COLOUR_MAP,
        norm="log" if _is_log(limits) else "linear",
        **edges,
    )
    drawn.set_clim(*limits)
    axes.set_facecolor(_NO_ADAPTER)
    axes.set_yticks(range(len(LINEARS)), LINEARS)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.minorticks_off()
    bar.set_ticks(_ticks(limits), labels=[digits(tick) for tick in _ticks(limits)])
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(False)  # else a picture in pixels within the drawing
    bar.solids.set_edgecolor("face")
    shown = [value for row in cells for value in row if math.isfinite(value)]
    return svg_of(
        figure,
        key=f"{name}/{run.key}",
        label=f"{title} and projection, {digits(min(shown))} to {digits(max(shown))}",
    )


def _singular_values(run: LearnedOfRun, *, most: int) -> str:
    """The median over the layers of each projection, and the range of all, each linear's largest as 1."""
    title = "singular values of dW, the largest as 1: medians and range"
    shares: dict[str, list[list[float]]] = {}
    for linear in run.record.linears:
        largest = linear.singular_values[0]
        if largest > 0:
            shares.setdefault(linear.linear, []).append([value / largest for value in linear.singular_values])
    figure, axes = new_figure(title, x="direction")
    every = _by_direction([one for of_one in shares.values() for one in of_one])
    numbers = range(1, len(every) + 1)
    axes.fill_between(numbers, list(map(min, every)), list(map(max, every)), color=_NO_ADAPTER, linewidth=0)
    for at, name in enumerate(name for name in LINEARS if name in shares):
        medians = [statistics.median(values) for values in _by_direction(shares[name])]
        style = "o-" if LINEARS.index(name) < 4 else "s--"  # attention, and what follows it
        axes.plot(
            range(1, len(medians) + 1), medians, style, color=COLOURS[at], linewidth=1.2, markersize=3, label=name
        )
    axes.set_xlim(1 - 0.02 * most, most + 0.02 * most)
    axes.set_ylim(0, 1.04)
    if shares:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    return svg_of(figure, key=f"values/{run.key}", label=title)


def _by_direction(of_linears: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of each direction the values of all linears that have so many."""
    return [
        [values[number] for values in of_linears if number < len(values)]
        for number in range(max(map(len, of_linears), default=0))
    ]
