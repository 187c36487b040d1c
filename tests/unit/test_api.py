"""The library without a run: what it imports, its configs and its plans; ``e2e/test_library.py`` trains by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dist_lora import api
from dist_lora.cli import app
from dist_lora.errors import ConfigError
from tests.unit.test_imports import imported_by

SETTINGS = {"run": "a", "model": {"name": "3.2-3b"}, "data": {"train": "a.jsonl"}}


def test_a_config_is_loaded_and_planned_without_torch_and_without_what_it_names() -> None:
    settings = SETTINGS | {"data": {"train": "a.jsonl", "format": "nowhere:f"}, "eval": {"metrics": ["nowhere:g"]}}
    loaded = imported_by(
        f"from dist_lora import api\nconfig = api.load({settings!r}, 'train.callbacks=[nowhere:C]')\n"
        "assert api.plan(config, nodes=2, gpus_per_node=8, gpu='h100-80gb')['fits'] and api.is_first()"
    )
    assert "dist_lora.api" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "deepspeed", "accelerate", "datasets", "typer"}


def test_a_plan_is_what_the_command_prints(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    words = ["plan", str(file), "lora.rank=8", "--nodes", "1", "--gpus-per-node", "2", "--gpu", "rtx4090", "--json"]
    printed = CliRunner().invoke(app, words)
    config = api.load(file, "lora.rank=8")
    assert json.loads(json.dumps(api.plan(config, nodes=1, gpus_per_node=2, gpu="rtx4090"))) == json.loads(
        printed.output
    )
    assert config == api.load(str(file), "lora.rank=8") == api.load(SETTINGS, "lora.rank=8")


def test_a_mapping_is_refused_as_a_file_is_and_stays_as_it_was() -> None:
    settings = {"run": "a", "model": {"name": "b"}, "data": {"train": "c", "format": "alpacca"}, "lora": {"rnak": 1}}
    before = json.dumps(settings)
    with pytest.raises(ConfigError) as caught:
        api.load(settings, "train.callbacks=[a.b]")
    assert str(caught.value).splitlines() == [
        "3 settings of the given settings are wrong:",
        "  the given settings: lora.rnak: no such setting (nearest: rank)",
        "  the given settings: data.format: found 'alpacca', expected auto, messages, alpaca, prompt-completion, text, "
        "tokens, guard or a function of your own, like my_pkg.my_mod:my_format (nearest: alpaca)",
        "  train.callbacks=[a.b] (argument): found ['a.b'], expected a list of classes of your own, like "
        "[my_pkg.my_mod:MyCallback]",
    ]
    assert json.dumps(settings) == before
    kept = SETTINGS | {"log": {"tracker_options": {"tensorboard": {"max_queue": 1}}}}
    before = json.dumps(kept)
    assert (
        api.load(kept, "log.tracker_options.tensorboard.max_queue=2").log.tracker_options["tensorboard"]["max_queue"]
        == 2
    )
    assert json.dumps(kept) == before
