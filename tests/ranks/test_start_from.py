"""Training that starts from an adapter of PEFT's whose ranks and alphas differ by layer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_lora.base.attention import Documents
from dist_lora.chat.command import open_for_answers
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.errors import ConfigError
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.world.world import World
from tests import turns
from tests.ranks.runs import chats_settings, exact, metrics, train_command

NUM_STEPS, STOP_AT = 4, 2
Q, UP, V = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"
ADAPTER = Path("adapter", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def start(tiny_llama, tmp_path_factory) -> Path:
    """Three linears by their full names; one has rank 6 and alpha 48, one alpha 3."""
    folder = tmp_path_factory.mktemp("start") / "adapter"
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama("llama31"), dtype=torch.float32),
        LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=[Q, UP, V],
            rank_pattern={"layers.1.mlp.up_proj": 6},
            alpha_pattern={".*up_proj": 48, "v_proj": 3},
            task_type="CAUSAL_LM",
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_llama, start, tmp_path_factory) -> dict[str, Any]:
    made = chats_settings(tiny_llama("llama31"), tmp_path_factory.mktemp("data"), num_steps=NUM_STEPS)
    return made | {"lora": {"start_from": str(start)}}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert train_command(World.alone(), settings | {"runs_dir": str(folder)}) == ""
    return folder / "it"


def test_ranks_and_alphas_are_kept_by_the_run_and_by_its_adapter(alone, start) -> None:
    config = json.loads((alone / ADAPTER).with_name("adapter_config.json").read_text())
    assert config["target_modules"] == sorted([Q, UP, V])
    assert (config["r"], config["rank_pattern"]) == (3, {UP: 6})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (6, {UP: 48, V: 3})
    assert yaml.safe_load((alone / "config.yaml").read_text())["lora"]["modules"] == [
        {"name": Q, "rank": 3, "alpha": 6.0},
        {"name": V, "rank": 3, "alpha": 3.0},
        {"name": UP, "rank": 6, "alpha": 48.0},
    ]
    assert open_adapter(alone / "adapter").modules == open_adapter(start).modules
    lines = metrics(alone)
    assert lines[-1]["loss"] < lines[0]["loss"]
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["trainable"] == sum(tensor.numel() for tensor in load_file(start / ADAPTER.name).values())


@torch.no_grad()
def test_peft_computes_with_what_was_trained_as_we_do(alone, tiny_llama) -> None:
    base, ids = tiny_llama("llama31"), torch.arange(40)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match any).*")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), alone / "adapter"
        ).eval()
    ours = open_for_answers(alone / "adapter", base=str(base), world=World.alone()).model
    found = ours(ids, positions=ids, attention=Documents((0, len(ids))), rows=ids)
    torch.testing.assert_close(found, model(ids[None]).logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "parallel",
    turns.in_suite({"adapters": "shard"}, of=[{"adapters": "shard"}, {"adapters": "replicate"}, {"engine": "zero3"}]),
    ids=["sharded", "replicated", "zero3"],
)
def test_on_two_ranks_and_stopped_in_between_it_is_the_run_of_one_process(
    ranks, settings, alone, tmp_path, parallel
) -> None:
    config = settings | {"runs_dir": str(tmp_path), "parallel": parallel}
    assert [text.partition(";")[0] for text in ranks(2).run(train_command, config, STOP_AT)] == [
        f"interrupted by SIGUSR1 on rank 1 at step {STOP_AT}/{NUM_STEPS}"
    ] * 2
    assert ranks(2).run(train_command, config) == ["", ""]
    found, wanted = metrics(tmp_path / "it"), metrics(alone)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=1e-5)
    ours, theirs = load_file(tmp_path / "it" / ADAPTER), load_file(alone / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
    gathered = gather_adapter(tmp_path / "it", out=tmp_path / "gathered")
    assert (gathered / ADAPTER.name).read_bytes() == (tmp_path / "it" / ADAPTER).read_bytes()


def test_the_runs_own_config_starts_it_again_as_it_was(alone, settings, tmp_path) -> None:
    again = yaml.safe_load((alone / "config.yaml").read_text()) | {"runs_dir": str(tmp_path)}
    assert train_command(World.alone(), again) == ""
    assert exact(metrics(tmp_path / "it")) == exact(metrics(alone))


def test_other_ranks_than_those_that_the_run_began_with_are_refused(alone, settings) -> None:
    config = yaml.safe_load((alone / "config.yaml").read_text())
    config["lora"]["modules"][0]["rank"] = 5
    with pytest.raises(
        ConfigError, match=rf"lora.modules: {Q} has rank 5 and alpha 6 in the config, rank 3 and alpha 6"
    ):
        train_command(World.alone(), config)
    config["lora"]["start_from"] = None
    with pytest.raises(ConfigError, match=r"lora\.modules: the run has \[\{'name'"):
        train_command(World.alone(), config)
