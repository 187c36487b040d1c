"""The operations of a step by the formula are those that PyTorch counts while the model computes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_lora.base.attention import Documents
from dist_lora.herd.shape import Shape
from dist_lora.plan.hardware import peak_flops_per_s
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, trainee_of


def test_operations_are_those_that_pytorch_counts(tiny_llama) -> None:
    trainee = trainee_of(config_of(tiny_llama()), World.alone())
    trainee.model.train()
    shape, tokens = trainee.base.shape, 40
    rows = torch.arange(0, tokens, 2)
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # PyTorch has no formula for it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trainee.model(
            torch.zeros(tokens, dtype=torch.int64),
            positions=torch.arange(tokens),
            attention=Documents((0, tokens), "eager"),  # which computes every pair, masked ones too
            rows=rows,
            labels=torch.zeros(len(rows), dtype=torch.int64),
        ).backward()
    needed = shape.flops(tokens=tokens, rows=len(rows), pairs=tokens**2, trained_weights=trainee.adapters.num_elements)
    assert counter.get_total_flops() == needed - 2 * tokens * _not_needed_in_the_first_layer(shape, rank=4)


def _not_needed_in_the_first_layer(shape: Shape, *, rank: int) -> int:
    """Weights whose input is the embedding, which needs no gradient: of q, k and v, and of the A's on them."""
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return (rows + 3 * rank) * shape.hidden


def test_a_gpus_peak_is_its_vendors_for_the_dtype_of_its_matmuls() -> None:
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops_per_s("a GPU of tomorrow", "bf16") is None
