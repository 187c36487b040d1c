"""Curves of runs as drawings in SVG: a plot for each number, with a line for each run."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lora.text import GIB

MOST_POINTS = 1000  # per curve

Line = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

# Of the Tableau 10 and of ColorBrewer: each can be told from the others and from white by a reader who sees few colours.
COLOURS = ("#4e79a7", "#e15759", "#2f7f4f", "#b07aa1", "#9c6b30", "#1b7f8c", "#6b6b6b", "#c2187a")


@dataclass(frozen=True)
class Curve:
    """One plot: a number of each step's line and, optionally, one of each evaluation as dots."""

    key: str
    title: str
    of_evaluations: str | None = None
    is_log: bool = False
    divisor: float = 1.0


CURVES = (
    Curve("loss", "loss per trained token", of_evaluations="eval_loss"),
    Curve("eval_exact_match", "exact match on held-out samples", of_evaluations="eval_exact_match"),
    Curve("grad_norm", "gradient norm, before clipping", is_log=True),
    Curve("lr", "learning rate"),
    Curve("tokens_per_s", "tokens/s, all ranks"),
    Curve("step_s", "seconds per step"),
    Curve("peak_bytes", "peak memory of the first rank, GiB", divisor=GIB),
)


@dataclass(frozen=True)
class Series:
    """One run's lines of metrics; ``label`` names it in the plots' legends."""

    label: str
    steps: Sequence[Line]
    evaluations: Sequence[Line]


def number(line: Line, key: str) -> float:
    """A number of a line; NaN if it has none."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not abs(value) >= 2**1000 else math.nan


def plots(runs: Sequence[Series]) -> Iterator[str]:
    """The SVG of each curve of which any run has a point."""
    for curve in CURVES:
        drawn = [(run.label, _line_of(run, curve), _dots_of(run, curve)) for run in runs]
        if any(math.isfinite(y) for _, line, dots in drawn for _, y in [*line, *dots]):
            yield _svg(curve, drawn)


def _line_of(run: Series, curve: Curve) -> Points:
    return _points(run.steps, curve.key, divisor=curve.divisor)


def _dots_of(run: Series, curve: Curve) -> Points:
    return _points(run.evaluations, curve.of_evaluations, divisor=curve.divisor) if curve.of_evaluations else []


def _points(lines: Sequence[Line], key: str, *, divisor: float) -> Points:
    """Steps and values, averaged to at most ``MOST_POINTS`` a curve; a mean of a NaN is NaN."""
    size = math.ceil(len(lines) / MOST_POINTS) or 1
    points = [(float(line["step"]), number(line, key) / divisor) for line in lines]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in (points[at : at + size] for at in range(0, len(points), size))
    ]


def _svg(curve: Curve, runs: Sequence[tuple[str, Points, Points]]) -> str:
    # Imported here because it takes a second. No pyplot, which keeps global state.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    has_legend = _draw_one(axes, runs[0]) if len(runs) == 1 else _draw_several(axes, runs)
    if has_legend:
        axes.legend(frameon=False)
    finite = [y for _, line, dots in runs for _, y in [*line, *dots] if math.isfinite(y)]
    if curve.is_log and all(y > 0 for y in finite):
        axes.set_yscale("log")
    axes.set_title(curve.title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.StringIO()
    # Text stays text; ids are unique to each curve, since all drawings are on one page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.key}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    # What a screen reader says of a drawing.
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{curve.title}, by step" ', 1)


def _draw_one(axes: Any, run: tuple[str, Points, Points]) -> bool:
    """A run alone: its steps and its evaluations in two colours; whether these need a legend."""
    _, line, dots = run
    if any(math.isfinite(y) for _, y in line):
        axes.plot([x for x, _ in line], [y for _, y in line], color=COLOURS[0], linewidth=1.2, label="training")
    if dots:
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o-", color=COLOURS[1], markersize=4, label="held out")
    return bool(dots)


def _draw_several(axes: Any, runs: Sequence[tuple[str, Points, Points]]) -> bool:
    """Each run in a colour of its own; its evaluations are dots on a dashed line."""
    for at, (label, line, dots) in enumerate(runs):
        colour = COLOURS[at % len(COLOURS)]
        if any(math.isfinite(y) for _, y in line):
            axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=1.2, label=label)
            label = f"{label}, held out"
        if dots:
            axes.plot([x for x, _ in dots], [y for _, y in dots], "o--", color=colour, markersize=4, label=label)
    return True
