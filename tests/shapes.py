"""Shapes as config.json has them, and those that are in no herd."""

from __future__ import annotations

from typing import Any

from dist_lora.herd.shape import Shape

# arXiv 2005.14165, table 2.1; two matrices after attention (feed-forward of 4 d), and one matrix for both ends.
GPT3: dict[str, Any] = {
    "hidden_size": 12288,
    "intermediate_size": 4 * 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "vocab_size": 50257,
    "tie_word_embeddings": True,
}
GPT3_WEIGHTS = 175_000_000_000


def rope_parameters(shape: Shape) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5's config.json."""
    scaling = shape.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": shape.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def sizes_in_config(shape: Shape) -> dict[str, Any]:
    """All of a shape, by config.json's names."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope_parameters(shape),
        "tie_word_embeddings": shape.tied,
    }
