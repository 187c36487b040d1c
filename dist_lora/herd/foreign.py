"""How a model of another family differs from a Llama, by the settings in its config.json and by what its family is.

Source: the configuration and modeling files of each ``model_type`` in transformers 5.23. Only a model that isn't a Llama by its
``model_type`` is looked at: transformers' own Llama ignores these settings, and so does this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TOWERS = ("vision_config", "audio_config", "speech_config")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_QK_NORMS = ("qk_layernorm", "use_qk_norm")
_MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
)
_BIASES = ("use_bias", "qkv_bias", "bias")
_WINDOWS = ("sliding_attention", "chunked_attention", "linear_attention")

# What the code of a family does and no setting says.
_QK_NORM = "queries and keys are normalized (q_norm, k_norm)"
_GEMMA = "embeddings are scaled by the root of the width, and norms multiply by 1 + their weights"
_MORE_NORMS = "norms also after attention and feed-forward"
_OF_FAMILY: Mapping[str, Sequence[str]] = {
    "qwen2": ("q_proj, k_proj and v_proj have a bias",),
    "qwen2_moe": ("q_proj, k_proj and v_proj have a bias",),
    "qwen3": (_QK_NORM,),
    "qwen3_moe": (_QK_NORM,),
    "gemma": (_GEMMA,),
    "gemma2": (_GEMMA, _MORE_NORMS),
    "gemma3_text": (_GEMMA, _MORE_NORMS, _QK_NORM),
    "phi": ("every linear has a bias", "a feed-forward without a gate"),
    "phi3": ("q, k and v are one matrix (qkv_proj), and so are gate and up (gate_up_proj)",),
    "olmo2": ("norms after attention and feed-forward, and none before", _QK_NORM),
}


def differences_from_llama(config: Mapping[str, Any]) -> list[str]:
    """What sets a model apart from a Llama, a phrase each, with the setting that says so; empty for a Llama.

    A model that is a part of another one (``text_config``) is looked at too.
    """
    if config.get("model_type") == "llama":
        return []
    found = [f"{name}: the model has another part than text" for name in _TOWERS if config.get(name)]
    text = config.get("text_config")
    for where, part in (("", config), ("text_config.", text)):
        if isinstance(part, Mapping) and part.get("model_type") != "llama":
            found += [f"{where}{difference}" for difference in _by_setting(part)]
            family = part.get("model_type")
            of_family = _OF_FAMILY.get(family, ()) if isinstance(family, str) else ()
            found += [f"{where}model_type {family}: {difference}" for difference in of_family]
    return found


def _by_setting(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _EXPERTS:
        if _number(config.get(name)) > 1:
            yield f"{name}: {config[name]} experts, expected one feed-forward in each layer"
    yield from _windows(config)
    for name in _CAPS:
        if config.get(name):
            yield f"{name}: logits are capped at {config[name]}"
    if config.get("kv_lora_rank"):
        yield f"kv_lora_rank: keys and values are made from a vector of {config['kv_lora_rank']}"
    for name in _QK_NORMS:
        if config.get(name):
            yield f"{name}: queries and keys are normalized"
    for name in _MULTIPLIERS:
        if _number(config.get(name, 1)) != 1:
            yield f"{name}: found {config[name]}, expected 1"
    for name in _BIASES:
        if config.get(name) is True:
            yield f"{name}: the linears have a bias"
    if config.get("cross_attention_layers"):
        yield f"cross_attention_layers: layers {config['cross_attention_layers']} attend to images"
    rotated = config.get("no_rope_layers")  # 1 for a layer that has RoPE, in Llama 4 and SmolLM3 alike
    if isinstance(rotated, list) and 0 in rotated:
        yield f"no_rope_layers: {rotated.count(0)} of {len(rotated)} layers have no RoPE"
    if config.get("hidden_activation", "silu") not in ("silu", None):
        yield f"hidden_activation: found {config['hidden_activation']!r}, expected 'silu'"
    if "rms_norm_eps" not in config and ("layer_norm_eps" in config or "norm_epsilon" in config):
        yield f"{'layer_norm_eps' if 'layer_norm_eps' in config else 'norm_epsilon'}: LayerNorm, expected RMSNorm"


def _windows(config: Mapping[str, Any]) -> Iterator[str]:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        for kind in _WINDOWS:
            if kind in kinds:
                yield f"layer_types: {kinds.count(kind)} of {len(kinds)} layers are of {kind}"
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        yield f"sliding_window: a token attends to the last {config['sliding_window']} alone"


def _number(value: Any) -> float:
    """A number, and 0 for anything else."""
    return float(value) if type(value) in (int, float) else 0.0
