"""The dtypes of a run: logged, and checked against what a library may have cast."""

from __future__ import annotations

import os

import pytest
import torch

from dist_lora.base.llama import Llama, build_on_meta
from dist_lora.base.quant.formats import Int8, Nf4, Plain
from dist_lora.config.schema import LoraSection
from dist_lora.engines.adapters import Adapters, ReplicatedAdapters
from dist_lora.engines.precision import Precision, set_products
from dist_lora.errors import TrainingError
from dist_lora.herd.shape import Shape
from dist_lora.lora.attach import attach_adapters
from dist_lora.world.world import World

SHAPE = Shape(64, 128, 2, 4, 2, 16, 512, 5e5, None, 8192, 1e-5, tied=False)


def made(precision: Precision) -> tuple[Llama, Adapters]:
    model = build_on_meta(SHAPE, dtype=precision.dtype, fmt=precision.fmt)
    tensors = attach_adapters(model, LoraSection(rank=4))
    return model, ReplicatedAdapters(tensors, World.alone(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_model_has_the_dtypes_that_are_declared(quant, dtype) -> None:
    precision = Precision({"none": Plain(dtype), "nf4": Nf4(), "int8": Int8()}[quant], dtype)
    precision.check(*made(precision))


def test_the_line_says_what_is_quantized_and_what_is_not() -> None:
    assert Precision(Nf4(), torch.bfloat16).line() == (
        "dtypes: base nf4 (codes uint8, absmax fp32; embeddings, norms and head bf16), compute bf16, "
        "adapters and AdamW fp32"
    )
    assert Precision(Plain(torch.float32), torch.float32).line() == (
        "dtypes: base fp32 (not quantized), compute fp32, adapters and AdamW fp32"
    )


def test_products_are_summed_in_fp32_and_repeated_bit_for_bit_where_asked(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        set_products(is_deterministic=True)
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_products(is_deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_scales_that_were_cast_and_gradients_of_the_base_are_named() -> None:
    precision = Precision(Nf4(), torch.bfloat16)
    model, adapters = made(precision)
    linear = model.linears()["model.layers.1.mlp.up_proj"]
    linear.absmax = torch.nn.Parameter(linear.absmax.to(torch.bfloat16), requires_grad=False)
    model.model.norm.weight.grad = torch.empty_like(model.model.norm.weight)
    with pytest.raises(TrainingError) as raised:
        precision.check(model, adapters)
    assert "2 tensors don't have the dtypes" in str(raised.value)
    assert "model.layers.1.mlp.up_proj.absmax is bf16, not fp32" in str(raised.value)
    assert "model.norm.weight has a gradient" in str(raised.value)


def test_adapters_in_16_bits_are_named() -> None:
    precision = Precision(Plain(torch.float32), torch.float32)
    model, adapters = made(precision)
    half = adapters.tensors[3]
    half.put(torch.nn.Parameter(half.parameter.data.bfloat16()))
    with pytest.raises(TrainingError, match=r"k_proj.lora_B is bf16, not fp32"):
        precision.check(model, adapters)
