"""What goes from the host to the device in a step: one copy a micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.base.index import WeightIndex
from dist_lora.base.quant.published import BaseOnDisk
from dist_lora.data.loader import Loader, MicroBatch
from dist_lora.data.prefetch import on_device
from dist_lora.herd.shape import Shape
from dist_lora.lora.origin import BaseIdentity
from dist_lora.train.build import Base, Trainee, shard_model
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, documents

SHAPE = Shape.from_config(
    {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    },
    where="a test",
)  # fmt: skip
TENSORS = ("ids", "positions", "starts", "target_index", "labels")
META = torch.device("meta")


def micro_batches(*lengths: int, world_size: int = 1) -> tuple[MicroBatch, ...]:
    """Those of the last of ``world_size`` ranks, each of two documents."""
    loader = Loader(
        documents(seed=0, lengths=list(lengths)), sequence_length=64, packing=False, global_batch=len(lengths),
        micro_batch=2, seed=0, world_rank=world_size - 1, world_size=world_size,
    )  # fmt: skip
    return loader.batch(0).micro_batches


class Copies(TorchDispatchMode):
    """Counts the operations that make something on the meta device of a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        result = func(*args, **kwargs or {})

        def devices(tree: Any) -> set[str]:
            return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim}

        if "cpu" in devices((args, kwargs)) and "meta" in devices((args, result)):
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("lengths", [(5, 9, 30), (20,)], ids=["two bounds and three", "two bounds"])
def test_a_packed_micro_batch_has_all_that_it_had(lengths) -> None:
    for micro in (*micro_batches(*lengths), *micro_batches(*lengths[:1], world_size=2)):
        again = micro.unpacked(micro.packed(is_pinned=False))
        for name in TENSORS:
            before, after = getattr(micro, name), getattr(again, name)
            assert torch.equal(before, after) and before.dtype == after.dtype, name
        assert (again.bounds, again.sample_ids) == (tuple(micro.starts.tolist()), micro.sample_ids)


def test_on_the_cpu_a_micro_batch_is_itself() -> None:
    batches = micro_batches(5, 9, 30)
    with Copies() as copies:
        given = list(on_device(batches, torch.device("cpu")))
    assert all(a is b for a, b in zip(given, batches, strict=True)) and not copies.names


def test_a_step_copies_once_a_micro_batch_and_in_no_layer() -> None:
    """A model for a GPU (flash attention, recomputation) on the meta device."""
    config = config_of(
        Path("model"), model={"name": "tiny", "dtype": "bf16"}, train={"activation_checkpointing": "all"}
    )
    world = World.alone(META)
    sharded = shard_model(config, SHAPE, world, name="tiny", memory_bytes=2**40, on_gpu=True, has_bf16=True)
    assert sharded.choices.attention == "varlen" and sharded.choices.recomputed
    sharded.model.inv_freq = sharded.model.inv_freq.to(META)
    adapters = sharded.engine.adapters(sharded.tensors)
    identity = BaseIdentity("tiny", None, None, None)
    base = Base(Path(), {}, SHAPE, BaseOnDisk(WeightIndex(Path(), {}), {}), None, identity)
    trainee = Trainee(base, sharded.model, sharded.engine, adapters, "varlen", sharded.precision, {})
    sharded.model.train()
    batches = micro_batches(5, 9, 30, 12, 8)
    assert len(batches) == 3
    with Copies() as copies:
        for index, micro in enumerate(on_device(batches, META)):
            adapters.backward(trainee.run(micro) / 7, is_last=index == 2)
    assert copies.names == ["aten._to_copy.default"] * 3
