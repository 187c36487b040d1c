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
from dist_lora.data.prefetch import StepsAhead, on_device
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


def loader_of(*lengths: int, global_batch: int | None = None, world_size: int = 1) -> Loader:
    return Loader(
        documents(seed=0, lengths=list(lengths)), sequence_length=64, packing=False,
        global_batch=global_batch or len(lengths), micro_batch=2, seed=0, world_rank=world_size - 1, world_size=world_size,
    )  # fmt: skip


def micro_batches(*lengths: int, world_size: int = 1) -> tuple[MicroBatch, ...]:
    """Those of the last of ``world_size`` ranks, each of two documents."""
    return loader_of(*lengths, world_size=world_size).batch(0).micro_batches


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


def test_a_prepared_step_has_its_first_micro_batch_on_the_device_and_the_others_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = loader_of(5, 9, 30, 12, 8, 20, 7, 3, global_batch=6)
    steps = StepsAhead(loader, META)
    with Copies() as copies:
        steps.prepare(1)
    assert copies.names == ["aten._to_copy.default"]
    (first,) = steps.take(1).micro_batches  # an epoch's last step has the rest
    assert first.ids.device == META and first.sample_ids == loader.batch(1).micro_batches[0].sample_ids
    steps.prepare(2)
    first, second, third = steps.take(2).micro_batches
    assert first.ids.is_meta and not second.ids.is_meta
    for made, plain in zip((second, third), loader.batch(2).micro_batches[1:], strict=True):
        assert made.whole is not None and made.ids.data_ptr() != plain.ids.data_ptr()
        assert all(torch.equal(getattr(made, name), getattr(plain, name)) for name in TENSORS)
    monkeypatch.setattr(MicroBatch, "packed", lambda *_, **__: pytest.fail("packed already"))
    with Copies() as copies:
        list(on_device((first, second, third), META))
    assert len(copies.names) == 2


def test_a_step_that_was_prepared_and_not_taken_changes_no_other() -> None:
    loader = loader_of(5, 9, 30, 12, 8, 20, 7, 3, global_batch=3)
    steps = StepsAhead(loader, META)
    for prepared, taken in ((4, 1), (1, 4), (2, 2), (7, 0)):  # as after an interrupted step, or a resume
        steps.prepare(prepared)
        assert (
            steps.take(taken).sample_ids == loader_of(5, 9, 30, 12, 8, 20, 7, 3, global_batch=3).batch(taken).sample_ids
        )
        assert not steps.take(taken).micro_batches[0].ids.is_meta  # taken once


def test_on_the_cpu_a_step_is_read_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepsAhead(loader_of(5, 9), torch.device("cpu"))
    monkeypatch.setattr(Loader, "batch", lambda self, step: pytest.fail("read ahead"))
    steps.prepare(0)


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
