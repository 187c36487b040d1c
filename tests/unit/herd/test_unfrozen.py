"""Which weights ``train.unfreeze`` names, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.unfrozen import describe_unfrozen, trained_weights, unfrozen_weights
from dist_lora.lora.patterns import with_linears

SHAPE = dataclasses.replace(MEMBERS["3.2-1b"].shape, num_layers=3)
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")


def config_of(unfreeze: dict[str, Any] | None, **sections: Any) -> Config:
    settings = {"run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x"}, "train": {"unfreeze": unfreeze}}
    return Config.model_validate(settings | sections)


def in_layer(layer: int, *kinds: str) -> set[str]:
    return {f"model.layers.{layer}.{kind}" for kind in kinds}


@pytest.mark.parametrize(
    ("unfreeze", "wanted"),
    [
        (None, set()),
        ({"last_layers": 1}, in_layer(2, *LINEARS, *NORMS)),
        ({"norms": True}, {*in_layer(0, *NORMS), *in_layer(1, *NORMS), *in_layer(2, *NORMS), "model.norm"}),
        ({"patterns": ["down_proj"]}, {name for layer in range(3) for name in in_layer(layer, "mlp.down_proj")}),
        ({"patterns": [r"layers\.[01]\.mlp\..*", "model.norm"]}, {*in_layer(0, *LINEARS[4:]), *in_layer(1, *LINEARS[4:]), "model.norm"}),
        ({"patterns": ["norm"]}, {"model.norm"}),  # a name's last part is matched whole, as PEFT does
        ({"patterns": ["model.layers.1.mlp.up_proj.weight$"]}, in_layer(1, "mlp.up_proj")),  # as Axolotl writes them
        ({"last_layers": 1, "patterns": [r"layers\.2\..*", "layers.0.mlp.up_proj"]}, {*in_layer(2, *LINEARS, *NORMS), *in_layer(0, "mlp.up_proj")}),
    ],
)  # fmt: skip
def test_layers_norms_and_patterns_name_weights_in_the_models_order(unfreeze, wanted) -> None:
    found = unfrozen_weights(config_of(unfreeze), SHAPE)
    assert set(found) == wanted and len(found) == len(wanted)
    order = [name.removesuffix(".weight") for name in SHAPE.tensor_shapes()]
    assert list(found) == sorted(found, key=order.index)


@pytest.mark.parametrize(
    ("unfreeze", "model", "told"),
    [
        ({"last_layers": 4}, {}, "train.unfreeze.last_layers: found 4, expected at most 3 (the model has 3 layers)"),
        ({"patterns": ["q_proj", "q_prj"]}, {}, "train.unfreeze.patterns: 'q_prj' matches no weight of the model"),
        ({"patterns": ["("]}, {}, "train.unfreeze.patterns: '(' is no regular expression"),
        ({"patterns": ["lm_head"]}, {}, "'lm_head' matches lm_head, and embedding and head are not trained whole"),
        ({"patterns": [".*"]}, {}, "'.*' matches lm_head and model.embed_tokens"),
        ({"patterns": ["layers.1.mlp.up_proj"]}, {"quant": "nf4"}, "model.layers.1.mlp.up_proj is stored in nf4 (model.quant)"),
        ({"last_layers": 1}, {"quant": "int8"}, "have no gradient. Set model.quant: none, or unfreeze the norms alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_with_what_to_do(unfreeze, model, told) -> None:
    with pytest.raises(ConfigError) as caught:
        unfrozen_weights(config_of(unfreeze, model={"name": "3.2-1b", **model}), SHAPE)
    assert told in str(caught.value)


def test_a_quantized_base_has_norms_and_linears_that_were_left_unquantized() -> None:
    shape = dataclasses.replace(SHAPE, unquantized=frozenset({"model.layers.1.mlp.up_proj"}))
    unfreeze = {"norms": True, "patterns": ["layers.1.mlp.up_proj"]}
    found = unfrozen_weights(config_of(unfreeze, model={"name": "3.2-1b", "quant": "nf4"}), shape)
    assert len(found) == 8 and "model.layers.1.mlp.up_proj" in found


def test_an_unfrozen_linear_carries_no_adapter_and_all_is_counted() -> None:
    config = config_of(
        {"patterns": [r"layers\.0\.mlp\..*", "model.norm"]},
        lora={"rank": 4, "alpha": 8, "targets": ["q_proj", "up_proj"]},
    )
    resolved = with_linears(config, SHAPE)
    assert resolved.lora.modules is not None
    assert [(module.name, module.rank, module.alpha) for module in resolved.lora.modules] == [
        ("model.layers.0.self_attn.q_proj", 4, 8.0),
        ("model.layers.1.self_attn.q_proj", 4, 8.0),
        ("model.layers.1.mlp.up_proj", 4, 8.0),
        ("model.layers.2.self_attn.q_proj", 4, 8.0),
        ("model.layers.2.mlp.up_proj", 4, 8.0),
    ]  # fmt: skip
    hidden, ffn = SHAPE.hidden, SHAPE.ffn
    adapters = 4 * (3 * (hidden + hidden) + 2 * (hidden + ffn))
    assert trained_weights(resolved, SHAPE) == adapters + 3 * hidden * ffn + hidden


def test_without_adapters_all_sections_of_layers_are_empty() -> None:
    config = with_linears(config_of({"norms": True}, lora=None), SHAPE)
    assert config.lora.target_names() == config.lora.layer_indices(3) == config.lora.all_ranks() == ()
    assert trained_weights(config, SHAPE) == 7 * SHAPE.hidden
    assert Config.model_validate(config.model_dump()).lora.modules == []  # as a run's config.yaml is read again


def test_what_is_unfrozen_is_described_by_layers() -> None:
    config = config_of({"last_layers": 1, "norms": True, "patterns": ["down_proj"]})
    assert describe_unfrozen(unfrozen_weights(config, SHAPE)) == (
        "down_proj input_layernorm post_attention_layernorm of layers 0-2, q_proj k_proj v_proj o_proj gate_proj up_proj of layers 2, norm"
    )
