"""What the keys of a Llama's config.json mean here: used, refused, without effect, or unknown.

Source: ``LlamaConfig``, ``PreTrainedConfig`` and ``modeling_llama`` of transformers 5.23, where nothing else has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_lora.herd.rope import rope_remarks


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read by ``Shape.from_config``, the tokenizer, generation or the weights' readers, or refused there.
USED = _words(
    "architectures attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act hidden_size "
    "intermediate_size is_causal max_position_embeddings mlp_bias model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads original_max_position_embeddings partial_rotary_factor per_layer_config quantization_config "
    "rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype vocab_size"
)
# Of inference, of other tasks, of how it was made or initialized: a training of LoRA adapters is the same without it.
WITHOUT_EFFECT = _words(
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _flash_attn_2_enabled "
    "_name_or_path attn_implementation chunk_size_feed_forward finetuning_task id2label initializer_range "
    "is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id name_or_path num_labels output_attentions "
    "output_hidden_states pad_token_id prefix pretraining_tp problem_type return_dict task_specific_params tokenizer_class "
    "torchscript transformers_version transformers.js_config unsloth_fixed unsloth_version use_cache use_return_dict"
)
# Settings of generation, which transformers takes out of a config.json, and answers here are greedy.
OF_GENERATION = _words(
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences "
    "output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind "
    "temperature top_k top_p typical_p"
)
# Values of unknown keys that change nothing whatever the key means.
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


def unsupported_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys whose values transformers obeys and this package doesn't: what would be trained is another model."""
    faults = []
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            faults.append(f"{bias}: found true, expected false: the herd's linears have no bias")
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act: found {config['hidden_act']!r}, expected 'silu'")
    if not config.get("is_causal", True):
        faults.append("is_causal: found false, expected true: a token attends to those before it")
    if config.get("per_layer_config"):
        faults.append("per_layer_config: found settings of single layers, expected layers of one kind")
    return faults


def remarks_on(config: Mapping[str, Any]) -> list[str]:
    """A sentence on each statement of a supported config that is not obeyed here, or contradicts another one."""
    remarks = rope_remarks(config)
    if config.get("attention_dropout"):
        remarks.append(
            f"attention_dropout {config['attention_dropout']} is not applied: transformers would in training"
        )
    known = USED | WITHOUT_EFFECT | OF_GENERATION
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known and not any(type(value) is type(empty) and value == empty for empty in _EMPTY)
    }
    if unknown:
        shown = ", ".join(f"{key}: {_short(value)}" for key, value in sorted(unknown.items()))
        remarks.append(f"{len(unknown):,} settings are unknown and have no effect, as in transformers' Llama: {shown}")
    return remarks


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
