"""Ranks and alphas by patterns, rsLoRA's scale and LoRA+'s two rates: PEFT's numbers on one process and on several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_lora.config.schema import LINEARS
from dist_lora.lora.learned import read_learned
from tests.e2e.test_against_peft import NUM_STEPS
from tests.ranks.everywhere import PLACES, assert_alike_everywhere, assert_goes_on_elsewhere
from tests.ranks.plain import WEIGHT_DECAY, draw_first_a, train_by_hand
from tests.ranks.runs import chats_settings, metrics, train_command

RANK, ALPHA, LR = 4, 8, 5e-3
# Ours, the same in PEFT's LoraConfig, and the rate of B over that of A.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "sqrt_rank": ({"scaling": "sqrt_rank"}, {"use_rslora": True}, 1.0),
    "patterns": (
        {"ranks": {"down_proj": 6, r"layers\.1\..*": 2}, "alphas": {"q_proj": 3, "self_attn.v_proj": 5.5}, "scaling": "sqrt_rank"},
        {"rank_pattern": {"down_proj": 6, r"layers\.1\..*": 2}, "alpha_pattern": {"q_proj": 3, "self_attn.v_proj": 5.5},
         "use_rslora": True},
        1.0,
    ),
    "lr_ratio": ({}, {}, 8.0),
}  # fmt: skip
SETTINGS = Path("adapter", "adapter_model.safetensors")


def settings_of(base: Path, folder: Path, way: str) -> dict[str, Any]:
    ours, _, ratio = WAYS[way]
    settings = chats_settings(base, folder, num_steps=NUM_STEPS)
    optim = settings["optim"] | {"lr": LR, "lr_ratio": ratio, "schedule": "constant", "max_grad_norm": None}
    return settings | {"lora": {"rank": RANK, "alpha": ALPHA, **ours}, "optim": optim}


def model_of_peft(base: Path, way: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM", **WAYS[way][1])
    model = get_peft_model(model, config)
    draw_first_a(model)
    return model


def scales_of(model: Any) -> dict[str, float]:
    """What PEFT multiplies B A by, linear by linear."""
    return {
        name: module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }


def check_learned(adapter: Path, tensors: dict[str, torch.Tensor], *, base: Path, scales: dict[str, float]) -> None:
    """What was recorded of each linear is its dense dW with PEFT's scale, and the weight of the base's file."""
    record, weights = read_learned(adapter), load_file(base / "model.safetensors")
    assert record is not None and len(record.linears) == len(scales)
    for one in record.linears:
        first, second = (tensors[f"base_model.model.{one.name}.lora_{half}.weight"].double() for half in "AB")
        dense = scales[f"base_model.model.{one.name}"] * second @ first
        assert one.rank == len(first) and one.norm == pytest.approx(float(dense.norm()), rel=1e-6)
        assert one.weight_norm == pytest.approx(float(weights[f"{one.name}.weight"].double().norm()), rel=1e-6)


@pytest.fixture(scope="module")
def theirs(tiny_llama, tmp_path_factory) -> Any:
    """``theirs(way)``: losses and trained tensors of PEFT's own loop, and its scales; run at its first use."""
    made: dict[str, tuple[list[float], dict[str, torch.Tensor], dict[str, float]]] = {}

    def train(way: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
        if way in made:
            return made[way]
        base, folder = tiny_llama("llama31"), tmp_path_factory.mktemp(way)
        model = model_of_peft(base, way).train()
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=WAYS[way][2], weight_decay=WEIGHT_DECAY,
            loraplus_weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
        losses = train_by_hand(model, optimizer, settings_of(base, folder, "sqrt_rank"))
        made[way] = losses, get_peft_model_state_dict(model), scales_of(model)
        return made[way]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_way_has_the_numbers_of_peft_wherever_it_is_trained(ranks, tiny_llama, theirs, tmp_path, way) -> None:
    base = tiny_llama("llama31")
    losses, tensors, scales = theirs(way)
    for number, (size, parallel) in enumerate(PLACES):
        settings = settings_of(base, tmp_path, way) | {"runs_dir": str(tmp_path / str(number)), "parallel": parallel}
        assert ranks(size).run(train_command, settings) == [""] * size
        run = tmp_path / str(number) / "it"
        assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-4), parallel
        found = load_file(run / SETTINGS)
        assert found.keys() == tensors.keys()
        together = torch.cat([tensors[key].flatten() for key in found])
        assert (torch.cat([values.flatten() for values in found.values()]) - together).norm() < 1e-3 * together.norm()
        check_learned(run / "adapter", found, base=base, scales=scales)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = scales_of(PeftModel.from_pretrained(model, run / "adapter"))
    assert loaded.keys() == scales.keys() and all(
        math.isclose(loaded[name], scales[name], rel_tol=1e-6) for name in loaded
    )


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("way", ["patterns", "lr_ratio"])
def test_a_way_that_is_stopped_on_two_ranks_goes_on_on_one_and_three(ranks, tiny_llama, tmp_path, way) -> None:
    assert_goes_on_elsewhere(ranks, settings_of(tiny_llama("llama31"), tmp_path, way), tmp_path)


@pytest.mark.slow
def test_on_a_quantized_base_all_engines_have_the_numbers_of_one_process(ranks, tiny_llama, tmp_path) -> None:
    settings = settings_of(tiny_llama("llama31"), tmp_path, "patterns")
    settings["optim"]["lr_ratio"] = 8.0
    settings["model"]["quant"] = "nf4"
    assert_alike_everywhere(ranks, settings, tmp_path)
