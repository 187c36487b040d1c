"""Layers in host memory: the numbers of a base on the device, from two buffers that hold nothing else's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_lora.data.loader import Loader, StepBatch
from dist_lora.engines.host_layers import HostLayers
from dist_lora.engines.single import Single
from dist_lora.evaluation.generate import generate
from dist_lora.layout.memory import setup_of
from dist_lora.layout.setup import base_bytes_on_host
from dist_lora.plan.speed import fetched_bytes
from dist_lora.train.build import Trainee
from dist_lora.world.world import World
from tests.ranks.tiny import accumulate, config_of, documents, trainee_of

CPU = torch.device("cpu")
NAN = 0xFF  # four of these bytes are NaN in fp32, two in bf16


def batch_of() -> StepBatch:
    return Loader(
        documents(seed=0, lengths=[20, 30, 40, 10]), sequence_length=64, packing=False, global_batch=4, micro_batch=2,
        seed=0, world_rank=0, world_size=1,
    ).batch(0)  # fmt: skip


def trainee(folder: Any, offload: str, **settings: Any) -> Trainee:
    made = trainee_of(config_of(folder, parallel={"offload": offload}, **settings), World.alone(CPU))
    made.adapters.start_training(config_of(folder).optim)
    return made


def steps_of(made: Trainee, num_steps: int = 2) -> list[float]:
    """Losses and norms, then the sum of the adapters."""
    made.adapters.initialize(0, made.base.on_disk.index)
    numbers = []
    for _ in range(num_steps):
        numbers += [accumulate(made, batch_of()), float(made.adapters.step(1e-2))]
    return [*numbers, *(float(t.double().sum()) for t in made.adapters.share().values())]


class Poisoned:
    """Overwrites a buffer with NaN as soon as its layer is released, and has it forget the layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_released, self.fetched = 0, list[int]()
        release, fetch = HostLayers._release, HostLayers._fetch

        def poison(layers: HostLayers) -> None:
            buffer = layers._current
            release(layers)
            if buffer is not None:
                buffer.memory.fill_(NAN)
                buffer.layer = None
                self.num_released += 1

        def noted(layers: HostLayers, layer: int) -> Any:
            self.fetched.append(layer)
            return fetch(layers, layer)

        monkeypatch.setattr(HostLayers, "_release", poison)
        monkeypatch.setattr(HostLayers, "_fetch", noted)


@pytest.mark.parametrize(
    ("quant", "recompute", "layers", "tokens"),
    [
        ("none", "none", "all", []),
        ("none", "all", "all", []),
        ("nf4", 2, "all", []),
        ("int8", "all", [2, 3], []),
        ("none", "none", [1], []),
        ("nf4", 1, [2], [7, 260]),
    ],
)
def test_released_buffers_that_hold_nan_change_no_bit(
    tiny_llama, monkeypatch, quant, recompute, layers, tokens
) -> None:
    folder = tiny_llama(num_layers=4)
    settings = {
        "model": {"quant": quant}, "train": {"activation_checkpointing": recompute},
        "lora": {"rank": 4, "alpha": 8, "layers": layers, "train_tokens": tokens},
    }  # fmt: skip
    wanted = steps_of(trainee(folder, "none", **settings))
    offloaded = trainee(folder, "all", **settings)
    assert isinstance(offloaded.engine, Single)
    poisoned = Poisoned(monkeypatch)
    assert steps_of(offloaded) == wanted
    assert poisoned.num_released >= 2 * 2 * 4  # steps, micro-batches, layers of the forward
    offloaded.check_base()


@pytest.mark.parametrize(
    ("layers", "tokens"), [(range(4), []), ([1], []), ([2, 3], []), ([3], []), ([3], [7, 260])], ids=str
)
def test_as_many_layers_are_fetched_as_the_plan_says(tiny_llama, monkeypatch, layers, tokens) -> None:
    folder, lora = tiny_llama(num_layers=4), {"layers": list(layers), "train_tokens": tokens}
    config = config_of(
        folder, parallel={"offload": "base"}, lora=lora,
        train={"sequence_length": 64, "micro_batch": 2, "global_batch": 4},
    )  # fmt: skip
    made = trainee(folder, "base", lora=lora)
    steps_of(made, 1)
    fetched: list[int] = []
    fetch = HostLayers._fetch
    monkeypatch.setattr(HostLayers, "_fetch", lambda self, layer: fetched.append(layer) or fetch(self, layer))
    steps_of(made, 1)
    setup = setup_of(config, made.base.shape, num_nodes=1, gpus_per_node=1, device_bytes=2**34, on_gpu=False)
    assert setup.accumulation_steps == len(batch_of().micro_batches) == 2
    assert len(fetched) * base_bytes_on_host(setup) / 4 == fetched_bytes(setup)
    assert base_bytes_on_host(setup) == sum(
        slot.destination.nbytes for slot in made.engine.slots(made.model) if made.engine.is_on_host(slot)
    )


def test_a_forward_without_gradients_fetches_each_layer_once_and_gathered_ones_none(tiny_llama, monkeypatch) -> None:
    folder = tiny_llama(num_layers=4)
    plain, made = trainee(folder, "none"), trainee(folder, "base")
    poisoned = Poisoned(monkeypatch)

    def answers(of: Trainee) -> Any:
        of.model.eval()
        arguments = {"stop_ids": frozenset(), "max_new_tokens": 3, "world": World.alone(CPU)}
        return generate(of.model, [[5, 6, 7], [9]], **arguments)

    wanted = answers(plain)
    assert answers(made) == wanted
    assert poisoned.fetched == [*range(4)] * 3 + [
        0
    ]  # the first layer of the next forward comes during the last of this
    del poisoned.fetched[:]
    made.engine.keep_gathered(made.model, True)
    assert answers(made) == wanted and not poisoned.fetched
    made.engine.keep_gathered(made.model, False)
    assert all(p.numel() == 0 for p in made.model.blocks()[2].self_attn.parameters() if not p.requires_grad)
    assert steps_of(made) == steps_of(plain)
    made.check_base()


def test_a_forward_that_was_broken_off_leaves_the_next_one_right(tiny_llama, monkeypatch) -> None:
    folder = tiny_llama(num_layers=4)
    wanted, made = steps_of(trainee(folder, "none")), trainee(folder, "base")
    Poisoned(monkeypatch)
    for layer in (0, 2, 3):
        with pytest.raises(KeyError), monkeypatch.context() as broken:
            broken.setattr(made.model.blocks()[layer].mlp, "forward", lambda *_: {}["no such layer"])
            made.run(batch_of().micro_batches[0])
        with torch.no_grad():
            made.run(batch_of().micro_batches[1])  # as an evaluation between steps
        made.run(batch_of().micro_batches[1])  # a backward that never comes
    assert steps_of(made) == wanted


def test_a_layer_that_is_not_needed_has_no_weights_to_be_used_by_mistake(tiny_llama) -> None:
    made = trainee(tiny_llama(num_layers=3), "base")
    linear = made.model.blocks()[1].mlp.down_proj
    with pytest.raises(RuntimeError, match="mat2"):
        linear(torch.zeros(2, linear.in_features))
