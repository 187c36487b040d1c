"""A run that is stopped and goes on ends where a straight one ends: bit for bit on as many ranks, else to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lora.checkpoint.manifest import KINDS, Piece, read_manifest
from dist_lora.checkpoint.read import load_pieces
from dist_lora.world.world import World
from tests import turns
from tests.ranks.runs import chats_settings, exact, metrics, train_command

NUM_STEPS, STOP_AT = 10, 4
ADAPTER = Path("adapter", "adapter_model.safetensors")


@dataclass(frozen=True)
class Runs:
    """The folders of runs of one config."""

    config: dict[str, Any]
    straight: Path
    stopped: Path
    as_it_stopped: Path


@pytest.fixture(scope="module")
def runs(ranks, tiny_llama, tmp_path_factory) -> Callable[[float], Runs]:
    """``runs(dropout)``: on two ranks a straight run, one that is stopped and goes on, and how it lay stopped."""

    @cache
    def make(dropout: float) -> Runs:
        folder = tmp_path_factory.mktemp("runs")
        config = chats_settings(tiny_llama("llama31"), folder, num_steps=NUM_STEPS, dropout=dropout)
        straight = config | {"runs_dir": str(folder / "straight"), "checkpoint": {"every": STOP_AT, "keep": 9}}
        assert ranks(2).run(train_command, straight) == ["", ""]
        stopped = config | {"runs_dir": str(folder / "stopped")}
        said = ranks(2).run(train_command, stopped, STOP_AT)
        told = f"interrupted by SIGUSR1 on rank 1 at step {STOP_AT}/{NUM_STEPS}"
        assert [text.partition(";")[0] for text in said] == [told] * 2
        shutil.copytree(folder / "stopped", folder / "as it stopped")
        assert ranks(2).run(train_command, stopped) == ["", ""]
        return Runs(config, folder / "straight" / "it", folder / "stopped" / "it", folder / "as it stopped" / "it")

    return make


def state(folder: Path, step: int) -> dict[Piece, torch.Tensor]:
    """Adapters and moments of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(path)
    pieces = [Piece(spec.name, kind, 0, spec.num_elements) for spec in manifest.tensors for kind in KINDS]
    return load_pieces(path, manifest, pieces)


@pytest.mark.parametrize("dropout", turns.in_suite(0.0, of=[0.0, 0.1]))
def test_metrics_and_adapter_of_a_stopped_run_are_those_of_a_straight_one_bit_for_bit(runs, dropout) -> None:
    made = runs(dropout)
    straight, stopped = metrics(made.straight), metrics(made.stopped)
    assert [line["step"] for line in stopped] == list(range(1, NUM_STEPS + 1))
    assert exact(stopped) == exact(straight)
    assert straight[-1]["loss"] < 0.95 * straight[0]["loss"]
    assert (made.stopped / ADAPTER).read_bytes() == (made.straight / ADAPTER).read_bytes()


@pytest.mark.parametrize("dropout", turns.in_suite(0.0, of=[0.0, 0.1]))
@pytest.mark.parametrize("step", [STOP_AT, NUM_STEPS])
def test_moments_at_the_stop_and_at_the_end_are_those_of_a_straight_run_bit_for_bit(runs, dropout, step) -> None:
    made = runs(dropout)
    wanted = state(made.straight, step)
    found = state(made.stopped if step == NUM_STEPS else made.as_it_stopped, step)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[piece], wanted[piece]) for piece in wanted)
    moments = [values for piece, values in found.items() if piece.kind != "adapter"]
    assert len(moments) == 2 * 28 and all(values.any() for values in moments)


@pytest.mark.slow
def test_dropout_changes_what_is_learned(runs) -> None:
    assert metrics(runs(0.0).straight)[0]["loss"] == pytest.approx(metrics(runs(0.1).straight)[0]["loss"], abs=1e-6)
    assert metrics(runs(0.0).straight)[-1]["loss"] != pytest.approx(metrics(runs(0.1).straight)[-1]["loss"], abs=1e-4)


@pytest.mark.parametrize(("size", "offload"), turns.in_suite((1, "all"), of=[(1, "none"), (1, "all"), (3, "none")]))
def test_a_run_that_goes_on_with_other_ranks_has_the_losses_of_a_straight_one(
    runs, ranks, tmp_path, size, offload
) -> None:
    made = runs(0.0)
    shutil.copytree(made.as_it_stopped, tmp_path / "it")
    config = made.config | {"runs_dir": str(tmp_path), "parallel": {"offload": offload}}
    said = ranks(size).run(train_command, config) if size > 1 else [train_command(World.alone(), config)]
    assert said == [""] * size
    straight, found = metrics(made.straight), metrics(tmp_path / "it")
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    assert exact(found[:STOP_AT]) == exact(straight[:STOP_AT])
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in straight], abs=1e-5)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in straight], rel=1e-5)
    assert [line["lr"] for line in found] == [line["lr"] for line in straight]


def test_a_run_whose_steps_after_the_last_checkpoint_were_lost_writes_them_down_once(runs, ranks, tmp_path) -> None:
    made = runs(0.0)
    shutil.copytree(made.straight, tmp_path / "it")
    for step in (2 * STOP_AT, NUM_STEPS):
        shutil.rmtree(tmp_path / "it" / "checkpoints" / f"step-{step:08d}")
    assert ranks(2).run(train_command, made.config | {"runs_dir": str(tmp_path)}) == ["", ""]
    assert exact(metrics(tmp_path / "it")) == exact(metrics(made.straight))


def test_what_a_run_left_that_was_killed_after_its_last_save_goes_with_the_next_start(runs, ranks, tmp_path) -> None:
    made = runs(0.0)
    shutil.copytree(made.straight, tmp_path / "it")
    checkpoints = tmp_path / "it" / "checkpoints"
    (checkpoints / ".step-00000003.deleted").mkdir()
    (checkpoints / ".step-00000007.partial").mkdir()
    (tmp_path / "it" / "summary.json").unlink()  # which it hadn't come to write
    before = sorted(path.name for path in checkpoints.glob("step-*"))
    config = made.config | {"runs_dir": str(tmp_path), "checkpoint": {"every": STOP_AT, "keep": 2}}
    assert ranks(2).run(train_command, config) == ["", ""]
    assert sorted(path.name for path in checkpoints.iterdir()) == before[-2:]
    assert exact(metrics(tmp_path / "it")) == exact(metrics(made.straight))
