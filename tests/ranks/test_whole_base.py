"""``base_shard: gpu``: what each rank reads and holds, what is sent, and that nobody waits for one that can't read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dist_lora.base.index import open_index
from dist_lora.base.stream import FillReport, fill_slots
from dist_lora.errors import DistLoraError, WeightsError
from dist_lora.evaluation.generate import generate
from dist_lora.train import build
from dist_lora.world.world import World
from tests.ranks.test_frozen_base import BASES, parts_of, publish, sent_in_a_step, step_of
from tests.ranks.tiny import config_of, trainee_of

WHOLE = {"base_shard": "gpu"}
Read = tuple[int, int]  # offset and number of bytes


def while_loading(preadv: Callable[..., int]) -> AbstractContextManager[Any]:
    """Has the base loaded through another ``os.preadv``; what is read of it before, to know it, isn't."""

    def fill(*arguments: Any, **settings: Any) -> FillReport:
        with mock.patch.object(os, "preadv", preadv):
            return fill_slots(*arguments, **settings)

    return mock.patch.object(build, "fill_slots", fill)


def load_counting(
    world: World, folder: str, quant: str
) -> tuple[list[Read], dict[tuple[str, str], bytes], dict[str, float]]:
    """What this rank reads of the weights while it loads, what it holds after a step, and the norms that it knows."""
    reads: list[Read] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        num_read = preadv(descriptor, buffers, offset, *flags)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            reads.append((offset, num_read))
        return num_read

    with while_loading(counting):
        trainee = trainee_of(config_of(folder, model={"quant": quant}, parallel=WHOLE), world, has_norms=True)
    step_of(trainee, world)()
    trainee.check_base()
    held = trainee.engine.frozen_shards(trainee.model)
    parts = {tuple(name.split("/")): values.numpy().tobytes() for name, values in held}
    return reads, parts, dict(trainee.weight_norms)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("size", "node_size", "quant"), [(2, 2, "none"), (3, 3, "nf4"), (4, 2, "int8"), (4, 2, "nf4"), (2, 1, "int8")]
)
def test_a_node_reads_each_byte_once_and_each_rank_holds_the_bytes_of_the_whole(
    ranks, tiny_llama, size, node_size, quant
) -> None:
    folder = str(tiny_llama("llama31"))
    wanted = {key: values.numpy().tobytes() for key, values in parts_of(folder, quant).items()}
    answers = ranks(size).run(load_counting, folder, quant, node_size=node_size)
    for rank, (_, held, _) in enumerate(answers):
        assert held.keys() == wanted.keys()
        assert [key for key in wanted if held[key] != wanted[key]] == [], rank
    tensors = open_index(Path(folder)).tensors.values()
    on_disk = Counter(byte for t in tensors for byte in range(t.start, t.start + t.num_bytes))
    for first in range(0, size, node_size):
        of_node = [reads for reads, _, _ in answers[first : first + node_size]]
        assert Counter(b for reads in of_node for start, count in reads for b in range(start, start + count)) == on_disk
        shares = [sum(count for _, count in reads) for reads in of_node]
        assert max(shares) < 1.1 * sum(shares) / node_size, "one rank reads for the others"
    weights = load_file(Path(folder) / "model.safetensors")
    linears = {name.removesuffix(".weight"): weight for name, weight in weights.items() if "proj" in name}
    expected = {name: pytest.approx(float(weight.double().norm()), rel=1e-6) for name, weight in linears.items()}
    assert [norms for _, _, norms in answers] == [expected] + [{}] * (size - 1)  # whatever the nodes and the format


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_base_published_in_nf4_keeps_its_codes_on_every_rank(ranks, tiny_llama, tmp_path, is_nested) -> None:
    wanted = publish(tiny_llama("llama31"), tmp_path, is_nested=is_nested)
    for _, held, _ in ranks(3).run(load_counting, str(tmp_path), "nf4"):
        assert held == wanted


def test_only_the_adapters_gradients_are_sent_once_a_step(ranks, tiny_llama) -> None:
    folder = str(tiny_llama("llama31"))
    linears = [t for name, t in load_file(Path(folder) / "model.safetensors").items() if "proj" in name]
    trained = 4 * sum(4 * sum(tensor.shape) for tensor in linears)  # fp32, rank 4
    for sent in ranks(4).run(sent_in_a_step, folder, "nf4", WHOLE, False, node_size=2):
        assert {(kind, members) for kind, members, _ in sent} == {("allreduce_", (0, 1, 2, 3))}
        assert [size for _, _, size in sent if size > 64] == [trained]


def flip_what_another_read(world: World, folder: str, quant: str) -> str:
    trainee = trainee_of(config_of(folder, model={"quant": quant}, parallel=WHOLE), world)
    trainee.check_base()
    held = list(trainee.model.base_parameters().values())[5].data.view(-1)
    if world.world_rank == 1:
        held.view(torch.uint8)[0] ^= 1  # in the first rows, which rank 0 has read
    try:
        trainee.check_base()
    except WeightsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("quant", BASES)
def test_one_flipped_bit_of_what_another_rank_has_read_is_found(ranks, tiny_llama, quant) -> None:
    first, second = ranks(2).run(flip_what_another_read, str(tiny_llama("llama31")), quant)
    assert first == "" and "1 of" in second and "the frozen base changed during the run" in second


def load_where_one_cannot_read(world: World, folder: str) -> tuple[str, str]:
    refused = while_loading(mock.Mock(side_effect=OSError(5, "Input/output error")))
    try:
        with refused if world.world_rank == 1 else nullcontext():
            trainee_of(config_of(folder, parallel=WHOLE), world)
    except DistLoraError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_nobody_waits_for_the_rows_of_a_rank_that_cannot_read(ranks, tiny_llama) -> None:
    told = ranks(3).run(load_where_one_cannot_read, str(tiny_llama("llama31")))
    assert [kind for kind, _ in told] == ["RankError", "WeightsError", "RankError"]
    assert all("Input/output error" in text for _, text in told)


def answers_of(world: World, folder: str, parallel: dict[str, Any]) -> list[list[int]]:
    trainee = trainee_of(config_of(folder, model={"quant": "nf4"}, parallel=parallel), world)
    step_of(trainee, world, micro_batches=4 // world.world_size)()
    trainee.model.eval()
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5]]
    return generate(trainee.model, prompts, stop_ids=frozenset(), max_new_tokens=6, world=world)


def test_answers_are_those_of_one_process(ranks, tiny_llama) -> None:
    folder = str(tiny_llama("llama31"))
    alone = answers_of(World.alone(), folder, {"engine": "none"})
    assert ranks(2).run(answers_of, folder, WHOLE) == [alone, alone]
