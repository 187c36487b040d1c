"""A plan knows the adapter that its run starts from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_lora.base.llama import build_on_meta
from dist_lora.base.quant.formats import format_of
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config, ModuleAdapter
from dist_lora.errors import ConfigError
from dist_lora.herd.models import known_model
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.attach import attach_adapters
from dist_lora.lora.origin import BaseIdentity
from dist_lora.lora.planned import with_adapter
from dist_lora.plan.explain import explain
from dist_lora.plan.hardware import find_gpu
from dist_lora.plan.plan import Machines, make_plan

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
MODULES = [
    ModuleAdapter(name="model.layers.0.self_attn.q_proj", rank=2, alpha=4.0),
    ModuleAdapter(name="model.layers.1.self_attn.q_proj", rank=6, alpha=12.0),
    ModuleAdapter(name="model.layers.1.mlp.down_proj", rank=2, alpha=8.0),
]
TRAINED = 2 * (64 + 64) + 6 * (64 + 64) + 2 * (64 + 96)


def config_of(**lora: Any) -> Config:
    model = {"name": "mine", "shape": SIZES}
    return Config.model_validate({"run": "a", "model": model, "lora": lora, "data": {"train": "a.jsonl"}})


@pytest.fixture
def adapter(tmp_path) -> Path:
    widths = {"q_proj": (64, 64), "down_proj": (64, 96)}
    tensors = {}
    for module in MODULES:
        out, width = widths[module.linear]
        tensors[f"{module.name}.lora_A"] = torch.ones(module.rank, width)
        tensors[f"{module.name}.lora_B"] = torch.ones(out, module.rank)
    write_adapter(
        tmp_path / "adapter",
        tensors=tensors,
        rank=2,
        alpha=4,
        dropout=0.0,
        targets=["q_proj", "down_proj"],
        base=BaseIdentity("x"),
        modules=MODULES,
    )
    return tmp_path / "adapter"


def test_ranks_that_differ_are_written_as_patterns_under_full_names(adapter) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {MODULES[1].name: 6}
    assert config["alpha_pattern"] == {MODULES[1].name: 12, MODULES[2].name: 8}
    assert config["target_modules"] == sorted(module.name for module in MODULES)
    assert (config["layers_to_transform"], config["use_rslora"]) == (None, False)


def test_a_plan_and_an_explanation_take_ranks_and_targets_from_the_adapter(adapter) -> None:
    config = with_adapter(config_of(start_from=str(adapter)))
    shape = known_model(config.model).shape
    assert config.lora.modules == [MODULES[0], MODULES[1], MODULES[2]]
    assert shape.trained_weights(config.lora) == TRAINED
    machines = Machines(1, 1, find_gpu("h100-80gb"))
    planned = make_plan(config, machines, shape=shape)
    assert planned.setup.trained_weights == TRAINED and planned.memory.adapters == 4 * TRAINED
    assert f"trained {TRAINED:,}, frozen" in explain(config)
    assert "W becomes W + (alpha / r) B A, with r = 2-6 and alpha / r = 2-4" in explain(config)
    largest = config_of(rank=6, targets=["q_proj", "down_proj"])
    assert planned.device_bytes <= make_plan(largest, machines, shape=shape).device_bytes


def test_a_plan_takes_ranks_by_pattern_with_each_linears_own_weights() -> None:
    config = with_adapter(config_of(rank=2, ranks={"down_proj": 6}, targets=["q_proj", "down_proj"], layers=[0, 1]))
    shape = known_model(config.model).shape
    sizes = {name: sum(size) for name, size in shape.linear_shapes().items()}
    trained = 2 * (2 * sizes["q_proj"] + 6 * sizes["down_proj"])
    planned = make_plan(config, Machines(1, 1, find_gpu("h100-80gb")), shape=shape)
    assert planned.setup.trained_weights == trained and planned.setup.lora_rank == 6
    assert "r = 2-6" in explain(config)


def test_what_is_attached_is_what_was_counted(adapter) -> None:
    config = with_adapter(config_of(start_from=str(adapter)))
    shape = known_model(config.model).shape
    model = build_on_meta(shape, dtype=torch.float32, fmt=format_of("none", torch.float32))
    attached = attach_adapters(model, config.lora)
    assert sum(tensor.parameter.numel() for tensor in attached) == TRAINED
    scales = {tensor.name.rpartition(".")[0]: tensor.modules[0].scale for tensor in attached}
    assert scales == {module.name: module.scale for module in MODULES}


def test_a_plan_refuses_what_the_run_would_refuse(adapter) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank: 16 in the config, 2 in the adapter"):
        with_adapter(config_of(start_from=str(adapter), rank=16))


def test_an_adapter_that_is_elsewhere_is_a_warning(caplog) -> None:
    config = config_of(start_from="nowhere")
    with caplog.at_level(logging.WARNING, logger="dist_lora"):
        assert with_adapter(config) == config
    assert "lora.start_from: nowhere isn't on this machine. The plan takes rank 16 on q_proj k_proj" in caplog.text


def test_the_modules_of_a_config_are_read_back_as_they_were_written(tmp_path) -> None:
    config = config_of(modules=[module.model_dump() for module in MODULES])
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
