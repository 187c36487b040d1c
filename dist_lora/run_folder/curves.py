"""Curves of runs as drawings in SVG: a plot for each number, with a line for each run."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dist_lora.run_folder.records import number_of
from dist_lora.text import GIB

MOST_POINTS = 1000  # per curve

Line = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

OF_ALL = ("held out", "all held-out sets")  # the label of the only set, and of several together

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
    Curve(
        "eval_tool_right_arguments",
        "wanted tool calls with the right name and arguments",
        of_evaluations="eval_tool_right_arguments",
    ),
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
    value = number_of(line, key)
    return math.nan if value is None else value


def plots(runs: Sequence[Series]) -> Iterator[str]:
    """The SVG of each curve of which any run has a point."""
    for curve in [*CURVES, *_own_curves([line for run in runs for line in run.evaluations])]:
        drawn = [
            Drawn(run.label, _points(run.steps, curve.key, divisor=curve.divisor), _dots(run.evaluations, curve))
            for run in runs
        ]
        if any(math.isfinite(y) for run in drawn for points in [run.line, *run.dots.values()] for _, y in points):
            yield _svg(curve, drawn)


@dataclass(frozen=True)
class Drawn:
    """A run's part of a plot: its line, and the dots of each of its held-out sets by their label."""

    label: str
    line: Points
    dots: Mapping[str, Points]


def _names_of(evaluations: Sequence[Line]) -> list[str]:
    """The names of all numbers that an evaluation has, in the order in which they first occur."""
    return [name for name in dict.fromkeys(itertools.chain.from_iterable(evaluations)) if name != "step"]


def _own_curves(evaluations: Sequence[Line]) -> Iterator[Curve]:
    """A plot for each other number of evaluations: a Guard's scores, tool calls, what a judge of the user's has printed."""
    known = {curve.of_evaluations for curve in CURVES} | {"eval_perplexity"}
    for name in dict.fromkeys(name.partition("/")[0] for name in _names_of(evaluations)):
        if name not in known:
            yield Curve(name, f"{name.removeprefix('eval_').replace('_', ' ')}, held out", of_evaluations=name)


def _dots(evaluations: Sequence[Line], curve: Curve) -> dict[str, Points]:
    """The points of each held-out set by their label in the plot; where there are several, of all sets together first."""
    key = curve.of_evaluations
    if key is None:
        return {}
    sets = [name for name in _names_of(evaluations) if name.startswith(f"{key}/")]
    named = {OF_ALL[1] if sets else OF_ALL[0]: key} | {name.removeprefix(f"{key}/"): name for name in sets}
    every = {label: _points(evaluations, name, divisor=curve.divisor) for label, name in named.items()}
    return {label: points for label, points in every.items() if any(math.isfinite(y) for _, y in points)}


def _points(lines: Sequence[Line], key: str, *, divisor: float) -> Points:
    """Steps and values, averaged to at most ``MOST_POINTS`` a curve; a mean of a NaN is NaN."""
    size = math.ceil(len(lines) / MOST_POINTS) or 1
    points = [(float(line["step"]), number(line, key) / divisor) for line in lines]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in (points[at : at + size] for at in range(0, len(points), size))
    ]


def new_figure(title: str, *, x: str) -> tuple[Any, Any]:
    """A figure of matplotlib's and its axes, with whole numbers on the x axis, which ``x`` names."""
    # Imported here because it takes a second. No pyplot, which keeps global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg_of(figure: Any, *, key: str, label: str) -> str:
    """A figure as SVG: its texts are texts, and its ids unique to ``key``, since all drawings are on one page.

    Args:
        label: what a screen reader says of it.
    """
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _svg(curve: Curve, runs: Sequence[Drawn]) -> str:
    figure, axes = new_figure(curve.title, x="step")
    has_legend = _draw_one(axes, runs[0]) if len(runs) == 1 else _draw_several(axes, runs)
    if has_legend:
        axes.legend(frameon=False)
    finite = [y for run in runs for points in [run.line, *run.dots.values()] for _, y in points if math.isfinite(y)]
    if curve.is_log and all(y > 0 for y in finite):
        axes.set_yscale("log")
    return svg_of(figure, key=curve.key, label=f"{curve.title}, by step")


def _draw_one(axes: Any, run: Drawn) -> bool:
    """A run alone: its steps and each held-out set in a colour of its own; whether these need a legend."""
    if any(math.isfinite(y) for _, y in run.line):
        axes.plot([x for x, _ in run.line], [y for _, y in run.line], color=COLOURS[0], linewidth=1.2, label="training")
    for at, (label, points) in enumerate(run.dots.items(), 1):
        colour = COLOURS[at % len(COLOURS)]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, markersize=4, label=label)
    return bool(run.dots)


def _draw_several(axes: Any, runs: Sequence[Drawn]) -> bool:
    """Each run in a colour of its own; its evaluations, of all sets together where that is known, are dots on a dashed line."""
    for at, run in enumerate(runs):
        colour = COLOURS[at % len(COLOURS)]
        has_line = any(math.isfinite(y) for _, y in run.line)
        if has_line:
            axes.plot([x for x, _ in run.line], [y for _, y in run.line], color=colour, linewidth=1.2, label=run.label)
        of_all = {label: points for label, points in run.dots.items() if label in OF_ALL} or run.dots
        for label, points in of_all.items():
            name = run.label if label in OF_ALL else f"{run.label}, {label}"
            label = f"{run.label}, held out" if has_line and label in OF_ALL else name
            axes.plot([x for x, _ in points], [y for _, y in points], "o--", color=colour, markersize=4, label=label)
    return True
