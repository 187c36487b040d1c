"""Models of other families, as transformers' own configuration classes write them, are refused by what is different in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dist_lora.errors import ConfigError
from dist_lora.herd.foreign import differences_from_llama
from dist_lora.herd.shape import read_shape
from tests.unit.herd.test_shape import config_of

WINDOW = "sliding_window: a token attends to the last 4096 alone"
GEMMA = "embeddings are scaled by the root of the width, and norms multiply by 1 + their weights"
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip
# What the message says of each, besides model_type and architectures.
FAMILIES = {
    "Qwen2": ["model_type qwen2: q_proj, k_proj and v_proj have a bias"],
    "Qwen3": ["model_type qwen3: queries and keys are normalized (q_norm, k_norm)"],
    "Qwen3Moe": ["128 experts, expected one feed-forward", "model_type qwen3_moe: queries and keys are normalized"],
    "Mistral": [WINDOW],
    "Mixtral": ["num_local_experts: 8 experts, expected one feed-forward in each layer"],
    "Gemma": [f"model_type gemma: {GEMMA}", "hidden_act: found 'gelu_pytorch_tanh', expected 'silu'"],
    "Gemma2": [
        f"model_type gemma2: {GEMMA}",
        "model_type gemma2: norms also after attention and feed-forward",
        "attn_logit_softcapping: logits are capped at 50.0",
        "layer_types: 3 of 6 layers are of sliding_attention",
        "hidden_activation: found 'gelu_pytorch_tanh', expected 'silu'",
    ],
    "Gemma3Text": [f"model_type gemma3_text: {GEMMA}", "model_type gemma3_text: queries and keys are normalized"],
    "Phi": ["every linear has a bias", "a feed-forward without a gate", "layer_norm_eps: LayerNorm, expected RMSNorm"],
    "Phi3": ["q, k and v are one matrix (qkv_proj), and so are gate and up (gate_up_proj)"],
    "Olmo2": ["norms after attention and feed-forward, and none before", "queries and keys are normalized"],
    "Starcoder2": ["use_bias: the linears have a bias", "norm_epsilon: LayerNorm, expected RMSNorm"],
    "Granite": ["embedding_multiplier: found 12.0, expected 1"],
    "SmolLM3": ["no_rope_layers: 1 of 6 layers have no RoPE"],
    "DeepseekV3": ["n_routed_experts: 256 experts", "kv_lora_rank: keys and values are made from a vector of 512"],
}  # fmt: skip


def config_of_family(name: str) -> PreTrainedConfig:
    more = {"Granite": {"embedding_multiplier": 12.0}}.get(name, {})
    return getattr(transformers, f"{name}Config")(**(TINY if name != "DeepseekV3" else {}), **more)


def told_of(folder: Path, config: PreTrainedConfig) -> str:
    """What is said of a folder that holds nothing but this config.json."""
    config.save_pretrained(folder)
    with pytest.raises(ConfigError) as caught:
        read_shape(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_another_family_is_refused_by_what_is_different_in_it(name: str, tmp_path: Path) -> None:
    config = config_of_family(name)
    told = told_of(tmp_path, config)
    head, *faults = told.splitlines()
    assert head == f"{tmp_path / 'config.json'}: not a Llama that can be trained here:"
    assert faults[0] == f"  model_type: found {config.model_type!r}, expected 'llama'"
    assert [line for line in FAMILIES[name] if line not in told] == []


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3Text", "Phi3", "Olmo2", "Phi"])
def test_what_is_said_of_a_family_is_so_in_transformers_own_model(name: str, tmp_path: Path) -> None:
    config = config_of_family(name)
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    told = told_of(tmp_path, config)
    signs = {
        "q_norm": "queries and keys are normalized",
        "q_proj.bias": "have a bias" if name == "Qwen2" else "every linear has a bias",
        "qkv_proj.weight": "qkv_proj",
        "post_feedforward_layernorm": "after attention and feed-forward",
        "mlp.fc1": "without a gate",
    }
    for part, words in signs.items():
        assert any(part in each for each in names) == (words in told), (part, told)


def test_a_mistral_without_a_window_is_refused_by_its_type_alone(tmp_path: Path) -> None:
    told = told_of(tmp_path, transformers.MistralConfig(**TINY, sliding_window=None))
    assert told.splitlines()[1:] == ["  model_type: found 'mistral', expected 'llama'"]
    told = told_of(tmp_path, transformers.Qwen2Config(**TINY, use_sliding_window=True, max_window_layers=2))
    assert "layer_types: 4 of 6 layers are of sliding_attention" in told


def test_a_vision_tower_and_llama_4_are_refused_by_their_parts(tmp_path: Path) -> None:
    mllama = told_of(tmp_path, transformers.MllamaConfig())
    assert "\n  vision_config: the model has another part than text" in mllama
    assert "\n  text_config.cross_attention_layers: layers [3, 8, 13, 18, 23, 28, 33, 38] attend to images" in mllama
    llama4 = told_of(tmp_path, transformers.Llama4Config())
    assert "\n  model_type: found 'llama4', expected 'llama'" in llama4
    assert "\n  vision_config: the model has another part than text" in llama4
    assert "\n  text_config.num_local_experts: 16 experts, expected one feed-forward in each layer" in llama4
    assert "\n  text_config.no_rope_layers: 12 of 48 layers have no RoPE" in llama4
    llava = told_of(tmp_path, transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TINY)))
    assert "vision_config" in llava and "text_config." not in llava


def test_a_llama_has_no_difference_whatever_it_states_in_vain() -> None:
    assert differences_from_llama(config_of(sliding_window=4096, num_experts=8, use_bias=True)) == []
    assert json.loads(transformers.LlamaConfig(**TINY).to_json_string())["model_type"] == "llama"
