"""A self-contained HTML page about a run: what was trained, its curves, evaluations and settings."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.checkpoint.folders import step_folders
from dist_lora.config.load import load_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, cannot_write
from dist_lora.files import file_exists, no_folder, write_output
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE
from dist_lora.run_folder.records import read_lines
from dist_lora.run_folder.status import describe_status
from dist_lora.text import GIB, duration, span

REPORT_FILE = "report.html"
TEMPLATE = "report.html.jinja"
MOST_POINTS = 1000  # per curve
MOST_EVALUATIONS = 200  # the newest, as rows of the table

Line = Mapping[str, Any]


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


def write_report(folder: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run, which may still be running; returns its file.

    Needs no torch, no GPU and no model. The page loads nothing from the network.

    Args:
        folder: of the run, as ``runs/NAME``.
        out: the page; default: ``report.html`` in the run's folder.

    Raises:
        ConfigError: there is no run, or it has done no step; its ``config.yaml`` can't be read.
        SaveError: the page can't be written.
    """
    path = out or folder / REPORT_FILE
    page = _page(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, page)
    except OSError as error:
        raise cannot_write(
            f"{path}: can't be written: {error.strerror or error}. Name another file with --out.", error
        ) from error
    return path


def _page(folder: Path) -> str:
    from jinja2 import Environment, PackageLoader

    config = _config_of(folder)
    steps, evaluations = _lines(folder / METRICS_FILE), _lines(folder / EVALUATIONS_FILE)
    if not steps:
        raise ConfigError(f"{folder}: {METRICS_FILE} has no step yet; a report needs at least one")
    template = Environment(
        loader=PackageLoader("dist_lora", "run_folder"), autoescape=True, keep_trailing_newline=True
    ).get_template(TEMPLATE)
    return template.render(
        title=config.run,
        status=describe_status(folder).text.removeprefix(f"{folder}: "),
        facts=list(_facts(folder, config, steps, evaluations)),
        plots=list(_plots(steps, evaluations)),
        mean_of=math.ceil(len(steps) / MOST_POINTS),
        evaluations=_table(evaluations),
        settings=(folder / "config.yaml").read_text(encoding="utf-8"),
    )


def _config_of(folder: Path) -> Config:
    problem = no_folder(folder)
    if problem is None and not file_exists(folder / "config.yaml"):
        problem = "is a folder without config.yaml"
    if problem is not None:
        raise ConfigError(f"{folder}: {problem}; expected a run's folder, as runs/NAME (dist-lora train makes it)")
    return load_config(folder / "config.yaml")


def _lines(path: Path) -> list[Line]:
    return list(read_lines(path)) if path.exists() else []


def _number(line: Line, key: str) -> float:
    """A number of a line; NaN if it has none."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not abs(value) >= 2**1000 else math.nan


def _all(lines: Sequence[Line], key: str) -> list[float]:
    """The finite numbers of all lines; a zero if there is none."""
    return [number for line in lines if math.isfinite(number := _number(line, key))] or [0.0]


# Facts


def _facts(
    folder: Path, config: Config, steps: Sequence[Line], evaluations: Sequence[Line]
) -> Iterator[tuple[str, str]]:
    """Names and values, in the order of interest."""
    summary = _summary_of(folder)
    yield "model", f"{config.model.name} ({'unquantized' if config.model.quant == 'none' else config.model.quant})"
    yield (
        "adapters",
        f"rank {span(config.lora.ranks())}, alpha {span(config.lora.alphas())}, on {', '.join(config.lora.target_names())}",
    )
    if {"trainable", "frozen"} <= summary.keys():
        trained, frozen = int(summary["trainable"]), int(summary["frozen"])
        yield "weights", f"{trained:,} trained, {frozen:,} frozen ({trained / frozen:.2%})"
    yield "steps", f"{steps[-1]['step']:,}" + (f" of {summary['steps']:,}" if "steps" in summary else "")
    yield "loss", f"{_number(steps[0], 'loss'):.4f} at the first step, {_number(steps[-1], 'loss'):.4f} at the last"
    held_out = {int(line["step"]): _number(line, "eval_loss") for line in evaluations}
    if held_out:
        best = min(held_out, key=lambda step: (math.isnan(held_out[step]), held_out[step]))
        yield (
            "held-out loss",
            f"{held_out[max(held_out)]:.4f} at the last evaluation, best {held_out[best]:.4f} at step {best:,}",
        )
    yield "tokens", f"{sum(_all(steps, 'tokens')):,.0f}, {sum(_all(steps, 'target_tokens')):,.0f} trained on"
    speed = statistics.median(_all(steps, "tokens_per_s"))
    yield "time", f"{duration(sum(_all(steps, 'step_s')))} in steps, {speed:,.0f} tokens/s median"
    peaks = summary.get("peak_bytes") or [max(_all(steps, "peak_bytes"))]
    yield (
        "peak memory",
        f"{', '.join(f'{peak / GIB:.2f}' for peak in peaks)} GiB"
        + ("" if "peak_bytes" in summary else " (of the first rank)"),
    )
    saved = sorted(step_folders(folder / "checkpoints"))
    yield "checkpoints", ", ".join(f"{step:,}" for step in saved) if saved else "none"
    adapter = folder / "adapter" / "adapter_model.safetensors"
    if adapter.is_file():
        yield "adapter", f"{adapter}: {adapter.stat().st_size / 1e6:.1f} MB"


def _summary_of(folder: Path) -> dict[str, Any]:
    """The summary that a run writes at its end; empty before."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _table(evaluations: Sequence[Line]) -> list[list[str]]:
    """The evaluations' numbers as rows under a row of their names; empty if there are none."""
    if not evaluations:
        return []
    names = list(dict.fromkeys(itertools.chain.from_iterable(evaluations)))
    rows = [
        [f"{line['step']:,}" if name == "step" else f"{_number(line, name):.4f}" for name in names]
        for line in evaluations[-MOST_EVALUATIONS:]
    ]
    return [[name.removeprefix("eval_").replace("_", " ") for name in names], *rows]


# Curves


def _plots(steps: Sequence[Line], evaluations: Sequence[Line]) -> Iterator[str]:
    """SVG of each curve that has a point."""
    for curve in CURVES:
        line = _points(steps, curve.key, divisor=curve.divisor)
        dots = _points(evaluations, curve.of_evaluations, divisor=curve.divisor) if curve.of_evaluations else []
        if any(math.isfinite(y) for _, y in [*line, *dots]):
            yield _svg(curve, line, dots)


def _points(lines: Sequence[Line], key: str, *, divisor: float) -> list[tuple[float, float]]:
    """Steps and values, averaged to at most ``MOST_POINTS`` a curve; a mean of a NaN is NaN."""
    size = math.ceil(len(lines) / MOST_POINTS) or 1
    points = [(float(line["step"]), _number(line, key) / divisor) for line in lines]
    return [
        (statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part))
        for part in (points[at : at + size] for at in range(0, len(points), size))
    ]


def _svg(curve: Curve, line: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]]) -> str:
    # Imported here because it takes a second. No pyplot, which keeps global state.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    finite = [y for _, y in [*line, *dots] if math.isfinite(y)]
    if any(math.isfinite(y) for _, y in line):
        axes.plot([x for x, _ in line], [y for _, y in line], color="#4e79a7", linewidth=1.2, label="training")
    if dots:
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o-", color="#e15759", markersize=4, label="held out")
        axes.legend(frameon=False)
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
    return text[text.index("<svg") :]
