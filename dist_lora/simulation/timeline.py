"""A picture of a GPU's memory over a simulated step, and its numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_lora.errors import ConfigError, cannot_write
from dist_lora.files import write_output
from dist_lora.simulation.simulate import MAX_MICRO_BATCHES, Simulation, as_json
from dist_lora.simulation.tracker import KINDS, Kind, Moment, Phase
from dist_lora.text import GIB

PICTURES = (".png", ".svg")
MAX_HEADROOM = 2.5  # times the peak: the line of a larger GPU would squeeze the picture, so the title names it

# Persistent memory is blue and green, temporary memory is in warm colours.
_COLOURS: dict[Kind, str] = {
    "base shard": "#4e79a7",
    "adapters": "#499894",
    "optimizer": "#86bcb6",
    "gradients": "#8cd17d",
    "gathered base": "#f1ce63",
    "gathered adapters": "#d4a6c8",
    "activations": "#f28e2b",
    "logits": "#e15759",
    "other": "#bab0ac",
}
_LABELS: dict[Kind, str] = {
    "base shard": "base: kept on this GPU",
    "adapters": "adapters",
    "optimizer": "AdamW's moments",
    "gradients": "gradients of the adapters",
    "gathered base": "base: all-gathered layers",
    "gathered adapters": "adapters: all-gathered",
    "activations": "activations for the backward",
    "logits": "logits",
    "other": "temporary tensors and gradients",
}
# The parts of a step as shown: recomputation belongs to the backward.
_PARTS: dict[Phase, str] = {
    "update": "update",
    "forward": "forward",
    "head": "loss",
    "recompute": "backward",
    "backward": "backward",
}
_PART_COLOURS = {"forward": "#dfe7f1", "loss": "#f8dcdc", "backward": "#fbead6", "update": "#e8e8e8"}


@dataclass(frozen=True)
class Limit:
    """Memory of a GPU: its name, all of its bytes, and those for CUDA, NCCL and fragmentation."""

    name: str
    num_bytes: int
    reserve_bytes: int


def check_picture(path: Path) -> None:
    """Raise ``ConfigError`` if the format of a picture isn't supported, before a simulation that takes minutes."""
    if path.suffix not in PICTURES:
        raise ConfigError(
            f"--timeline: found {path}, expected the name of a picture, ending in {' or '.join(PICTURES)}"
        )


def write_timeline(simulation: Simulation, path: Path, *, title: str, limit: Limit) -> list[Path]:
    """Write a picture of a simulated step, and its numbers as JSON next to it; returns both files.

    Args:
        path: the picture; its suffix sets the format, and the numbers of ``runs/plan/step.png`` go to step.json there.

    Raises:
        ConfigError: the suffix isn't supported.
        SaveError: a file can't be written.
    """
    check_picture(path)
    numbers = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_output(numbers, json.dumps(as_json(simulation)) + "\n")
        _draw(simulation, path, title=title, limit=limit)
    except OSError as error:
        raise cannot_write(
            f"{path}: can't be written: {error.strerror or error}. Choose another path.", error
        ) from error
    return [path, numbers]


def _draw(simulation: Simulation, path: Path, *, title: str, limit: Limit) -> None:
    # Imported late: it takes a second, and isn't needed without a picture. No pyplot, which keeps global state.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    peak, whole = simulation.peak_bytes / GIB, limit.num_bytes / GIB
    is_far = whole > MAX_HEADROOM * peak
    top = 1.2 * peak if is_far else 1.1 * max(whole, peak)
    description = (
        f"{limit.name} has {whole:.1f} GiB ({limit.reserve_bytes / GIB:.1f} of it for CUDA, NCCL and fragmentation)"
    )
    axes.set_ylim(0, top)
    _areas(axes, simulation)
    _parts_of_step(axes, simulation)
    _peak(axes, simulation, top=top)
    if not is_far:
        _limit(axes, simulation, limit, label=description)
    above = f"; {description}, far more" if is_far else ""
    axes.set_title(f"{title}\nMemory of the fullest GPU over one training step{above}", loc="left", fontsize=11)
    axes.set_ylabel("GiB")
    axes.set_xticks([])
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # keeps texts searchable
        figure.savefig(path)


def _areas(axes: Any, simulation: Simulation) -> None:
    """Memory by kind as stacked areas, persistent kinds at the bottom. Kinds without bytes are left out."""
    events = [moment.event for moment in simulation.timeline]
    heights = np.array([moment.by_kind for moment in simulation.timeline]) / GIB
    shown = [kind for kind in _COLOURS if heights[:, KINDS.index(kind)].any()]
    axes.stackplot(
        events,
        [heights[:, KINDS.index(kind)] for kind in shown],
        colors=[_COLOURS[kind] for kind in shown],
        labels=[f"{_LABELS[kind]}: {simulation.composition[kind] / GIB:.2f}" for kind in shown],
        step="post",
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], title="GiB at the peak", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
        alignment="left",
    )  # fmt: skip


def _limit(axes: Any, simulation: Simulation, limit: Limit, *, label: str) -> None:
    """Mark the GPU's memory, and how much of it a step can use."""
    whole, free = limit.num_bytes / GIB, (limit.num_bytes - limit.reserve_bytes) / GIB
    axes.axhline(free, color="#b22222", linewidth=1.5, linestyle="--")
    axes.axhspan(free, whole, color="#b22222", alpha=0.08)
    axes.axhline(whole, color="#b22222", linewidth=1.5)
    axes.text(simulation.timeline[-1].event, whole, f"{label} ", ha="right", va="bottom", color="#b22222")


def _peak(axes: Any, simulation: Simulation, *, top: float) -> None:
    at = max(simulation.timeline, key=lambda moment: moment.total_bytes)
    peak, last = simulation.peak_bytes / GIB, max(1, simulation.timeline[-1].event)
    left_half = at.event < last / 2
    axes.annotate(
        f"peak {peak:.2f} GiB, in the {_PARTS[at.phase]}",
        xy=(at.event, peak),
        xytext=(at.event + (0.04 if left_half else -0.04) * last, peak + 0.07 * top),
        ha="left" if left_half else "right",
        fontweight="bold",
        arrowprops={"arrowstyle": "->", "color": "black"},
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def _parts_of_step(axes: Any, simulation: Simulation) -> None:
    """A strip below the areas with the parts of the step; a part is named if there is room."""
    moments, num_micro_batches = simulation.timeline, simulation.micro_batches
    last = max(1, moments[-1].event)
    strip = axes.get_xaxis_transform()
    for part, begin, end in parts_of_step(moments):
        axes.axvspan(begin, end, ymin=-0.05, ymax=0, color=_PART_COLOURS[part], clip_on=False, linewidth=0)
        if (end - begin) / last > 0.055:
            axes.text((begin + end) / 2, -0.025, part, transform=strip, ha="center", va="center", fontsize=9)
    shown = (
        f"the first two and the last of {num_micro_batches} micro-batches"
        if num_micro_batches > MAX_MICRO_BATCHES
        else f"all micro-batches: {num_micro_batches}"
    )
    axes.set_xlabel(f"from allocation to allocation; {shown}", labelpad=24)


def parts_of_step(moments: Sequence[Moment]) -> Iterator[tuple[str, int, int]]:
    """Forward, loss and backward of each micro-batch, and the update: each with its first and last event."""
    begin = moments[0].event
    for part, group in itertools.groupby(moments, key=lambda moment: _PARTS[moment.phase]):
        end = list(group)[-1].event
        yield part, begin, end
        begin = end
