"""Weights of the base that are trained themselves, alone and beside LoRA: the numbers of a plain loop, on one process and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from dist_lora.lora.merge import merge_adapter
from tests import turns
from tests.e2e.test_against_peft import NUM_STEPS
from tests.ranks.everywhere import PLACES, assert_alike_everywhere, assert_goes_on_elsewhere
from tests.ranks.plain import WEIGHT_DECAY, draw_first_a, train_by_hand
from tests.ranks.pool import RankFailed
from tests.ranks.runs import chats_settings, metrics, train_command

RANK, ALPHA, LR = 4, 8, 1e-3
# Our settings of lora and train.unfreeze; what ends or holds these is unfrozen; PEFT's target_modules.
WAYS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], Any, list[str]]] = {
    "the last layer": (None, {"last_layers": 1}, lambda name: ".layers.1." in name, []),
    "norms beside LoRA": (
        {"targets": ["q_proj", "v_proj"]},
        {"norms": True},
        lambda name: name.endswith("norm.weight"),
        ["q_proj", "v_proj"],
    ),
    "patterns beside LoRA": (
        {},
        {"patterns": ["down_proj", r"layers\.0\..*o_proj", "model.norm"]},
        lambda name: "down_proj" in name or "layers.0.self_attn.o_proj" in name or name.endswith("model.norm.weight"),
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", r"layers.1.self_attn.o_proj"],
    ),
}


def settings_of(base: Path, folder: Path, way: str) -> dict[str, Any]:
    lora, unfreeze, _, _ = WAYS[way]
    settings = chats_settings(base, folder, num_steps=NUM_STEPS)
    optim = settings["optim"] | {"lr": LR, "schedule": "constant", "max_grad_norm": None}
    return settings | {
        "lora": lora if lora is None else {"rank": RANK, "alpha": ALPHA, **lora},
        "optim": optim,
        "train": settings["train"] | {"unfreeze": unfreeze},
    }


def plain_model(base: Path, way: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """transformers' model, with PEFT's adapters where there are some; and what is trained."""
    _, _, is_unfrozen, targets = WAYS[way]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if targets:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    draw_first_a(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or is_unfrozen(name))
    return model.train(), [p for p in model.parameters() if p.requires_grad]


def plain_run(base: Path, folder: Path, way: str) -> tuple[list[float], Any]:
    """The losses of a loop by hand, and the model that it has trained."""
    model, trained = plain_model(base, way)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)
    return train_by_hand(model, optimizer, settings_of(base, folder, way)), model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(40)[None]).logits
    return found


@pytest.mark.parametrize("way", turns.in_suite("norms beside LoRA", of=WAYS))
def test_unfrozen_weights_have_the_numbers_of_a_plain_loop_wherever_they_are_trained(
    ranks, tiny_llama, tmp_path, way
) -> None:
    base = tiny_llama("llama31")
    wanted, plain = plain_run(base, tmp_path, way)
    assert wanted[-1] < wanted[0]
    for number, (size, parallel) in enumerate(PLACES):
        settings = settings_of(base, tmp_path, way) | {"runs_dir": str(tmp_path / str(number)), "parallel": parallel}
        assert ranks(size).run(train_command, settings) == [""] * size
        run = tmp_path / str(number) / "it"
        assert [line["loss"] for line in metrics(run)] == pytest.approx(wanted, rel=1e-4), parallel
    # PEFT has the trained model of the adapter, and the merged model is it.
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    started = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    moved = (logits_of(plain) - started).norm()
    assert (logits_of(loaded) - logits_of(plain)).norm() < 1e-3 * moved
    merge_adapter(run / "adapter", base=base, out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits_of(merged) - logits_of(plain)).norm() < 1e-3 * moved


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("way", ["the last layer", "norms beside LoRA"])
def test_a_run_that_is_stopped_on_two_ranks_goes_on_on_one_and_three(ranks, tiny_llama, tmp_path, way) -> None:
    assert_goes_on_elsewhere(ranks, settings_of(tiny_llama("llama31"), tmp_path, way), tmp_path)


@pytest.mark.slow
def test_norms_beside_lora_on_a_quantized_base_have_the_numbers_of_one_process(ranks, tiny_llama, tmp_path) -> None:
    settings = settings_of(tiny_llama("llama31"), tmp_path, "norms beside LoRA")
    settings["model"]["quant"] = "nf4"
    assert_alike_everywhere(ranks, settings, tmp_path)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_with_whole_weights(ranks, tiny_llama, tmp_path) -> None:
    settings = settings_of(tiny_llama("llama31"), tmp_path, "patterns beside LoRA")
    settings["runs_dir"] = str(tmp_path / "runs")
    assert ranks(1).run(train_command, settings) == [""]
    adapter = tmp_path / "runs" / "it" / "adapter"
    again = settings | {"run": "again", "lora": {"start_from": str(adapter)}}
    again["train"] = {name: value for name, value in again["train"].items() if name != "unfreeze"}
    again |= {
        "data": again["data"] | {"eval": 0.2},
        "eval": {"exact_match": True, "every": NUM_STEPS},
    }  # it generates too
    assert ranks(2).run(train_command, again | {"parallel": {"engine": "fsdp2", "adapters": "shard"}}) == ["", ""]
    first, last = (metrics(tmp_path / "runs" / name) for name in ("it", "again"))
    assert last[0]["loss"] < first[0]["loss"] - 0.1
    (evaluation,) = (tmp_path / "runs" / "again" / "evaluations.jsonl").read_text().splitlines()
    assert "eval_exact_match" in evaluation
    other = again | {"run": "other", "train": again["train"] | {"unfreeze": {"norms": True}}}
    with pytest.raises(RankFailed, match=r"train\.unfreeze: .* in the config, .*down_proj.* in the adapter"):
        ranks(1).run(train_command, other)
