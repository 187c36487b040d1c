"""A measured machine in place of a named GPU: how its file is read, and a step's time by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_lora.errors import ConfigError, SaveError
from dist_lora.herd.members import MEMBERS
from dist_lora.plan.command import MachineRequest
from dist_lora.plan.hardware import measured_gpu
from dist_lora.plan.measured import AtSize, Link, Measured, Product, read_measured, write_measured
from dist_lora.plan.plan import Machines, make_plan
from dist_lora.plan.speed import flops_per_token, measured_speed
from dist_lora.plan.traffic import collectives_of
from dist_lora.text import GIB
from tests.unit.plan.test_plan import config_of, plan_command

AT_ONCE = (1e30, 1e30)  # what takes no time
NO_LINK = Link((AtSize(1, AT_ONCE),), 1e-30)
INSTANT = Measured(
    device="CPU, 1 thread a rank",
    is_gpu=False,
    dtype="fp32",
    num_nodes=1,
    ranks_per_node=1,
    memory_bytes=64 * GIB,
    host_bytes=64 * GIB,
    products=(Product(1, 1, 1, AT_ONCE),),
    attention=(Product(1, 1, 1, AT_ONCE),),
    dense_weights_per_s={"nf4": AT_ONCE, "int8": AT_ONCE},
    elementwise=(AtSize(1, AT_ONCE),),
    call_s=1e-30,
    links={"within a node": {"all-gather": NO_LINK, "all-reduce": NO_LINK}},
)
SHAPE = MEMBERS["3.2-1b"].shape


def seconds(measured: Measured, *, ranks: int = 1, **sections: Any) -> tuple[float, float]:
    """A step's time at best and at worst."""
    config = config_of(
        **{
            "model": {"name": "3.2-1b"},
            "train": {"micro_batch": 2, "global_batch": 4 * ranks, "sequence_length": 64},
            **sections,
        }
    )
    machines = Machines(1, ranks, measured_gpu(replace(measured, ranks_per_node=ranks)))
    return make_plan(config, machines).speed.step_s


def setup_and_tokens(*, recompute: str | int) -> tuple[Any, int]:
    config = config_of(
        model={"name": "3.2-1b"},
        train={"micro_batch": 2, "global_batch": 4, "sequence_length": 64, "activation_checkpointing": recompute},
    )
    plan = make_plan(config, Machines(1, 1, measured_gpu(INSTANT)))
    return plan.setup, plan.speed.tokens_per_step


# A step by hand: one kind of work at a time


@pytest.mark.parametrize("recompute", ["none", "all", 5])
def test_products_take_their_operations_at_the_measured_rate(recompute: str | int) -> None:
    setup, tokens = setup_and_tokens(recompute=recompute)
    slow = replace(INSTANT, products=(Product(1, 1, 1, (1e9, 2e9)),))
    best, worst = measured_speed(setup, measured_gpu(slow), slow, context=64).compute_s
    flops = flops_per_token(setup, context=0) * tokens
    assert best == pytest.approx(flops / 2e9, rel=1e-9) and worst == pytest.approx(flops / 1e9, rel=1e-9)


@pytest.mark.parametrize("recompute", ["none", "all", 5])
def test_attention_takes_its_operations_at_its_own_rate(recompute: str | int) -> None:
    setup, tokens = setup_and_tokens(recompute=recompute)
    slow = replace(INSTANT, attention=(Product(1, 1, 1, (1e9, 1e9)),))
    best, _ = measured_speed(setup, measured_gpu(slow), slow, context=64).compute_s
    flops = (flops_per_token(setup, context=64) - flops_per_token(setup, context=0)) * tokens
    assert best == pytest.approx(flops / 1e9, rel=1e-9)


def test_the_nearest_measured_size_counts() -> None:
    products = (
        Product(128, 2048, 2048, (5e9, 5e9)),
        Product(128, 2048, 8192, (7e9, 7e9)),
        Product(8, 2, 2, (1.0, 1.0)),
    )
    measured = replace(INSTANT, products=products)
    assert measured.product_flops_per_s(100, 2000, 2500) == (5e9, 5e9)
    assert measured.product_flops_per_s(100, 2000, 5000) == (7e9, 7e9)
    link = Link((AtSize(2**20, (1.0, 2.0)), AtSize(2**26, (3.0, 4.0))), 1e-3)
    assert link.bytes_per_s(2**21) == (1.0, 2.0) and link.bytes_per_s(2**30) == (3.0, 4.0)


def test_weights_are_dequantized_once_in_each_direction() -> None:
    slow = replace(INSTANT, dense_weights_per_s={"nf4": (1e9, 1e9), "int8": AT_ONCE})
    weights = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    best, worst = seconds(slow, model={"name": "3.2-1b", "quant": "nf4"})
    assert best == pytest.approx(2 * 2 * weights / 1e9)  # two passes
    assert worst == pytest.approx(1.1 * best)
    assert seconds(slow, model={"name": "3.2-1b", "quant": "int8"})[1] < 1e-9


def test_wires_take_what_a_rank_receives_and_a_small_ones_time_each() -> None:
    slow = Link((AtSize(1, (1e9, 1e9)),), 1e-3)
    measured = replace(INSTANT, links={"within a node": {"all-gather": slow, "all-reduce": slow}})
    config = config_of(model={"name": "3.2-1b"}, train={"micro_batch": 1, "global_batch": 2, "sequence_length": 64})
    plan = make_plan(config, Machines(1, 2, measured_gpu(replace(measured, ranks_per_node=2))))
    collectives = collectives_of(plan.setup)
    received, count = sum(each.received_bytes for each in collectives), sum(each.count for each in collectives)
    assert plan.speed.intra_node_s == pytest.approx((received / 1e9 + count * 0.5e-3, received / 1e9 + count * 1e-3))
    assert (
        plan.speed.step_s[0] == pytest.approx(plan.speed.intra_node_s[0])
        and plan.speed.bound_by == "the links within a node"
    )


def test_processors_send_themselves_and_a_gpu_may_hide_it() -> None:
    slow = Link((AtSize(1, (1e9, 1e9)),), 1e-30)
    both = replace(
        INSTANT,
        products=(Product(1, 1, 1, (1e11, 1e11)),),
        links={"within a node": {"all-gather": slow, "all-reduce": slow}},
    )
    parallel = {"base_shard": "node"}
    on_cpu = seconds(both, ranks=2, parallel=parallel)
    on_gpu = seconds(replace(both, is_gpu=True, dtype="bf16"), ranks=2, parallel=parallel)
    assert on_gpu[0] < 0.8 * on_gpu[1] and on_cpu[0] == pytest.approx(on_cpu[1] / 1.1)


def test_a_host_has_no_reserve_computes_in_fp32_and_keeps_its_activations() -> None:
    config = config_of(model={"name": "3.2-1b"})
    plan = make_plan(config, Machines(1, 1, measured_gpu(INSTANT)))
    assert plan.reserve_bytes == 0 and plan.setup.item_bytes == 4 and not plan.setup.recomputed
    assert plan.machines.gpu.memory_bytes == 64 * GIB
    assert plan.host_bytes > plan.memory.device + plan.memory.host + GIB
    on_gpu = make_plan(config, Machines(1, 1, measured_gpu(replace(INSTANT, is_gpu=True))))
    assert on_gpu.host_bytes < 2 * GIB < on_gpu.memory.device
    assert on_gpu.reserve_bytes > GIB and on_gpu.setup.item_bytes == 2


# The file


def test_a_measured_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    write_measured(INSTANT, tmp_path / "machine.json")
    assert read_measured(tmp_path / "machine.json") == INSTANT
    with pytest.raises(
        SaveError, match=r"--out: .*/none/machine\.json can't be written: .*Name a file in a writable folder"
    ):
        write_measured(INSTANT, tmp_path / "none" / "machine.json")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": 0}, "it was written by another version"),
        ({"call_s": 0}, "0 is not a number above 0"),
        ({"num_nodes": True}, "True is not a whole number of at least 1"),
        ({"products": []}, "a table has no rows"),
        ({"dtype": "fp8"}, "'fp8' is not one of bf16, fp32"),
        ({"dense_weights_per_s": {"nf4": [1, 2]}}, "KeyError: 'int8'"),
        ({"dense_weights_per_s": {"nf4": [2, 1], "int8": [1, 2]}}, "2 is not slower than 1"),
        ({"elementwise": [{"num_bytes": 1, "bytes_per_s": [1]}]}, r"\[1\] is not slow and fast"),
        ({"links": 3}, "AttributeError"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(INSTANT.to_json() | change))
    with pytest.raises(
        ConfigError,
        match=f"--measured: .* is not a file of measurements .*{words}.*Make one: dist-lora doctor --out FILE",
    ):
        read_measured(path)


def test_no_file_and_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--measured: .*No such file"):
        read_measured(tmp_path / "none.json")
    (tmp_path / "it.json").write_text("[1")
    with pytest.raises(ConfigError, match="is not a file of measurements"):
        read_measured(tmp_path / "it.json")


# The command


def test_the_measured_machine_is_the_default_and_no_other_is_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    write_measured(replace(INSTANT, ranks_per_node=2), path)
    machines = MachineRequest.of(config_of(), None, None, None, None, None, path).single()
    assert (machines.num_nodes, machines.gpus_per_node, machines.host_bytes) == (1, 2, 64 * GIB)
    assert machines.gpu.name == "CPU, 1 thread a rank, measured"
    for asked, told in (((None, 4), "1 x 4 were requested"), (([2], None), "2 x 2 were requested")):
        with pytest.raises(
            ConfigError, match=f"was measured on 1 x 2 ranks .nodes x ranks per node., and {told}. Measure with as many"
        ):
            MachineRequest.of(config_of(), *asked, None, None, None, path).machines()
    with pytest.raises(
        ConfigError, match="--measured and --gpu or --gpu-gib: both set the type of GPU; give one of them"
    ):
        MachineRequest.of(config_of(), None, None, ["h100-80gb"], None, None, path).machines()


def test_plan_says_that_the_machine_was_measured(tmp_path: Path) -> None:
    write_measured(INSTANT, tmp_path / "machine.json")
    config = tmp_path / "it.yaml"
    config.write_text("run: it\nmodel: {name: 3.2-1b}\ndata: {train: x.jsonl}\ntrain: {steps: 10}\n")
    done = plan_command(config, "--measured", tmp_path / "machine.json")
    assert done.returncode == 0, done.stderr
    assert "on 1 x CPU, 1 thread a rank, measured" in done.stdout and "(fp32)" in done.stdout
