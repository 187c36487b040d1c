"""What a run warns of, once and in words: a base that looks wrong, other versions than it began with."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_lora
from dist_lora.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from dist_lora.world.world import World
from tests.ranks.runs import metrics, train_command


def settings(base: Path, folder: Path, *, steps: int = 2) -> dict[str, Any]:
    chats = [[("user", f"say {i}"), ("assistant", f"{i} {i}")] for i in range(4)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {
        "run": "it",
        "runs_dir": str(folder),
        "model": {"name": str(base), "dtype": "fp32"},
        "lora": {"rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"steps": steps, "global_batch": 2, "sequence_length": 64},
        "optim": {"schedule": "constant"},
        "log": {"trackers": []},
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "dist_lora"]
    caplog.clear()
    return told


def test_a_first_loss_worse_than_two_guesses_is_told_once_and_a_sound_one_is_not(tiny_llama, tmp_path, caplog) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama("llama31"), base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 30  # sure of itself, and wrong
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for folder, is_wrong in ((base, True), (tiny_llama("llama31"), False)):
        runs = tmp_path / f"wrong {is_wrong}"
        runs.mkdir()
        train_command(World.alone(), settings(folder, runs))
        first, second = (line["loss"] for line in metrics(runs / "it"))
        told = warnings_of(caplog)
        assert (first > 2 * math.log(512)) == is_wrong and (second > 2 * math.log(512)) == is_wrong
        assert len(told) == is_wrong
        if is_wrong:
            assert "the base's weights or the chat template look wrong" in told[0]
            assert f"step 1: the loss is {first:.2f}, and a uniform guess over the 512 tokens has 6.24" in told[0]


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    """The settings of a run that has done two steps."""
    stopped = settings(tiny_llama("llama31"), tmp_path_factory.mktemp("stopped"), steps=3)
    assert train_command(World.alone(), stopped, 2).startswith("interrupted by SIGUSR1 at step 2/3;")
    return stopped


@pytest.fixture
def begun(stopped, tmp_path) -> tuple[dict[str, Any], Path]:
    """The settings of such a run, which may go on, and its checkpoint."""
    shutil.copytree(Path(stopped["runs_dir"]) / "it", tmp_path / "it")
    return stopped | {"runs_dir": str(tmp_path)}, tmp_path / "it" / "checkpoints" / "step-00000002"


def test_a_checkpoint_remembers_the_versions_that_made_it(begun) -> None:
    versions = read_manifest(begun[1]).versions
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == version("transformers")
    assert versions["dist_lora"] == dist_lora.__version__


@pytest.mark.parametrize(
    "then, told",
    [
        ({}, []),
        ({"torch": ".".join(torch.__version__.split(".")[:2]) + ".99"}, []),
        ({"python": "3.1.4", "safetensors": "0.1.0"}, []),
        ({"torch": "2.12.0+cpu"}, ["torch 2.12.0+cpu then"]),
        ({"transformers": "4.57.1"}, ["transformers 4.57.1 then"]),
        ({"torch": "1.13.0", "transformers": "4.57.1"}, ["torch 1.13.0 then", "transformers 4.57.1 then"]),
    ],
    ids=str,
)
def test_going_on_with_another_minor_version_of_torch_or_transformers_is_one_warning(begun, caplog, then, told) -> None:
    config, checkpoint = begun
    manifest = read_manifest(checkpoint)
    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint, dataclasses.replace(manifest, versions=manifest.versions | then))
    caplog.clear()
    train_command(World.alone(), config)
    assert [line["step"] for line in metrics(checkpoint.parents[1])] == [1, 2, 3]
    found = warnings_of(caplog)
    assert len(found) == bool(told)
    assert all(part in found[0] for part in told)
    assert not told or f"{checkpoint} was saved by other versions" in found[0]
    assert not told or f"{torch.__version__ if 'torch' in then else version('transformers')} now" in found[0]
