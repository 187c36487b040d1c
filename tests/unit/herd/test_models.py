"""What ``model.name`` leads to without weights: a hub id whose config.json is in the hub's cache is planned by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import Qwen2Config

from dist_lora.config.schema import Config, ModelSection
from dist_lora.errors import ConfigError
from dist_lora.herd.models import known_model, resolve_model
from dist_lora.herd.shape import Shape
from dist_lora.plan.hardware import find_gpu
from dist_lora.plan.plan import Machines, make_plan
from tests.unit.herd.test_shape import config_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that has nothing yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_config(cache: Path, text: str) -> None:
    """The config.json of org/some-llama in a cache, as ``hf download org/some-llama config.json`` leaves it."""
    folder = cache / "models--org--some-llama"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(text)


def test_a_hub_id_is_planned_once_its_config_is_in_the_cache(cache: Path) -> None:
    section = ModelSection(name="org/some-llama")
    with pytest.raises(ConfigError) as caught:
        known_model(section)
    assert str(caught.value) == (
        "model.name: org/some-llama is not a herd member, and its sizes are on the hub. Fetch them: hf download "
        "org/some-llama config.json. Or name a member, a folder with config.json, or give the sizes by hand: "
        "model.shape: {hidden_size: 4096, ...}, as in its config.json"
    )
    put_config(cache, json.dumps(config_of()))
    shape = known_model(section).shape
    assert shape == Shape.from_config(config_of(), where="x")
    config = Config.model_validate({"run": "a", "model": {"name": "org/some-llama"}, "data": {"train": "a.jsonl"}})
    planned = make_plan(config, Machines(1, 8, find_gpu("h100-80gb")))
    assert planned.setup.shape == shape and planned.fits


def test_a_folder_that_this_user_may_not_enter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.raises(ConfigError, match=f"model.name: {tmp_path} can't be opened by this user: Permission denied"):
        resolve_model(str(tmp_path))


def test_a_hub_id_of_another_family_is_refused_by_its_cached_config(cache: Path) -> None:
    put_config(cache, Qwen2Config().to_json_string())
    with pytest.raises(ConfigError, match="model_type qwen2: q_proj, k_proj and v_proj have a bias"):
        known_model(ModelSection(name="org/some-llama"))
