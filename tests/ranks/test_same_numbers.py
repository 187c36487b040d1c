"""The same loss, gradient and adapter however a batch is cut: over ranks, passes, and packed sequences."""

from __future__ import annotations

import itertools

import pytest
import torch

from dist_lora.data.loader import Loader
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World
from tests.ranks.tiny import accumulate, config_of, documents, trainee_of

LENGTHS = [40, 3, 17, 29, 5, 61, 2, 11, 33, 8, 21, 55, 4, 13, 9, 26]


def steps(world: World, folder: str, settings: dict, cut: dict, num_steps: int = 1) -> dict:
    """Losses and gradient norms of some steps, the first gradient, and the adapters after them."""
    config = config_of(folder, **settings)
    trainee = trainee_of(config, world)
    with torch.no_grad():  # B off zero, so that A has a gradient too
        generator = torch.Generator().manual_seed(1)
        for tensor in trainee.adapters.tensors:
            if tensor.attribute == "lora_B":
                drawn = torch.randn(trainee.adapters.shapes[tensor.name], generator=generator) * 0.02
                trainee.adapters.load([(tensor.name, drawn)])
    loader = Loader(
        documents(seed=0, lengths=LENGTHS),
        seed=0,
        world_rank=world.world_rank,
        world_size=world.world_size,
        **{"sequence_length": 64, "packing": False, "global_batch": 16, "micro_batch": 16, **cut},
    )
    adapters = trainee.adapters
    adapters.start_training(config.optim)
    result: dict = {"losses": [], "norms": []}
    for step in range(1, num_steps + 1):
        loss = accumulate(trainee, loader.batch(step - 1))
        if step == 1:
            result["gradient"] = torch.cat(adapters.gradients()).numpy().copy()
        result["losses"].append(loss)
        result["norms"].append(float(adapters.step(lr_at(step, section=config.optim, num_steps=num_steps))))
    result["adapters"] = torch.cat([flat.detach() for flat in adapters.flat_parameters]).numpy().copy()
    return result


CUTS = [
    {"micro_batch": 4},
    {"micro_batch": 1},
    {"packing": True, "micro_batch": 2},
    {"packing": True, "micro_batch": 8, "sequence_length": 200},
]


@pytest.fixture(scope="module")
def whole(tiny_llama) -> dict:
    """One process, one pass, not packed: what all others are compared with."""
    folder = tiny_llama("llama31")
    return {"folder": str(folder), **steps(World.alone(), str(folder), {}, {})}


def assert_equal(found: dict, wanted: dict) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-6, rel=1e-6)
    difference = torch.tensor(found["gradient"] - wanted["gradient"]).norm()
    assert difference < 1e-5 * torch.tensor(wanted["gradient"]).norm()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_batch_cut_into_passes_or_packed_has_the_loss_and_gradient_of_the_whole(whole, cut) -> None:
    assert_equal(steps(World.alone(), whole["folder"], {}, cut), whole)


@pytest.mark.parametrize("size, cut", list(itertools.product([2, 3], [{"micro_batch": 3}, *CUTS[1:]])), ids=str)
def test_ranks_have_the_loss_and_gradient_of_one_process(ranks, whole, size, cut) -> None:
    # 16 sequences over 3 ranks, or few packed ones, leave a rank with passes that hold no target at all.
    for found in ranks(size).run(steps, whole["folder"], {}, cut):
        assert_equal(found, whole)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shape", ["llama3", "llama32"])
def test_clipped_steps_with_recomputation_lead_to_the_adapter_of_one_process(ranks, tiny_llama, size, shape) -> None:
    folder = str(tiny_llama(shape))
    plain = steps(World.alone(), folder, {}, {}, 1)
    half = plain["norms"][0] / 2
    settings = {"optim": {"max_grad_norm": half, "lr": 1e-2, "warmup_steps": 0}}
    wanted = steps(World.alone(), folder, settings, {"global_batch": 6}, 5)
    recomputed = settings | {"train": {"activation_checkpointing": size - 1}}  # of two layers the first, or both
    for found in ranks(size).run(steps, folder, recomputed, {"global_batch": 6, "micro_batch": 1}, 5):
        assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        difference = torch.tensor(found["adapters"] - wanted["adapters"]).norm()
        assert difference < 1e-4 * torch.tensor(wanted["adapters"]).norm()


def beginnings(world: World, folder: str) -> tuple:
    """The adapters' first values, and a loss with and without them."""
    trainee = trainee_of(config_of(folder), world)
    loader = Loader(documents(seed=0, lengths=[20, 30]), sequence_length=64, packing=False, global_batch=2,
                    micro_batch=2, seed=0, world_rank=world.world_rank, world_size=world.world_size)  # fmt: skip
    micro = loader.batch(0).micro_batches[0]
    with torch.no_grad():
        beside = trainee.run(micro)
        for linear in trainee.model.linears().values():
            linear.adapter = None
        bare = trainee.run(micro)
    return trainee.adapters.parameter.detach().numpy(), float(beside), float(bare)


def test_adapters_begin_with_the_same_bytes_on_any_number_of_ranks_and_change_nothing(ranks, tiny_llama) -> None:
    folder = str(tiny_llama("llama31"))
    wanted, beside, bare = beginnings(World.alone(), folder)
    assert beside == bare
    for size in (2, 3):
        for values, beside, bare in ranks(size).run(beginnings, folder):
            assert values.tobytes() == wanted.tobytes()
            assert beside == bare
