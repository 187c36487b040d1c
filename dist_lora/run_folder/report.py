"""A self-contained HTML page about a run, or several side by side: what was trained, curves, evaluations, answers, settings."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_lora.checkpoint.folders import step_folders
from dist_lora.config.changes import flat
from dist_lora.config.load import load_config
from dist_lora.config.schema import Config
from dist_lora.errors import AdapterError, ConfigError, cannot_write
from dist_lora.evaluation.tool_calls import by_set, rows_of
from dist_lora.files import file_exists, no_folder, write_output
from dist_lora.lora.adapter_folder import is_adapter_folder
from dist_lora.lora.learned import Learned, learned_table, read_learned, sentences
from dist_lora.lora.origin import facts_of
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, TOOL_CALLS_FILE, read_summary
from dist_lora.run_folder.curves import MOST_POINTS, Line, Series, number, plots
from dist_lora.run_folder.heat_maps import LearnedOfRun, learned_plots
from dist_lora.run_folder.records import read_lines
from dist_lora.run_folder.samples import Samples, read_samples
from dist_lora.run_folder.status import describe_status
from dist_lora.text import GIB, count, duration, span

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
TEMPLATE = "report.html.jinja"
MOST_EVALUATIONS = 200  # the newest, as rows of the table


@dataclass(frozen=True)
class _Learned:
    """What is known of what a run has learned, and what isn't, or why nothing is."""

    record: Learned | None
    num_layers: int
    note: str

    @property
    def sentences(self) -> list[str]:
        return [] if self.record is None else [*sentences(self.record)]

    @property
    def table(self) -> list[list[str]]:
        return [] if self.record is None else learned_table(self.record)


@dataclass(frozen=True)
class _ToolTables:
    """The tool calls of the last evaluation that counted them: by held-out set the rows of a table, the first with its heads."""

    step: int
    of_sets: dict[str, list[list[str]]]


@dataclass(frozen=True)
class _Run:
    """What a page tells of one run."""

    name: str
    status: str
    facts: dict[str, str]
    series: Series
    evaluations: list[list[str]]  # rows of a table, the first with its heads
    samples: Samples | None
    learned: _Learned
    tool_calls: _ToolTables | None
    settings: str
    flat_settings: dict[str, Any]


def write_report(folders: Path | Sequence[Path], *, out: Path | None = None) -> Path:
    """Write the page of a run, or of several side by side; they may still be running. Returns the page's file.

    Needs no torch, no GPU and no model. The page loads nothing from the network.

    Args:
        folders: of the runs, as ``runs/NAME``.
        out: the page; default: ``report.html`` in the run's folder, or ``comparison.html`` beside the first of several.

    Raises:
        ConfigError: there is no run, or it has done no step; its ``config.yaml`` can't be read.
        SaveError: the page can't be written.
    """
    listed = [folders] if isinstance(folders, Path) else list(folders)
    path = out or (listed[0] / REPORT_FILE if len(listed) == 1 else listed[0].parent / COMPARISON_FILE)
    page = _page(listed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(path, page)
    except OSError as error:
        raise cannot_write(
            f"{path}: can't be written: {error.strerror or error}. Name another file with --out.", error
        ) from error
    return path


def _page(folders: Sequence[Path]) -> str:
    from jinja2 import Environment, PackageLoader

    runs = _with_own_names([_read(folder) for folder in folders], folders)
    template = Environment(
        loader=PackageLoader("dist_lora", "run_folder"), autoescape=True, keep_trailing_newline=True
    ).get_template(TEMPLATE)
    return template.render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        facts=[(name, [run.facts.get(name, "") for run in runs]) for name in _names_of([run.facts for run in runs])],
        plots=list(plots([run.series for run in runs])),
        drawn=_drawn(runs),
        mean_of=max(math.ceil(len(run.series.steps) / MOST_POINTS) for run in runs),
        differing=_differing(runs) if len(runs) > 1 else [],
    )


def _read(folder: Path) -> _Run:
    config = _config_of(folder)
    steps, evaluations = _lines(folder / METRICS_FILE), _lines(folder / EVALUATIONS_FILE)
    if not steps:
        raise ConfigError(f"{folder}: {METRICS_FILE} has no step yet; a report needs at least one")
    return _Run(
        name=config.run,
        status=describe_status(folder).text.removeprefix(f"{folder}: "),
        facts=dict(_facts(folder, config, steps, evaluations)),
        series=Series(config.run, steps, evaluations),
        evaluations=_table(evaluations),
        samples=read_samples(folder),
        learned=_learned(folder, config),
        tool_calls=_tool_calls(_lines(folder / TOOL_CALLS_FILE)),
        settings=(folder / "config.yaml").read_text(encoding="utf-8"),
        flat_settings=flat(config.model_dump(mode="json")),
    )


def _learned(folder: Path, config: Config) -> _Learned:
    adapter, command = folder / "adapter", f"dist-lora learned {folder}"
    if not is_adapter_folder(adapter):
        return _Learned(None, 0, "The run has not written its adapter yet.")
    if not config.lora.has_adapters:
        return _Learned(None, 0, "There is no B A: the run trained weights or rows of the base themselves.")
    try:
        record, num_layers = read_learned(adapter), facts_of(adapter).num_layers or 0
    except AdapterError as error:
        return _Learned(None, 0, str(error))
    if record is None:
        return _Learned(None, 0, f"Nothing was recorded when the adapter was written. This computes it: {command}")
    note = ""
    if not record.has_weight_norms:
        is_unknown = any(linear.weight_norm is None for linear in record.linears)
        why = f"those of W are not recorded. This adds them: {command}" if is_unknown else "W is zero in some linears."
        note = f"The norms are those of dW alone, for {why}"
    return _Learned(record, num_layers, note)


def _drawn(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """The drawings of what each run has learned, by its name."""
    known = {run.name: run.learned for run in runs if run.learned.record is not None}
    of_runs = [
        LearnedOfRun(str(at), of_run.record, of_run.num_layers)
        for at, of_run in enumerate(known.values())
        if of_run.record is not None
    ]
    return dict(zip(known, learned_plots(of_runs), strict=True)) if of_runs else {}


def _with_own_names(runs: Sequence[_Run], folders: Sequence[Path]) -> list[_Run]:
    """The runs; where two have the same name, all are named by their folders."""
    if len({run.name for run in runs}) == len(runs):
        return list(runs)
    return [
        replace(run, name=str(folder), series=replace(run.series, label=str(folder)))
        for run, folder in zip(runs, folders, strict=True)
    ]


def _names_of(all_facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that any has, each once, in the order of the first that has it."""
    return list(dict.fromkeys(itertools.chain.from_iterable(all_facts)))


def _differing(runs: Sequence[_Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, besides their names."""
    settings = [run.flat_settings for run in runs]
    rows = [(name, [json.dumps(each.get(name)) for each in settings]) for name in _names_of(settings) if name != "run"]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _config_of(folder: Path) -> Config:
    problem = no_folder(folder)
    if problem is None and not file_exists(folder / "config.yaml"):
        problem = "is a folder without config.yaml"
    if problem is not None:
        raise ConfigError(f"{folder}: {problem}; expected a run's folder, as runs/NAME (dist-lora train makes it)")
    return load_config(folder / "config.yaml")


def _lines(path: Path) -> list[Line]:
    return list(read_lines(path)) if path.exists() else []


def _all(lines: Sequence[Line], key: str) -> list[float]:
    """The finite numbers of all lines; a zero if there is none."""
    return [value for line in lines if math.isfinite(value := number(line, key))] or [0.0]


# Facts


def _facts(
    folder: Path, config: Config, steps: Sequence[Line], evaluations: Sequence[Line]
) -> Iterator[tuple[str, str]]:
    """Names and values, in the order of interest."""
    summary = read_summary(folder)
    yield "model", f"{config.model.name} ({'unquantized' if config.model.quant == 'none' else config.model.quant})"
    by_root = " / sqrt(rank)" if config.lora.scaling == "sqrt_rank" else ""
    adapters = "none"
    if config.lora.has_adapters:
        adapters = f"rank {span(config.lora.all_ranks())}, alpha {span(config.lora.all_alphas())}{by_root}, on {', '.join(config.lora.target_names())}"
    yield "adapters", adapters
    if (unfreeze := config.train.unfreeze) is not None:
        parts = [f"the last {count(unfreeze.last_layers, 'layer')}"] if unfreeze.last_layers else []
        yield "unfrozen", ", ".join([*parts, *(["the norms"] if unfreeze.norms else []), *unfreeze.patterns])
    if {"trainable", "frozen"} <= summary.keys():
        trained, frozen = int(summary["trainable"]), int(summary["frozen"])
        yield "weights", f"{trained:,} trained, {frozen:,} frozen ({trained / frozen:.2%})"
    yield "steps", f"{steps[-1]['step']:,}" + (f" of {summary['steps']:,}" if "steps" in summary else "")
    yield "loss", f"{number(steps[0], 'loss'):.4f} at the first step, {number(steps[-1], 'loss'):.4f} at the last"
    held_out = {int(line["step"]): number(line, "eval_loss") for line in evaluations if "eval_loss" in line}
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


def _table(evaluations: Sequence[Line]) -> list[list[str]]:
    """The evaluations' numbers as rows under a row of their names; empty if there are none."""
    if not evaluations:
        return []
    names = _names_of(evaluations)
    rows = [
        [f"{line['step']:,}" if name == "step" else f"{number(line, name):.4f}" for name in names]
        for line in evaluations[-MOST_EVALUATIONS:]
    ]
    return [[name.removeprefix("eval_").replace("_", " ") for name in names], *rows]


def _tool_calls(lines: Sequence[Line]) -> _ToolTables | None:
    """The tables of the last line that is whole; None if there is none."""
    for line in reversed(lines):
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # a damaged line is skipped, as everywhere
            tables = {name: rows_of(counts) for name, counts in by_set(line["tool_calls"]).items()}
            return _ToolTables(int(line["step"]), tables)
    return None
