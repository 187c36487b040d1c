"""The frozen base on several ranks: who keeps how much, what is sent, and that no byte of it ever changes."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_lora.base.llama import build_on_meta
from dist_lora.base.quant.formats import format_of
from dist_lora.base.quant.nf4 import BLOCK, LEVELS
from dist_lora.data.loader import EvalBatches, Loader, MicroBatch
from dist_lora.errors import WeightsError
from dist_lora.herd.shape import read_shape
from dist_lora.train.build import Trainee
from dist_lora.world.world import World
from tests import turns
from tests.ranks.tiny import accumulate, config_of, documents, trainee_of
from tests.ranks.wire import Wire

BASES = ("none", "nf4", "int8")
ENGINES = ("fsdp2", "zero3")


def parts_of(folder: str, quant: str) -> dict[tuple[str, str], torch.Tensor]:
    """Every stored part of a base, quantized whole in one process: what the shards must add up to."""
    shape = read_shape(Path(folder))
    fmt = format_of(quant, torch.float32)
    on_disk = load_file(Path(folder) / "model.safetensors")
    formats = build_on_meta(shape, dtype=torch.float32, fmt=fmt).formats()
    return {
        (name, part): values
        for name, tensor in on_disk.items()
        for part, values in (formats[name].quantize_rows(tensor) if name in formats else {"weight": tensor}).items()
    }


def step_of(trainee: Trainee, world: World, *, micro_batches: int = 1):
    """A function that takes one step, of so many micro-batches a rank."""
    adapters = trainee.adapters
    adapters.start_training(config_of("unused").optim)
    count = micro_batches * world.world_size
    loader = Loader(
        documents(seed=0, lengths=[20 + 3 * i for i in range(count)]),
        seed=0,
        world_rank=world.world_rank,
        world_size=world.world_size,
        sequence_length=64,
        packing=False,
        global_batch=count,
        micro_batch=1,
    )

    def step() -> float:
        accumulate(trainee, loader.batch(0))
        return float(adapters.step(1e-3))

    return step


def losses_and_norms_of(trainee: Trainee, world: World) -> tuple[list[float], list[float]]:
    """Three steps' losses, of two micro-batches each, and gradient norms."""
    losses: list[float] = []
    run = trainee.run

    def noted(batch: MicroBatch) -> Tensor:
        loss = run(batch)
        losses.append(float(loss.detach()))
        return loss

    object.__setattr__(trainee, "run", noted)
    step = step_of(trainee, world, micro_batches=2)
    return losses, [step() for _ in range(3)]


# What a rank keeps


def storages() -> dict[int, int]:
    """Address and bytes of every storage that a tensor of this process refers to."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            with contextlib.suppress(RuntimeError):  # of a subclass without storage
                local = thing.to_local() if isinstance(thing, DTensor) else thing
                found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


def kept_bytes(world: World, folder: str, quant: str, engine: str) -> tuple[int, int]:
    """Bytes of all storages that came to be with a trainee, and those of its trained state."""
    before = storages()
    settings = {"model": {"quant": quant}, "parallel": {"engine": engine}, "lora": {"rank": 1}}
    trainee = trainee_of(config_of(folder, **settings), world)
    step_of(trainee, world)()  # FSDP2 may move shards to padded copies at its first forward
    trainee.adapters.begin_step()
    kept = sum(size for address, size in storages().items() if address not in before)
    return kept, 16 * trainee.adapters.num_elements


@pytest.mark.parametrize(
    "engine, quant", turns.in_suite(("fsdp2", "nf4"), ("zero3", "none"), of=itertools.product(ENGINES, BASES))
)
def test_two_ranks_each_keep_half_of_the_base_and_no_more(ranks, tiny_llama, quant, engine) -> None:
    folder = str(tiny_llama("llama31", num_layers=4, ffn=256))
    whole = sum(values.nbytes for values in parts_of(folder, quant).values())
    for kept, trained in ranks(2).run(kept_bytes, folder, quant, engine):
        assert 0.5 * whole <= kept <= 0.55 * whole + trained


# What is sent


def sent_in_a_step(world: World, folder: str, quant: str, parallel: dict, gathered: bool) -> list:
    trainee = trainee_of(config_of(folder, model={"quant": quant}, parallel={"engine": "fsdp2", **parallel}), world)
    if gathered:
        trainee.engine.keep_gathered(trainee.model, True)
    step = step_of(trainee, world, micro_batches=2)
    step()
    with Wire() as wire:
        step()
    return [(sent.kind, sent.ranks, sent.num_bytes) for sent in wire.sent]


@pytest.mark.parametrize("quant", BASES)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_block_is_sent_as_it_is_stored_twice_a_micro_batch_or_once(ranks, tiny_llama, quant, gathered) -> None:
    folder = str(tiny_llama("llama31"))
    parts = parts_of(folder, quant)
    block = sum(values.nbytes for (name, _), values in parts.items() if ".layers.0." in name)
    ends = parts["lm_head.weight", "weight"].nbytes
    linears = sum(values.nbytes for (name, _), values in parts.items() if ".layers.0." in name and "proj" in name)
    weights = sum(out * in_ for out, in_ in read_shape(Path(folder)).linear_shapes().values())
    assert linears <= {"none": 4, "nf4": 0.5625, "int8": 1.125}[quant] * weights
    sent = Counter(ranks(2).run(sent_in_a_step, folder, quant, {}, gathered)[0])
    gatherings = {size: count for (kind, _, size), count in sent.items() if kind == "_allgather_base_"}
    # Two micro-batches, two layers: forward and backward, or forward alone; both ends in the forward alone.
    assert gatherings.pop(block) == (4 if gathered else 8)
    assert gatherings.pop(ends) == 4
    assert gatherings == {64 * 4: 2}  # the last norm, the root's own


@pytest.mark.parametrize("adapters", ["replicate", "shard"])
def test_between_nodes_only_adapter_gradients_are_sent_and_once_a_step(ranks, tiny_llama, adapters) -> None:
    folder = str(tiny_llama("llama31"))
    parallel = {"base_shard": "node", "adapters": adapters}
    answers = ranks(4).run(sent_in_a_step, folder, "nf4", parallel, False, node_size=2)
    trained = 4 * read_shape(Path(folder)).adapter_parameters(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), range(2), 4
    )
    for rank, answer in enumerate(answers):
        crossing = [(kind, size) for kind, members, size in answer if len({member // 2 for member in members}) > 1]
        assert all(kind == "allreduce_" for kind, _ in crossing), rank
        large = sorted(size for _, size in crossing if size > 64)
        assert sum(large) == (trained if adapters == "replicate" else trained // 2)
        assert sum(size for _, size in crossing if size <= 64) <= 32  # scalars


# That nothing changes


def every_byte_model(folder: Path, source: Path) -> Path:
    """A tiny model whose q_proj has, in NF4, every byte there is among its codes, in each eight rows."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    codes = np.arange(256)
    levels = torch.tensor(LEVELS)[torch.from_numpy(np.stack([codes >> 4, codes & 15], axis=1).reshape(-1))]
    rows = levels.view(8, BLOCK)  # each block holds -1 and 1: its absmax is 1, its codes are these
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = rows.repeat(8, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shares_after_training(world: World, folder: str, quant: str, engine: str) -> list:
    config = config_of(
        folder,
        model={"quant": quant},
        parallel={"engine": engine},
        train={"activation_checkpointing": True},
    )
    trainee = trainee_of(config, world)
    step = step_of(trainee, world, micro_batches=2)
    for _ in range(3):
        step()
    held_out = EvalBatches(
        documents(seed=1, lengths=[9, 30]),
        micro_batch=1,
        sequence_length=64,
        packing=False,
        world_rank=world.world_rank,
        world_size=world.world_size,
    )
    with torch.no_grad():
        for batch in held_out:
            trainee.run(batch)
    trainee.check_base()
    slots = trainee.engine.slots(trainee.model)
    return [(slot.name, slot.part, slot.first, slot.destination.numpy().copy()) for slot in slots]


@pytest.mark.parametrize(
    "engine, quant", turns.in_suite(("fsdp2", "none"), ("zero3", "int8"), of=itertools.product(ENGINES, BASES))
)
def test_after_steps_and_an_evaluation_the_shards_are_the_bytes_of_the_whole(
    ranks, tiny_llama, tmp_path, quant, engine
) -> None:
    folder = str(every_byte_model(tmp_path, tiny_llama("llama31")))
    wanted = parts_of(folder, quant)
    if quant == "nf4":
        assert len(wanted["model.layers.0.self_attn.q_proj.weight", "codes"].unique()) == 256
    found: dict[tuple[str, str], list] = {}
    for share in ranks(2).run(shares_after_training, folder, quant, engine):
        for name, part, first, values in share:
            found.setdefault((name, part), []).append((first, values))
    assert found.keys() == wanted.keys()
    for key, shares in found.items():
        shares.sort(key=lambda share: share[0])
        together = np.concatenate([values for _, values in shares])
        assert together.tobytes() == wanted[key].numpy().tobytes(), key


# What a publisher of 4-bit models may leave unquantized: a linear of every layer, and most of one layer.
LEFT = ("k_proj", "layers.1.mlp")


def publish(source: Path, folder: Path, *, is_nested: bool) -> dict[tuple[str, str], bytes]:
    """Writes a model as bitsandbytes quantizes it, all but LEFT; returns the parts that a base should have of it."""
    from bitsandbytes import functional

    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[tuple[str, str], bytes] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "proj" not in name or any(left in name for left in LEFT):
            tensors[name] = tensor
            wanted[name, "weight"] = tensor.numpy().tobytes()
            continue
        codes, state = functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=is_nested)
        tensors |= {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        absmax = (
            functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if is_nested else state.absmax
        )
        wanted |= {(name, "codes"): codes.numpy().tobytes(), (name, "absmax"): absmax.numpy().tobytes()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return wanted


@pytest.mark.slow
@pytest.mark.parametrize("size, engine", [(2, "fsdp2"), (3, "fsdp2"), (2, "zero3")])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_base_published_in_nf4_keeps_its_codes_and_what_was_left_unquantized_on_every_rank(
    ranks, tiny_llama, tmp_path, size, engine, is_nested
) -> None:
    wanted = publish(tiny_llama("llama31"), tmp_path, is_nested=is_nested)
    found: dict[tuple[str, str], list] = {}
    for share in ranks(size).run(shares_after_training, str(tmp_path), "nf4", engine):
        for name, part, first, values in share:
            found.setdefault((name, part), []).append((first, values))
    for key, content in wanted.items():
        shares = [values for _, values in sorted(found[key], key=lambda share: share[0])]
        assert np.concatenate(shares).tobytes() == content, key


def losses_of(world: World, folder: str, engine: str) -> list[float]:
    config = config_of(folder, model={"quant": "nf4"}, parallel={"engine": engine})
    step = step_of(trainee_of(config, world), world, micro_batches=4 // world.world_size)
    return [step() for _ in range(3)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_base_of_two_formats_has_the_losses_of_one_process(ranks, tiny_llama, tmp_path, engine) -> None:
    publish(tiny_llama("llama31"), tmp_path, is_nested=True)
    alone = losses_of(World.alone(), str(tmp_path), "none")
    for losses in ranks(2).run(losses_of, str(tmp_path), engine):
        assert losses == pytest.approx(alone, rel=1e-5)


def change_a_byte(world: World, folder: str, quant: str) -> str:
    trainee = trainee_of(config_of(folder, model={"quant": quant}), world)
    trainee.check_base()
    name, share = trainee.engine.frozen_shards(trainee.model)[5]
    if world.world_rank == 1:
        share.view(torch.uint8)[-1] ^= 1
    try:
        trainee.check_base()
    except WeightsError as error:
        return f"{error} | {name}"
    return ""


@pytest.mark.parametrize("quant", BASES)
def test_one_flipped_bit_of_a_share_is_found_and_named(ranks, tiny_llama, quant) -> None:
    first, second = ranks(2).run(change_a_byte, str(tiny_llama("llama31")), quant)
    assert first == ""
    told, _, name = second.partition(" | ")
    assert "1 of" in told and name in told and "the frozen base changed during the run" in told


def gradients_of_the_base(world: World, folder: str, engine: str) -> list[str]:
    trainee = trainee_of(config_of(folder, model={"quant": "nf4"}, parallel={"engine": engine}), world)
    step_of(trainee, world, micro_batches=2)()
    return [name for name, p in trainee.model.base_parameters().items() if p.grad is not None or p.requires_grad]


@pytest.mark.parametrize("engine", ENGINES)
def test_no_frozen_parameter_gets_a_gradient(ranks, tiny_llama, engine) -> None:
    assert ranks(2).run(gradients_of_the_base, str(tiny_llama("llama31")), engine) == [[], []]


def kept_between_micro_batches(world: World, folder: str, adapters: str, micro_batches: int) -> int:
    """The most bytes that are there after any backward of a step of so many micro-batches, batches not counted."""
    settings = {"model": {"quant": "nf4"}, "parallel": {"engine": "fsdp2", "adapters": adapters}}
    trainee = trainee_of(config_of(folder, **settings), world)
    step_of(trainee, world)()
    trainee.adapters.begin_step()
    before = storages()
    batch = Loader(
        documents(seed=0, lengths=[20] * 2 * micro_batches),
        seed=0,
        world_rank=world.world_rank,
        world_size=world.world_size,
        sequence_length=64,
        packing=False,
        global_batch=2 * micro_batches,
        micro_batch=1,
    ).batch(0)
    most = 0
    for i, micro in enumerate(batch.micro_batches):
        trainee.adapters.backward(trainee.run(micro), is_last=i == micro_batches - 1)
        now = {address: size for address, size in storages().items() if address not in before}
        most = max(most, sum(size for size in now.values() if size > 64 * 20))
    return most


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["replicate", "shard"])
def test_accumulating_eight_times_keeps_no_more_than_once(ranks, tiny_llama, adapters) -> None:
    folder = str(tiny_llama("llama31"))
    once, eight = (ranks(2).run(kept_between_micro_batches, folder, adapters, count)[0] for count in (1, 8))
    assert eight <= 1.05 * once + 64 * 20
