"""Of several statements of RoPE in one config.json the one counts that transformers takes, and the others are named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.errors import ConfigError
from dist_lora.herd.rope import rope_remarks
from dist_lora.herd.shape import Shape
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, trainee_of

PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
# So short that a sequence of 120 tokens has wavelengths of all three kinds.
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WHOLE = {**SCALED, "rope_theta": 5000.0, "original_max_position_embeddings": 64}
TOKENS = 120

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 3000.0},
    "parameters": {"rope_parameters": WHOLE},
    "scaling": {"rope_scaling": WHOLE},
    "scaling beside plain parameters": {"rope_parameters": PLAIN, "rope_scaling": WHOLE},
    "plain scaling beside parameters": {"rope_parameters": WHOLE, "rope_scaling": PLAIN},
    "scaling without theta beside parameters": {
        "rope_parameters": PLAIN, "rope_scaling": {**SCALED, "original_max_position_embeddings": 64},
    },
    "empty scaling": {"rope_parameters": WHOLE, "rope_scaling": {}},
    "no scaling": {"rope_parameters": WHOLE, "rope_scaling": None},
    "theta at both levels": {"rope_theta": 900.0, "rope_parameters": WHOLE},
    "theta outside": {"rope_theta": 900.0, "rope_scaling": {**SCALED, "original_max_position_embeddings": 64}},
    "type": {"rope_theta": 900.0, "rope_scaling": {**WHOLE, "rope_type": "default", "type": "llama3"}},
    "only type": {"rope_theta": 900.0, "rope_scaling": {"type": "llama3", **{k: v for k, v in WHOLE.items() if k != "rope_type"}}},
    "two types": {"rope_scaling": {**WHOLE, "type": "linear"}},
    "original context outside": {"rope_scaling": WHOLE, "original_max_position_embeddings": 32},
    "no original context": {"rope_scaling": {**SCALED, "rope_theta": 5000.0}, "max_position_embeddings": 256},
    "a factor in vain": {"rope_parameters": {**PLAIN, "factor": 8.0}},
    "whole partial": {"rope_parameters": WHOLE, "partial_rotary_factor": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def variant(tiny_llama, tmp_path_factory) -> Callable[[dict[str, Any]], Path]:
    """Makes a folder with the same weights and another config.json."""
    source = tiny_llama("llama3")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]

    def make(changes: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("variant")
        os.link(source / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return make


def logits(folder: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, and those of transformers."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = trainee_of(config_of(folder), World.alone()).model
    with torch.no_grad():
        everything = torch.arange(len(ids))
        attention = Documents((0, len(ids)), "sdpa")
        return ours(ids, positions=everything, attention=attention, rows=everything), theirs(ids[None]).logits[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_of_every_statement_of_rope_are_those_of_transformers(variant, name) -> None:
    ids = torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits(variant(VARIANTS[name]), ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "remarks"),
    [
        ("parameters", []),
        ("scaling", []),
        ("empty scaling", []),
        (
            "scaling beside plain parameters",
            [f"rope_scaling {WHOLE} is used and rope_parameters {PLAIN} is not, as in transformers"],
        ),
        (
            "scaling without theta beside parameters",
            [
                f"rope_scaling { {**SCALED, 'original_max_position_embeddings': 64} } is used and rope_parameters {PLAIN} is not, as in transformers",
                "rope_theta is 10000, not the 5000.0 of rope_parameters",
            ],
        ),
        (
            "theta at both levels",
            ["rope_parameters.rope_theta 5000.0 is used and rope_theta 900.0 is not, as in transformers"],
        ),
        (
            "two types",
            ["rope_scaling.rope_type llama3 is used and rope_scaling.type linear is not, as in transformers"],
        ),
        (
            "original context outside",
            [
                "original_max_position_embeddings 32 is used and rope_scaling.original_max_position_embeddings 64 is not, "
                "as in transformers"
            ],
        ),
        ("a factor in vain", ["rope_parameters has {'factor': 8.0}, which RoPE of type 'default' doesn't use"]),
    ],
)
def test_what_is_stated_twice_or_in_vain_is_named_with_both_values(name, remarks) -> None:
    assert [" ".join(remark.split()) for remark in rope_remarks(VARIANTS[name])] == [
        " ".join(remark.replace("{ {", "{{").split()) for remark in remarks
    ]


def test_one_rope_for_each_type_of_layer_is_refused() -> None:
    config = {"model_type": "llama", "rope_parameters": {"full_attention": WHOLE, "sliding_attention": PLAIN}}
    with pytest.raises(ConfigError) as raised:
        Shape.from_config(config, where="m/config.json")
    assert (
        "rope_parameters: found settings for each of ['full_attention', 'sliding_attention'], expected one RoPE for all "
        "layers" in str(raised.value)
    )
