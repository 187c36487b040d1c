"""Every key of a config.json is used, refused, known to have no effect, or named."""

from __future__ import annotations

import json

import pytest
from transformers import GenerationConfig, LlamaConfig

from dist_lora.errors import ConfigError
from dist_lora.herd.config_keys import OF_GENERATION, USED, WITHOUT_EFFECT, remarks_on
from dist_lora.herd.shape import Shape
from tests.unit.herd.test_shape import config_of

# What the hub's Llamas of other makers have beside transformers' own keys (SmolLM2, TinyLlama, Unsloth).
OF_OTHERS = {
    "is_llama_config": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pretraining_tp": 2,
    "rope_interleaved": False,
}


def test_each_key_of_transformers_is_known_and_none_is_in_two_lists() -> None:
    assert set(LlamaConfig().to_dict()) <= USED | WITHOUT_EFFECT
    assert set(GenerationConfig._get_default_generation_params()) - {"use_cache"} == OF_GENERATION
    assert not (USED & WITHOUT_EFFECT or USED & OF_GENERATION or WITHOUT_EFFECT & OF_GENERATION)


def test_a_config_as_it_is_published_has_nothing_to_remark() -> None:
    assert remarks_on(config_of(**OF_OTHERS, torch_dtype="bfloat16", temperature=0.6)) == []
    assert remarks_on(json.loads(LlamaConfig(**config_of()).to_json_string())) == []


def test_unknown_settings_are_named_once_with_their_count_and_values() -> None:
    config = config_of(sliding_window=4096, logit_scale=0.5, mup=[], long="x" * 100)
    assert remarks_on(config) == [
        "3 settings are unknown and have no effect, as in transformers' Llama: logit_scale: 0.5, "
        f"long: '{'x' * 36}..., sliding_window: 4096"
    ]


def test_dropout_in_attention_is_not_applied_and_said() -> None:
    assert remarks_on(config_of(attention_dropout=0.1)) == [
        "attention_dropout 0.1 is not applied: transformers would in training"
    ]
    assert remarks_on(config_of(attention_dropout=0.0)) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"is_causal": False}, "is_causal: found false, expected true: a token attends to those before it"),
        (
            {"per_layer_config": {"0": {"intermediate_size": 32}}},
            "per_layer_config: found settings of single layers, expected layers of one kind",
        ),
    ],
)
def test_what_transformers_obeys_and_this_does_not_is_refused(changes, fault) -> None:
    with pytest.raises(ConfigError) as raised:
        Shape.from_config(config_of(**changes), where="c")
    assert str(raised.value) == f"c: not a Llama that can be trained here:\n  {fault}"
