"""The plan of a run: arithmetic that is checked by hand and by autograd, and a command that says what fits."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dist_lora.base.attention import Documents
from dist_lora.base.llama import build_on_meta, materialize
from dist_lora.base.quant.formats import format_of
from dist_lora.base.rope import rotation
from dist_lora.cli import app
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.shape import Shape
from dist_lora.layout.activations import saved_bytes_of_layer
from dist_lora.layout.memory import setup_of
from dist_lora.layout.setup import Setup
from dist_lora.layout.storage import base_parts
from dist_lora.lora.attach import attach_adapters
from dist_lora.plan.hardware import GPUS, find_gpu, gpu_of_memory
from dist_lora.plan.plan import Machines, Plan, make_plan, sweep
from dist_lora.plan.speed import flops_per_token
from dist_lora.plan.table import lines_of
from dist_lora.text import GIB
from dist_lora.train.build import shard_model
from dist_lora.world.world import World
from tests import ROOT
from tests.shapes import GPT3, GPT3_WEIGHTS

H100 = GPUS["h100-80gb"]
TINY = Shape(
    hidden=256, ffn=512, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, vocab=512, rope_theta=5e5,
    rope_scaling=None, context=8192, norm_eps=1e-5, tied=False,
)  # fmt: skip


def config_of(**sections: Any) -> Config:
    tree: dict[str, Any] = {"run": "it", "model": {"name": "3.1-8b"}, "data": {"train": "x.jsonl"}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Config.model_validate(tree)


def setup_for(
    config: Config, shape: Shape, *, num_nodes: int = 1, gpus_per_node: int = 8, on_gpu: bool = True
) -> Setup:
    return setup_of(
        config, shape, num_nodes=num_nodes, gpus_per_node=gpus_per_node, device_bytes=80 * GIB, on_gpu=on_gpu
    )


# By hand


@pytest.mark.parametrize(
    "quant, a_weight", [("none", 2.0), ("int8", 1.0), ("nf4", 0.5625)], ids=("none", "int8", "nf4")
)
def test_the_bytes_of_8b_are_those_of_its_card(quant: str, a_weight: float) -> None:
    shape = MEMBERS["3.1-8b"].shape
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    ends = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096
    assert linears + ends == 8_030_261_248
    expected = a_weight * linears + 2 * ends + (4 * rows if quant == "int8" else 0)
    assert sum(part.num_bytes for part in base_parts(shape, quant=quant, item_bytes=2)) == expected


def test_the_shares_of_ranks_are_rounded_up_to_rows() -> None:
    setup = setup_for(config_of(parallel={"engine": "fsdp2", "base_shard": "node"}), TINY, gpus_per_node=3)
    parts = {part.name: part.shard_bytes(3) for part in base_parts(TINY, quant="none", item_bytes=2)}
    assert parts["q_proj.weight"] == 86 * 256 * 2  # of 256 rows
    assert setup.base_ranks == 3


def test_operations_of_a_token_by_hand() -> None:
    config = config_of(lora={"rank": 4, "targets": ["q_proj"]}, train={"activation_checkpointing": False})
    frozen = 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    trained = 3 * 4 * (256 + 256)
    seen = 3 * 256 * 100 / 2 * 2
    expected = 4 * (frozen + 512 * 256) + 6 * trained + 6 * seen
    assert flops_per_token(setup_for(config, TINY), context=100) == expected
    for setting, share in (("all", 1), (2, 2 / 3)):
        again = config_of(lora={"rank": 4, "targets": ["q_proj"]}, train={"activation_checkpointing": setting})
        forward = 2 * (frozen - 3 * 512 * 256 + trained + seen)  # without down_proj's frozen matmul
        assert flops_per_token(setup_for(again, TINY), context=100) == pytest.approx(expected + share * forward)


def test_layers_without_adapters_recompute_only_the_frozen_products() -> None:
    flops = {
        setting: flops_per_token(
            setup_for(config_of(lora={"rank": 4, "layers": [1]}, train={"activation_checkpointing": setting}), TINY),
            context=0,
        )
        for setting in ("none", 1, "all")
    }
    linears = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    trained = setup_for(config_of(lora={"rank": 4, "layers": [1]}), TINY).trained_weights
    linears -= 512 * 256  # without down_proj's frozen matmul
    assert flops[1] - flops["none"] == 2 * (linears + trained)
    assert flops["all"] - flops[1] == 2 * linears  # of layer 2; nothing reaches layer 0's backward


# By autograd


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "dtype, on_gpu",
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=("fp32", "fp32 on a CPU", "bf16"),
)
@pytest.mark.parametrize(
    "targets, layers",
    [("all", "all"), (["q_proj", "v_proj"], "all"), (["down_proj"], [1]), ("all", [1, 2]), (["o_proj", "up_proj"], "all"),
     (["gate_proj"], "all"), (["up_proj", "down_proj"], [0, 2]), (["gate_proj", "up_proj"], "all")],
    ids=str,
)  # fmt: skip
def test_what_a_layer_keeps_for_its_backward_is_what_autograd_saves(dtype, on_gpu, targets, layers, dropout) -> None:
    """Counted are storages: what two operators save together is one."""
    tokens = 100
    config = config_of(
        lora={"rank": 8, "targets": targets, "layers": layers, "dropout": dropout},
        train={"micro_batch": 1, "sequence_length": tokens, "activation_checkpointing": False},
        model={"name": "3.1-8b", "dtype": "fp32" if dtype == torch.float32 else "bf16"},
    )
    setup = setup_for(config, TINY, gpus_per_node=1, on_gpu=on_gpu)
    model = build_on_meta(TINY, dtype=dtype, fmt=format_of("none", dtype))
    attach_adapters(model, config.lora)
    materialize(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    # As on a GPU; its flash kernel for 16 bits saves what the CPU's does.
    backend = "sdpa" if setup.choices.attention == "varlen" else setup.choices.attention
    x = torch.randn(tokens, TINY.hidden).to(dtype)
    rotary = rotation(torch.arange(tokens), model.inv_freq, dtype)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in rotary}
    alive = []  # so that no storage takes the place of another
    for layer, block in enumerate(model.model.layers):
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = block(x, rotary, Documents((0, tokens), backend))
        alive += [*saved, x]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        found = sum(size for pointer, size in storages.items() if pointer not in known)
        assert saved_bytes_of_layer(setup, layer) == found, layer
        known |= set(storages)


def test_a_token_of_8b_keeps_94_568_bytes_a_layer() -> None:
    setup = setup_for(config_of(model={"name": "3.1-8b"}, lora={"rank": 16}), MEMBERS["3.1-8b"].shape)
    assert setup.item_bytes == 2 and setup.lora_rank == 16
    casts = 2 * setup.shape.adapter_parameters(setup.targets, (0,), 16)
    a_token = (saved_bytes_of_layer(setup, 1) - casts) / setup.micro_tokens
    # By hand: the inputs of both norms, query and output, key and value, gate and up; in fp32 32 heads and two norms.
    assert a_token == 2 * (4 * 4096 + 2 * 1024 + 2 * 14336 + 7 * 16) + 4 * (32 + 2) == 94_568


# A model of which there is nothing but sizes


def test_gpt3_is_planned_by_the_weights_that_were_counted() -> None:
    config = config_of(
        model={"name": "GPT-3", "shape": {**GPT3, "num_parameters": GPT3_WEIGHTS}},
        lora={"rank": 4, "targets": ["q_proj", "v_proj"]},
        train={"activation_checkpointing": False, "sequence_length": 2048},
    )
    plan = make_plan(config, Machines(1, 8, H100))
    told = plan.to_json()
    assert told["frozen_weights"] == 175_000_000_000
    assert told["trained_weights"] == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert plan.memory.base * 8 == pytest.approx(350e9, rel=1e-4)  # 2 bytes each, in rows that divide by 8
    # Of a checkpoint of 16 bits: the paper's "35MB".
    assert 2 * told["trained_weights"] == 37_748_736
    ends = 50257 * 12288
    products = 4 * (175e9 - ends) + 4 * ends + 6 * 18_874_368
    attention = 6 * 96 * 12288 * 2048 / 2 * 2
    assert flops_per_token(plan.setup, context=2048) == pytest.approx(products + attention, rel=1e-6)
    assert (
        "  175,000,000,000 frozen weights (as given; computed as a Llama of these sizes), 18,874,368 trained"
        in list(lines_of(plan))
    )


def test_a_count_that_is_a_llamas_own_changes_no_plan() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
    plans = [
        make_plan(config_of(model={"name": "it", "quant": quant, "shape": {**sizes, **counted}}), Machines(1, 8, H100))
        for quant in ("none", "nf4", "int8")
        for counted in ({}, {"num_parameters": 8_030_261_248})
    ]
    for plain, counted in zip(plans[::2], plans[1::2], strict=True):
        assert counted.device_bytes == pytest.approx(plain.device_bytes, rel=1e-3)
        assert counted.speed.step_s == pytest.approx(plain.speed.step_s, rel=1e-3)
        # Quantized, the norms' weights count as the linears' do.
        assert counted.memory.base == pytest.approx(plain.memory.base, rel=2e-3)


# What fits


def test_changes_that_are_offered_do_fit_and_the_plan_without_them_does_not() -> None:
    config = config_of(model={"name": "3.1-70b"}, train={"micro_batch": 8, "sequence_length": 8192, "global_batch": 64})
    plan = make_plan(config, Machines(1, 8, GPUS["a100-40gb"]))
    assert not plan.fits and len(plan.changes) == 3  # on more nodes a rank has fewer sequences
    for change in plan.changes:
        tree = config.model_dump(mode="json")
        for setting in change.settings:
            name, _, value = setting.partition("=")
            if name.startswith("--nodes"):
                continue
            section, _, key = name.partition(".")
            tree[section][key] = json.loads(value) if value[0].isdigit() or value in ("true", "false") else value
        again = make_plan(Config.model_validate(tree), Machines(change.num_nodes, 8, GPUS["a100-40gb"]))
        assert again.fits and again.device_bytes == change.device_bytes
    assert plan.changes[0].settings == ("train.micro_batch=1",)
    (length,) = plan.changes[1].settings
    assert re.fullmatch(r"train.sequence_length=\d+", length), "searched, with nothing else changed"
    more = config.model_copy(
        update={"train": config.train.model_copy(update={"sequence_length": 64 + int(length.rpartition("=")[2])})}
    )
    assert not make_plan(more, Machines(1, 8, GPUS["a100-40gb"])).fits


def test_the_largest_micro_batch_and_sequence_that_fit_are_searched_and_shown() -> None:
    config, machines = (
        config_of(train={"global_batch": 512, "sequence_length": 4096}),
        Machines(1, 8, GPUS["a100-40gb"]),
    )
    plan = make_plan(config, machines)
    micro, length = plan.largest.micro_batch, plan.largest.sequence_length
    assert micro and length and 1 < micro < 64 and 4096 < length < plan.setup.shape.context and length % 64 == 0

    def fits(**changed: int) -> bool:
        train = config.train.model_copy(update=changed)
        return make_plan(config.model_copy(update={"train": train}), machines).fits

    assert fits(micro_batch=micro) and not fits(micro_batch=micro + 1)
    assert fits(sequence_length=length) and not fits(sequence_length=length + 64)
    assert plan.to_json()["largest"] == {"micro_batch": micro, "sequence_length": length}
    (line,) = [line for line in lines_of(plan) if "the largest that fits" in line]
    assert f"micro_batch {micro} (at this sequence_length), sequence_length {length:,} (at this micro_batch)" in line


def test_the_largest_is_no_more_than_a_step_or_the_context_can_use() -> None:
    plan = make_plan(
        config_of(model={"name": "3.2-1b"}, train={"global_batch": 24, "sequence_length": 100}), Machines(1, 8, H100)
    )
    assert (plan.largest.micro_batch, plan.largest.sequence_length) == (3, 131_072)
    (line,) = [line for line in lines_of(plan) if "the largest that fits" in line]
    assert "a rank's share of a step" in line and "the model's context" in line


def test_nine_tenths_of_a_device_are_called_tight() -> None:
    parallel = {"base_shard": "node", "adapters": "replicate"}
    config = config_of(parallel=parallel, train={"activation_checkpointing": "all"})
    needed = make_plan(config, Machines(1, 8, H100)).device_bytes
    for part, told in ((0.89, "fits"), (0.92, "fits, but is tight: 92% of it"), (1.01, "doesn't fit")):
        gpu = dataclasses.replace(H100, memory_gb=needed / part / GIB / H100.usable)
        plan = make_plan(config, Machines(1, 8, gpu))
        assert plan.result == told and plan.is_tight is plan.to_json()["tight"] is ("tight" in told)
        assert any(line.endswith(f": {told}") for line in lines_of(plan))


# Machines of which not everything is known


def test_a_gpu_of_which_only_the_memory_is_known_gets_no_speed() -> None:
    config = config_of(train={"steps": 10}, machine={"price_per_gpu_hour": 2})
    plan = make_plan(config, Machines(1, 8, gpu_of_memory(96, name="GPU of 96 GiB")))
    text = "\n".join(lines_of(plan))
    assert plan.speed is plan.hours is plan.cost is plan.to_json()["step_s"] is None
    assert "a time that isn't known" in text and "--tflops 150" in text and "tokens/s" not in text
    assert "cost: unknown, since the GPU's speed is unknown" in text
    too_small = make_plan(config, Machines(1, 1, gpu_of_memory(12, name="GPU of 12 GiB")))
    assert too_small.changes and all(" per step" not in str(change) for change in too_small.changes)


def test_tflops_give_such_a_gpu_the_time_of_its_products_and_name_what_is_left_out() -> None:
    config = config_of(model={"quant": "nf4"}, train={"sequence_length": 2048})
    plan = make_plan(config, Machines(1, 8, gpu_of_memory(96, name="it", tflops=150)))
    flops = flops_per_token(plan.setup, context=2048) * plan.setup.micro_tokens * plan.setup.accumulation_steps
    assert plan.speed is not None
    assert plan.speed.step_s == pytest.approx((flops / (0.8 * 0.85 * 150e12), flops / (0.3 * 0.85 * 150e12)))
    assert plan.speed.uncounted == ("dequantizing", "the links within a node")
    assert "not counted, since this GPU's aren't known: dequantizing, the links within a node" in "\n".join(
        lines_of(plan)
    )
    assert "not counted" not in "\n".join(lines_of(make_plan(config, Machines(1, 8, H100))))


@pytest.mark.parametrize("gpu", ["t4-16gb", "v100-32gb"])
def test_a_gpu_without_bf16_computes_in_fp32_and_refuses_what_it_cannot(gpu: str) -> None:
    plan = make_plan(config_of(model={"name": "3.2-1b"}), Machines(1, 2, GPUS[gpu]))
    assert (plan.setup.choices.dtype, plan.setup.choices.attention) == ("fp32", "sdpa-repeated")
    assert "  dtype     fp32: on a GPU without bf16 (compute capability below 8.0)" in list(lines_of(plan))
    with pytest.raises(
        ConfigError, match=r"^model.dtype: bf16 needs GPUs of compute capability 8.0 or newer .* V100 and T4"
    ):
        make_plan(config_of(model={"name": "3.2-1b", "dtype": "bf16"}), Machines(1, 2, GPUS[gpu]))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("h100", "h100-80gb"),
        ("B200", "b200-180gb"),
        ("rtx4090", "rtx4090-24gb"),
        ("h100-nvl", "h100-nvl-94gb"),
        ("rtx6000-pro", "rtx6000-pro-96gb"),
        ("l4", "l4-24gb"),
        ("l40s", "l40s-48gb"),
        ("h20", "h20-96gb"),
        ("gb300", "gb300-279gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA GB200", "gb200-186gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx6000-pro-96gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
    ],
)
def test_a_gpu_is_found_by_parts_of_its_name_and_by_its_drivers(name: str, expected: str) -> None:
    assert find_gpu(name).name == expected


@pytest.mark.parametrize(
    "name, told",
    [
        ("a100", r"2 GPUs are called a100: a100-40gb, a100-80gb\. Give one of these names"),
        ("V100", r"2 GPUs are called V100: v100-16gb, v100-32gb\."),
        ("a100-pcie", r"2 GPUs are called a100-pcie: a100-pcie-40gb, a100-pcie-80gb\."),
        ("h10", r"no GPU called h10 is known \(nearest: h100-80gb"),
        ("80gb", "no GPU called 80gb is known"),
        (
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            r"no GPU called NVIDIA GeForce RTX 4090 Laptop GPU is known \(nearest: rtx4090",
        ),
        ("NVIDIA RTX 6000 Ada Generation", "no GPU called NVIDIA RTX 6000 Ada Generation is known"),
        ("NVIDIA GH200 480GB", "no GPU called NVIDIA GH200 480GB is known"),
        ("NVIDIA H100 40GB", "no GPU called NVIDIA H100 40GB is known"),
    ],
)
def test_a_name_that_several_gpus_or_none_have_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^--gpu: {told}"):
        find_gpu(name)


# What a person reads


def test_a_plan_on_one_rank_for_hours_reads_as_a_person_writes_it() -> None:
    config = config_of(
        model={"name": "3.1-70b", "quant": "nf4"}, train={"global_batch": 512}, parallel={"offload": "base"}
    )
    text = "\n".join(lines_of(make_plan(config, Machines(1, 1, GPUS["rtx4090-24gb"]))))
    assert re.search(r"takes \d+ min \d+ s to \d+ h \d+ min:", text), text
    assert re.search(r"  adapters  \d\.\d+ GiB with gradients and AdamW's moments\n", text)
    assert re.search(r"base      not sharded: \S+ GiB, layers in host memory, embedding and head on the device\n", text)
    assert not re.search(r"\b1 (ranks|GPUs|nodes|steps)\b|\de\+\d", text)


def test_an_offloaded_base_lies_in_host_memory_and_comes_over_its_link() -> None:
    config = config_of(model={"name": "3.1-70b"}, parallel={"offload": "all"})
    plan, plain = (
        make_plan(config, Machines(1, 8, H100)),
        make_plan(config_of(model={"name": "3.1-70b"}), Machines(1, 8, H100)),
    )
    assert plan.memory.base == 0 and plan.memory.optimizer == 0
    # AdamW updates a copy of the weights there, by gradients that come there.
    updated = plain.memory.optimizer + plain.memory.adapters + plain.memory.gradients
    assert plan.memory.host - plain.memory.host == plain.memory.base + updated
    assert plan.speed.host_s[0] == pytest.approx(2 * plain.setup.accumulation_steps * plain.memory.base / (64e9 * 0.85))
    assert make_plan(config, Machines(1, 8, H100, host_bytes=100 * GIB)).fits is False


def test_a_rank_has_no_more_sequences_at_once_than_a_step_has_for_it() -> None:
    def plan_of(global_batch: int, micro_batch: int) -> Plan:
        train = {"global_batch": global_batch, "micro_batch": micro_batch, "sequence_length": 2048}
        return make_plan(config_of(train=train), Machines(2, 8, H100))

    filled, short = plan_of(16, 1), plan_of(16, 2)
    assert (short.memory, short.speed) == (filled.memory, filled.speed)
    assert "a rank has 1 sequence of train.global_batch: 16" in "\n".join(short.notes) and not filled.notes
    few = plan_of(9, 1)  # of 16 ranks some have nothing
    assert few.speed.tokens_per_s == pytest.approx([9 * 2048 / seconds for seconds in few.speed.step_s[::-1]])
    uneven, whole = plan_of(48, 2), plan_of(64, 2)  # 3 and 4 sequences for each rank, two at once
    assert uneven.memory == whole.memory and uneven.setup.step_tokens == 48 * 2048
    assert uneven.speed.compute_s == pytest.approx([seconds * 3 / 4 for seconds in whole.speed.compute_s])


def test_on_one_gpu_layers_are_fetched_while_others_compute() -> None:
    config = config_of(
        model={"name": "3.1-70b"}, parallel={"offload": "all"}, train={"global_batch": 2, "micro_batch": 1}
    )
    plan = make_plan(config, Machines(1, 1, H100))
    shape, memory = plan.setup.shape, plan.memory
    ends = 2 * (2 * shape.vocab * shape.hidden + shape.hidden)  # embedding, head and last norm, in bf16
    layer = 2 * (shape.weights_of_linears() + 2 * shape.hidden)
    assert (memory.base, memory.gathered) == (ends, 2 * layer)
    # Moments, the weights that are updated and their gradients, and what a checkpoint copies.
    assert memory.host == 80 * layer + (8 + 4 + 4 + 12) * plan.setup.trained_weights
    # 80 layers but 2, twice per micro-batch, at 64 GB/s of which 85 % are reached at best.
    assert plan.speed.host_s[0] == pytest.approx(2 * 2 * 78 * layer / (64e9 * 0.85))
    assert plan.speed.step_s == (
        max(plan.speed.compute_s[0], plan.speed.host_s[0]), max(plan.speed.compute_s[1], plan.speed.host_s[1])
    )  # fmt: skip


def test_products_take_as_long_as_the_gpu_was_measured_to_take_by_hand() -> None:
    plan = make_plan(config_of(train={"sequence_length": 2048}), Machines(1, 8, H100))
    flops = flops_per_token(plan.setup, context=2048) * plan.setup.micro_tokens * plan.setup.accumulation_steps
    assert plan.speed.compute_s == pytest.approx((flops / (0.8 * 794.5e12), flops / (0.3 * 794.5e12)))


def test_what_products_reach_is_near_the_makers_figure() -> None:
    for gpu in GPUS.values():  # boards clock higher than their data sheets say; an MI300X reaches half
        assert 0.5 <= gpu.products_flops_per_s / (1e12 * gpu.tflops) <= 1.1, gpu.name


def test_a_sweep_holds_only_what_nothing_smaller_beats() -> None:
    plans = sweep(config_of(model={"name": "3.1-70b"}), [Machines(1, 8, H100)])
    assert len(plans) >= 2 and all(plan.fits for plan in plans)
    memory, seconds = [p.device_bytes for p in plans], [p.speed.step_s[0] for p in plans]
    assert memory == sorted(memory) and seconds == sorted(seconds, reverse=True)


def test_where_gathering_limits_a_step_a_sweep_ends_with_the_whole_base_on_each_gpu() -> None:
    config = config_of(train={"global_batch": 16, "sequence_length": 256})
    smallest, *_, fastest = sweep(config, [Machines(1, 8, GPUS["a100-80gb"])])
    assert (smallest.config.parallel.base_shard, fastest.config.parallel.base_shard) == ("node", "gpu")
    alone = sweep(config, [Machines(1, 1, H100)])
    assert {plan.config.parallel.base_shard for plan in alone} == {"node"}  # one GPU's plan, once


def test_a_whole_base_that_does_not_fit_would_fit_sharded() -> None:
    plan = make_plan(config_of(model={"name": "3.1-70b"}, parallel={"base_shard": "gpu"}), Machines(1, 8, H100))
    assert not plan.fits
    assert plan.memory.base == sum(part.num_bytes for part in base_parts(plan.setup.shape, quant="none", item_bytes=2))
    assert any(change.settings == ("parallel.base_shard=node",) for change in plan.changes)


def test_of_a_whole_base_only_the_adapters_gradients_are_sent() -> None:
    plan = make_plan(config_of(parallel={"base_shard": "gpu"}), Machines(2, 8, H100))
    trained = 4 * plan.setup.trained_weights
    assert [(c.kind, c.what, c.num_ranks, c.num_bytes, c.count) for c in plan.collectives] == [
        ("all-reduce", "adapters' gradients", 16, trained, 1), ("all-reduce", "loss and requests", 16, 16, 1)
    ]  # fmt: skip
    sharded = make_plan(config_of(parallel={"base_shard": "node"}), Machines(2, 8, H100))
    assert plan.speed.inter_node_s == sharded.speed.inter_node_s
    assert 0 < plan.speed.intra_node_s[0] < sharded.speed.intra_node_s[0] / 50


def test_more_ranks_than_rows_or_sequences_or_layers_are_planned_and_said_to_be() -> None:
    config = config_of(parallel={"base_shard": "world"}, train={"global_batch": 16})
    plan = make_plan(config, Machines(512, 8, H100))
    told = [
        "k_proj.weight has 1,024 rows for 4,096 ranks: 3,072 ranks hold none of it",
        "a step has 16 sequences: 4,080 of 4,096 ranks are idle",
    ]
    assert plan.fits and plan.notes == told == plan.to_json()["notes"]
    assert [line.strip() for line in lines_of(plan) if "note " in line] == [f"note      {note}" for note in told]
    assert plan.memory.base == 2 * sum(
        math.ceil(shape[0] / 4096) * math.prod(shape[1:]) for shape in plan.setup.shape.tensor_shapes().values()
    )
    assert make_plan(config_of(train={"global_batch": 64, "micro_batch": 1}), Machines(1, 64, H100)).notes == []
    short = dataclasses.replace(MEMBERS["3.1-8b"].shape, context=1000)
    found = make_plan(
        config_of(train={"global_batch": 64, "micro_batch": 1, "sequence_length": 4096}),
        Machines(1, 64, H100),
        shape=short,
    )
    assert found.notes == [
        "train.sequence_length is 4,096 and the model's context 1,000 tokens: a sample may not be longer"
    ]


def test_what_a_run_would_refuse_a_plan_refuses_with_the_same_words() -> None:
    config = config_of(model={"name": "it", "quant": "nf4"})
    told = []
    for refuse in (
        lambda: make_plan(config, Machines(1, 2, H100), shape=dataclasses.replace(TINY, ffn=96)),
        lambda: shard_model(config, dataclasses.replace(TINY, ffn=96), World.alone(), name="it"),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        told.append(str(caught.value))
    assert told[0] == told[1] and told[0].startswith(
        "model.quant: nf4 can't store it: down_proj: nf4 splits each row into"
    )


def test_a_hub_id_of_no_member_is_told() -> None:
    with pytest.raises(ConfigError, match=r"someone/else is not a herd member, and its sizes are on the hub"):
        make_plan(config_of(model={"name": "someone/else"}), Machines(1, 8, H100))


# The command


def plan_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_lora", "plan", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "it.yaml"
    path.write_text("run: it\nmodel: {name: 3.1-8b}\ndata: {train: x.jsonl}\ntrain: {steps: 100}\n")
    return path


def test_a_plan_that_fits_is_printed_with_what_was_chosen_and_why(config_file) -> None:
    done = plan_command(config_file)
    assert done.returncode == 0 and done.stderr == ""
    for text in ("8,030,261,248 frozen weights, 41,943,040 trained", "engine    fsdp2: 8 processes hold the base each",
                 "  the base                          14.96 GiB", ": fits", "100 steps: ", "bound by compute"):  # fmt: skip
        assert text in done.stdout, done.stdout


def test_a_plan_in_json_adds_up(config_file) -> None:
    told = json.loads(plan_command(config_file, "--json", "--gpus-per-node", 4).stdout)
    of_gpu = told["gpu_bytes"]
    parts = ("base", "adapters", "gradients", "optimizer", "gathered", "activations", "loss", "workspace", "reserve")
    assert sum(of_gpu[name] for name in parts) == of_gpu["needed"] <= of_gpu["there"]
    assert told["fits"] is True and told["changes"] == []


def test_what_does_not_fit_ends_with_3_and_tells_both_numbers(config_file) -> None:
    done = plan_command(config_file, "model.name=3.1-405b", "--gpu-gib", 24)
    assert done.returncode == 3
    assert done.stderr.startswith("error: 3.1-405b needs ") and "24.0 GiB are available" in done.stderr
    assert "doesn't fit" in done.stdout and "It would fit with:" in done.stdout


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--gpu", "a100"], "--gpu: 2 GPUs are called a100: a100-40gb, a100-80gb. Give one of these names"),
        (
            ["--gpu", "h100", "--tflops", 100],
            "--tflops: the speed of this type of GPU is known; give it with --gpu-gib",
        ),
        (["--gpu-gib", 24, "--tflops", 0], "--tflops: found 0, expected TFLOPS above 0"),
        (["--nodes", 0], "--nodes: found 0, expected 1 or more"),
        (["--gpus-per-node", 0], "--gpus-per-node: found 0, expected 1 or more"),
        (["--gpu-gib", -1], "--gpu-gib: found -1, expected GiB above 0"),
        (["--gpu", "h100-80gb", "--gpu-gib", 80], "both set the memory of a GPU"),
        (["--nodes", 1, "--nodes", 2], "several values are for --sweep only"),
        (["--sweep", "--simulate"], "--sweep: it plans many configs, and --simulate runs the step of one"),
        (["--timeline", "a.png"], "--timeline: it shows a simulated step; add --simulate"),
        (["model.name=no-such-folder"], "expected a herd member, an existing folder or a hub id"),
        (["--gpu", "zzz"], f"no GPU called zzz is known (known: {', '.join(GPUS)})"),
        (["model.name={empty}"], "has no config.json: expected config.json, *.safetensors and the tokenizer's files"),
        (["model.name={bert}"], "not a Llama that can be trained here:\n  model_type: found 'bert', expected 'llama'"),
        (
            [
                "model.shape={{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 3, "
                "vocab_size: 8}}"
            ],
            "model.shape.num_attention_heads: found 3, which doesn't divide hidden_size 64",
        ),
        (["parallel.node_size=3"], "parallel.node_size: 8 processes are not a multiple of 3; every node must have"),
        (["parallel.node_size=16"], "parallel.node_size: 8 processes are not a multiple of 16"),
        (["lora.layers=[32]"], "lora.layers: found 32, expected 0-31 (the model has 32 layers)"),
        (["parallel.engine=none", "--gpus-per-node", 8], "parallel.engine: none runs one process and 8 were started"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_told_once_and_ends_with_2(config_file, tmp_path, arguments: list[object], told: str) -> None:
    folders = {name: tmp_path / name for name in ("empty", "bert")}
    for folder in folders.values():
        folder.mkdir()
    (folders["bert"] / "config.json").write_text('{"model_type": "bert"}')
    done = plan_command(config_file, *(str(argument).format_map(folders) for argument in arguments))
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert told in done.stderr and done.stdout == ""


@pytest.mark.parametrize("machine", [["--gpu", "h200"], ["--gpu-gib", 96], ["--gpu-gib", 40, "--tflops", 150]], ids=str)
def test_what_a_sweep_prints_can_be_pasted(config_file, machine: list[object]) -> None:
    swept = CliRunner().invoke(
        app, ["plan", str(config_file), "--sweep", "--nodes", "2", "--gpus-per-node", "8", *map(str, machine)]
    )
    header, *lines = swept.stdout.splitlines()
    assert header.startswith("GiB per GPU") and header.endswith("dist-lora plan CONFIG ...") and len(lines) >= 2
    for line in lines[:2] + lines[-2:]:
        added = shlex.split(line[line.index("model.quant=") :])
        pasted = CliRunner().invoke(app, ["plan", str(config_file), *added, "--json"])
        assert pasted.exit_code == 0, pasted.output
        told = json.loads(pasted.stdout)
        assert line.startswith(f"{told['gpu_bytes']['needed'] / GIB:.1f} ") and told["machines"].startswith(
            "2 nodes x 8 x "
        )
        assert (told["step_s"] is None) is (machine == ["--gpu-gib", 96])


def test_a_plan_imports_no_torch(config_file) -> None:
    code = (
        "import sys; sys.argv = ['dist-lora', 'plan', sys.argv[1], '--sweep', '--json']\n"
        "from dist_lora.cli import app\n"
        "try: app(standalone_mode=False)\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config_file], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "False False\n"


def test_every_gpu_has_its_source_and_a_name_that_says_its_memory() -> None:
    for name, gpu in GPUS.items():
        assert gpu.source and name.endswith(f"-{gpu.memory_gb:g}gb")
    assert find_gpu("H100-80GB") is H100


def test_the_shape_is_the_folders_where_there_is_one(tiny_llama) -> None:
    plan = make_plan(config_of(model={"name": str(tiny_llama("llama31"))}), Machines(1, 1, H100))
    assert plan.setup.shape.hidden == 64 and plan.fits
    assert dataclasses.replace(plan.setup.shape, hidden=64) == plan.setup.shape


def test_the_steps_of_a_mixture_last_until_its_slowest_set_was_seen_and_shares_are_told(tmp_path: Path) -> None:
    sizes = {"a.txt": 64_000, "b.txt": 16_000, "c.txt": 10**9}
    for name, num_bytes in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(num_bytes)
    sets = [{"path": str(tmp_path / name), "weight": weight} for name, weight in zip(sizes, (1, 3, 0), strict=True)]
    train = {"global_batch": 2, "sequence_length": 1000, "micro_batch": 1}
    config = config_of(data={"train": sets}, train=train)
    plan = make_plan(config, Machines(1, 2, H100), shape=TINY)
    assert plan.steps == 64_000 * 4 / 4 / 2000  # bytes of a / its share / bytes a token / tokens a step
    lines = [line for line in lines_of(plan) if "mixture" in line]
    assert lines == [
        f"  mixture   25.00% of the samples from {tmp_path / 'a.txt'}",
        f"  mixture   75.00% of the samples from {tmp_path / 'b.txt'}",
        f"  mixture   0.00% of the samples from {tmp_path / 'c.txt'}",
        "  mixture   the steps until each set was seen are estimated by the sizes of the files",
    ]
    tokens = config_of(data={"train": sets, "mix": "target_tokens"}, train=train | {"steps": 3})
    told = [line for line in lines_of(make_plan(tokens, Machines(1, 2, H100), shape=TINY)) if "mixture" in line]
    assert told[0].startswith("  mixture   25.00% of the trained tokens from ") and len(told) == 3
