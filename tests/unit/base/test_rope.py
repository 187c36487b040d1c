"""RoPE's frequencies are Meta's, bit for bit, and survive a model that is built on meta."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dist_lora.base.attention import Documents
from dist_lora.base.llama import build_on_meta, materialize
from dist_lora.base.rope import check_frequencies, inverse_frequencies, rotate, rotation
from dist_lora.errors import WeightsError
from dist_lora.herd.members import MEMBERS
from tests.shapes import rope_parameters

SHAPES = {name: MEMBERS[name].shape for name in ("3-8b", "3.1-8b", "3.1-70b", "3.1-405b", "3.2-1b")}


def metas_frequencies(shape) -> torch.Tensor:
    """``precompute_freqs_cis`` and ``apply_scaling`` of Meta's llama3/model.py, frequency by frequency."""
    dim = shape.head_dim
    freqs = 1.0 / (shape.rope_theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    if shape.rope_scaling is None:
        return freqs
    scale_factor, low_freq_factor, high_freq_factor, old_context_len = dataclasses.astuple(shape.rope_scaling)
    low_freq_wavelen = old_context_len / low_freq_factor
    high_freq_wavelen = old_context_len / high_freq_factor
    new_freqs = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            new_freqs.append(freq)
        elif wavelen > low_freq_wavelen:
            new_freqs.append(freq / scale_factor)
        else:
            smooth = (old_context_len / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
            new_freqs.append((1 - smooth) * freq / scale_factor + smooth * freq)
    return torch.tensor(new_freqs, dtype=freqs.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_frequencies_are_metas_bit_for_bit_after_the_model_was_built_on_meta(name) -> None:
    shape = dataclasses.replace(SHAPES[name], num_layers=1, hidden=256, ffn=64, vocab=32)
    model = build_on_meta(shape, dtype=torch.bfloat16)
    materialize(model, torch.device("cpu"))
    assert model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, metas_frequencies(shape))
    check_frequencies(model.inv_freq, shape)


@pytest.mark.parametrize("name", ["3-8b", "3.1-8b", "3.2-1b"])
def test_hidden_states_far_out_equal_those_of_transformers(name) -> None:
    from transformers import LlamaConfig, LlamaModel

    member = SHAPES[name]
    shape = dataclasses.replace(member, num_layers=1, hidden=64, ffn=64, num_heads=2, num_kv_heads=1, vocab=32)
    torch.manual_seed(0)
    theirs = LlamaModel(
        LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=shape.head_dim, vocab_size=32, rope_parameters=rope_parameters(shape),
            rms_norm_eps=shape.norm_eps, max_position_embeddings=131072,
        )
    )  # fmt: skip
    ours = build_on_meta(dataclasses.replace(shape, tied=True), dtype=torch.float32)
    materialize(ours, torch.device("cpu"))
    state = {f"model.{key}": value for key, value in theirs.state_dict().items()}
    for key, parameter in ours.base_parameters().items():
        parameter.data.copy_(state[key])
    ids = torch.randint(0, 32, (5,))
    # Of 3-8B the positions beyond its context are computed all the same.
    positions = torch.tensor([0, 8191, 8192, 40000, 131071])
    with torch.no_grad():
        wanted = theirs(ids[None], position_ids=positions[None], attention_mask=None).last_hidden_state[0]
        logits = ours(ids, positions=positions, attention=Documents((0, 5)), rows=torch.arange(5))
    torch.testing.assert_close(logits, wanted @ theirs.embed_tokens.weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("poison", [math.nan, 1.0])
def test_poisoned_frequencies_stop_the_start(poison) -> None:
    shape = SHAPES["3.1-8b"]
    frequencies = inverse_frequencies(shape)
    frequencies[3] = poison
    with pytest.raises(WeightsError, match="rotary embedding's frequencies are not those of this model"):
        check_frequencies(frequencies, shape)


def test_frequencies_in_another_type_stop_the_start() -> None:
    shape = SHAPES["3.1-8b"]
    with pytest.raises(WeightsError, match="bfloat16"):
        check_frequencies(inverse_frequencies(shape).bfloat16(), shape)


def test_heads_and_their_gradients_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, d_rotated = torch.randn(2, 7, 3, 16, generator=generator, dtype=torch.float64)
    cos, sin = rotation(torch.arange(7), torch.rand(8, generator=generator), torch.float64)
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        leaf = heads.to(dtype).requires_grad_()
        rotated = rotate(leaf, cos.to(dtype), sin.to(dtype))
        rotated.backward(d_rotated.to(dtype))
        assert leaf.grad is not None
        found[dtype] = [rotated.detach().double(), leaf.grad.double()]
    for single, exact in zip(*found.values(), strict=True):
        torch.testing.assert_close(single, exact, atol=2e-6, rtol=0)  # each a sum of two products below 4
