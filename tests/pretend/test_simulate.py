"""Steps on machines that aren't here: what the fullest rank holds and sends, against formulas by hand."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, SaveError
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.shape import Shape, read_shape
from dist_lora.plan.command import MachineRequest
from dist_lora.simulation.command import simulate_plan
from dist_lora.simulation.simulate import Simulation, simulate
from dist_lora.simulation.timeline import Limit, parts_of_step, write_timeline
from dist_lora.simulation.tracker import KINDS, Moment, Phase
from tests import turns

GIB = 2**30
MIB = 2**20


def config_of(name: str, **settings: dict[str, object]) -> Config:
    tree: dict[str, Any] = {"run": "t", "model": {"name": name, "quant": "nf4"}, "data": {"train": "unused"}}
    for section, values in settings.items():
        tree[section] = {**tree.get(section, {}), **values}
    return Config.model_validate(tree)


def nf4_share(shape: Shape, num_ranks: int) -> float:
    """Bytes of a rank's part of a base in NF4 and bf16, where rows divide evenly."""
    linears = sum(out * in_ for out, in_ in shape.linear_shapes().values()) * shape.num_layers
    return (linears * 0.5625 + 2 * (shape.num_parameters() - linears)) / num_ranks


def crossing(simulation: Simulation, axis: str) -> int:
    return sum(traffic.num_bytes for traffic in simulation.traffic if traffic.axis == axis)


EIGHT_OF_8B = replace(MEMBERS["3.1-8b"].shape, num_layers=8)


@pytest.fixture(scope="module")
def eight() -> Simulation:
    train = {"global_batch": 8, "micro_batch": 1, "activation_checkpointing": "all"}
    config = config_of("3.1-8b", train=train, parallel={"base_shard": "node", "adapters": "replicate"})
    return simulate(config, EIGHT_OF_8B, num_nodes=1, gpus_per_node=8, device_bytes=80 * GIB)


def test_8b_on_eight_gpus_holds_at_its_peak_what_formulas_say(eight) -> None:
    shape = EIGHT_OF_8B
    trained = shape.adapter_parameters(shape.linear_shapes(), range(shape.num_layers), 16)
    ends = 2 * shape.vocab * shape.hidden
    row = 2048 * shape.hidden * 2  # one activation, bf16
    found = eight.composition
    assert found["base shard"] == nf4_share(shape, 8)
    assert found["adapters"] == found["gradients"] == 4 * trained
    assert found["optimizer"] == 8 * trained + 4
    # The peak is in the head: FSDP2 holds it twice, as it was sent and as it is used, and the last norm.
    assert found["gathered base"] == pytest.approx(2 * ends, rel=1e-3)
    # A block's input each, the rows of the last one's output that the norm keeps, and the normed ones; cosine and sine.
    turns = 2 * 2048 * shape.head_dim  # bytes, of half a head each
    assert found["activations"] == pytest.approx((shape.num_layers + 2) * row + turns, rel=2e-3)
    assert found["logits"] == pytest.approx(1024 * 2 * shape.vocab, rel=0.01)  # fused, none are in fp32
    assert eight.peak_bytes == sum(found.values()) == max(moment.total_bytes for moment in eight.timeline)


def test_8b_on_eight_gpus_sends_each_block_twice_as_it_is_stored_and_each_end_once(eight) -> None:
    shape = EIGHT_OF_8B
    trained = shape.adapter_parameters(shape.linear_shapes(), range(shape.num_layers), 16)
    ends = 2 * 2 * shape.vocab * shape.hidden
    whole = 8 * nf4_share(shape, 8)
    gathered = next(traffic for traffic in eight.traffic if traffic.kind == "_allgather_base_")
    assert gathered.num_bytes == 2 * (whole - ends - 2 * shape.hidden) + ends + 2 * shape.hidden
    assert gathered.count == 2 * shape.num_layers + 3
    reduced = next(traffic for traffic in eight.traffic if traffic.kind == "allreduce_")
    assert reduced.num_bytes == 4 * trained + 4 * 4, "the gradients, and the loss with three numbers of the loop"
    assert crossing(eight, "between nodes") == crossing(eight, "world") == 0


def test_the_timeline_begins_with_what_stays_and_ends_with_it(eight) -> None:
    kept = sum(eight.composition[kind] for kind in ("base shard", "adapters", "gradients", "optimizer"))
    first, last = eight.timeline[0], eight.timeline[-1]
    assert first.total_bytes == kept
    assert kept <= last.total_bytes < kept + 0.1 * MIB
    assert {moment.phase for moment in eight.timeline} >= {"forward", "head", "backward", "recompute"}
    assert len(eight.timeline) <= 500


LIMIT = Limit("h100-80gb", 79 * GIB, 2 * GIB)


def test_the_timeline_is_written_as_numbers_and_as_a_picture_whose_texts_say_them(eight, tmp_path) -> None:
    files = write_timeline(eight, tmp_path / "plan" / "step.svg", title="mine", limit=LIMIT)
    assert [file.name for file in files] == ["step.svg", "step.json"]
    told = json.loads(files[1].read_text())
    assert told["peak_bytes"] == eight.peak_bytes
    assert max(sum(moment[2:]) for moment in told["timeline"]) == eight.peak_bytes
    assert told["traffic"][0]["axis"] == "node"
    texts = [element.text for element in ET.fromstring(files[0].read_text()).iter() if element.text]
    peak = max(eight.timeline, key=lambda moment: moment.total_bytes)
    part = {"head": "loss", "recompute": "backward"}.get(peak.phase, peak.phase)
    assert f"peak {eight.peak_bytes / GIB:.2f} GiB, in the {part}" in texts
    assert f"base: kept on this GPU: {eight.composition['base shard'] / GIB:.2f}" in texts
    assert any(
        "h100-80gb has 79.0 GiB (2.0 of it for CUDA, NCCL and fragmentation), far more" in text for text in texts
    )
    assert {"mine", "forward", "backward", "from allocation to allocation; all micro-batches: 1"} <= set(texts)


def test_a_picture_in_points_shows_each_kind_as_high_as_it_is(eight, tmp_path) -> None:
    (file, _) = write_timeline(
        eight, tmp_path / "step.png", title="", limit=replace(LIMIT, num_bytes=int(1.2 * eight.peak_bytes))
    )
    points = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert points.shape[1] > 1000

    def height(colour: str) -> int:
        """Points of a colour, one above the other, in a column in the midst of the areas."""
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return int((np.abs(points[:, 600] - rgb).max(axis=1) < 4).sum())

    at = eight.composition
    base, optimizer, adapters = height("#4e79a7"), height("#86bcb6"), height("#499894")
    assert base > 30
    assert base / optimizer == pytest.approx(at["base shard"] / at["optimizer"], rel=0.1)
    assert base / adapters == pytest.approx(at["base shard"] / at["adapters"], rel=0.2)
    red = (np.abs(points - [0xB2, 0x22, 0x22]).max(axis=2) < 4).sum(axis=1)
    assert (red > points.shape[1] / 2).any(), "no line where the GPU is full"


def test_parts_of_a_step_follow_each_other_and_a_backward_holds_what_it_recomputes() -> None:
    phases: list[Phase] = ["update", "forward", "forward", "head", "backward", "recompute", "backward", "update"]
    moments = [Moment(10 * i, phase, 0, (0,) * len(KINDS)) for i, phase in enumerate(phases)]
    assert list(parts_of_step(moments)) == [
        ("update", 0, 0), ("forward", 0, 20), ("loss", 20, 30), ("backward", 30, 60), ("update", 60, 70),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["step", "step.pdf", "step.json"])
def test_a_picture_of_no_kind_that_is_known_is_told_before_anything_is_simulated(tmp_path, name) -> None:
    told = f"--timeline: found {tmp_path / name}, expected the name of a picture, ending in .png or .svg"
    request = MachineRequest([1], 8, [], None, None)
    with pytest.raises(ConfigError) as caught:
        simulate_plan(config_of("3.1-405b"), request, timeline=tmp_path / name, prints_json=False)
    assert str(caught.value) == told


def test_a_place_that_can_not_be_written_is_told(eight, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/step\.png: can't be written: .*Choose another path"):
        write_timeline(eight, tmp_path / "file" / "step.png", title="", limit=LIMIT)


def test_assumptions_are_listed_in_sentences(eight, tiny_llama) -> None:
    assert any("nothing is computed or sent" in told for told in eight.assumptions)
    assert any("flash attention" in told for told in eight.assumptions)
    folder = tiny_llama("llama31")
    many = config_of(str(folder), train={"global_batch": 10, "micro_batch": 1, "sequence_length": 64})
    told = simulate(many, read_shape(folder), num_nodes=1, gpus_per_node=2, device_bytes=GIB).assumptions
    assert "of 5 micro-batches the first two and the last were run; those between are like the second" in told


def test_a_model_whose_weights_were_counted_is_simulated_as_a_llama_and_said_to_be(tiny_llama) -> None:
    shape = replace(read_shape(tiny_llama("llama31")), given_parameters=100_000)
    config = config_of("mine", train={"global_batch": 2, "micro_batch": 1, "sequence_length": 64})
    told = simulate(config, shape, num_nodes=1, gpus_per_node=2, device_bytes=GIB).assumptions
    llama = replace(shape, given_parameters=None).num_parameters()
    assert f"the model is a Llama of these sizes, with {llama:,} weights instead of 100,000" in told


@pytest.mark.parametrize("engine, axis", turns.in_suite(("fsdp2", "node"), of=[("fsdp2", "node"), ("zero3", "world")]))
def test_a_simulation_leaves_nothing_behind(tiny_llama, engine, axis) -> None:
    folder = tiny_llama("llama31")
    config = config_of(str(folder), parallel={"engine": engine}, train={"sequence_length": 64, "global_batch": 4})
    before = dict(os.environ)
    peaks = [
        simulate(config, read_shape(folder), num_nodes=2, gpus_per_node=2, device_bytes=GIB, device="cpu").peak_bytes
        for _ in range(2)
    ]
    assert peaks[0] == peaks[1]
    assert dict(os.environ) == before
    assert not dist.is_initialized()


def test_what_a_run_would_refuse_a_simulation_refuses_with_the_same_words(tiny_llama) -> None:
    folder = tiny_llama("llama31", ffn=96)
    with pytest.raises(ConfigError, match=r"parallel\.engine: none runs one process and 8 were started"):
        config = config_of(str(folder), model={"quant": "int8"}, parallel={"engine": "none"})
        simulate(config, read_shape(folder), num_nodes=1, gpus_per_node=8, device_bytes=GIB)
    with pytest.raises(
        ConfigError, match=r"model.quant: nf4 can't store .*: down_proj: nf4 splits each row into blocks"
    ):
        simulate(config_of(str(folder)), read_shape(folder), num_nodes=1, gpus_per_node=2, device_bytes=GIB)
    with pytest.raises(ConfigError, match=r"found 0 nodes of 8 GPUs, expected at least one of each"):
        simulate(config_of(str(folder)), read_shape(folder), num_nodes=0, gpus_per_node=8, device_bytes=GIB)
    with pytest.raises(ConfigError, match=r"parallel\.node_size: 8 processes are not a multiple of 3"):
        config = config_of(str(folder), parallel={"node_size": 3})
        simulate(config, read_shape(folder), num_nodes=1, gpus_per_node=8, device_bytes=GIB)
    assert not dist.is_initialized(), "a refusal closes the simulated world too"


def test_shorter_documents_and_dropout_are_simulated(tiny_llama) -> None:
    folder = tiny_llama("llama31")
    shape = read_shape(folder)
    train: dict[str, object] = {"sequence_length": 256, "global_batch": 2, "micro_batch": 1}
    peaks = {}
    for dropout in (0.0, 0.5):
        for tokens in (256, 64):
            config = config_of(str(folder), train=train, lora={"dropout": dropout}, model={"attention": "eager"})
            found = simulate(
                config, shape, num_nodes=1, gpus_per_node=2, device_bytes=GIB, document_tokens=tokens, device="cpu"
            )
            assert found.tokens == 256
            peaks[dropout, tokens] = found.peak_bytes
    assert peaks[0.5, 256] > peaks[0.0, 256], "dropout keeps masks"
    assert peaks[0.0, 64] <= peaks[0.0, 256]


@pytest.mark.slow
def test_what_is_offloaded_lies_in_host_memory_and_not_on_the_device(tiny_llama) -> None:
    folder = tiny_llama("llama31")
    shape = read_shape(folder)
    trained = shape.adapter_parameters(shape.linear_shapes(), range(shape.num_layers), 16)
    found = {
        offload: simulate(
            config_of(str(folder), parallel={"offload": offload}, train={"sequence_length": 64, "global_batch": 4}),
            shape,
            num_nodes=1,
            gpus_per_node=2,
            device_bytes=GIB,
        )
        for offload in ("none", "base", "optimizer", "all")
    }
    base, moments = nf4_share(shape, 2), 8 * trained + 4
    copies = 4 * trained  # of the parameters, which are updated there
    assert {offload: each.host_bytes for offload, each in found.items()} == {
        "none": 0,
        "base": base,
        "optimizer": moments + copies,
        "all": base + moments + copies,
    }
    for offload, each in found.items():
        assert each.composition["base shard"] == (base if offload in ("none", "optimizer") else 0)
        assert each.composition["optimizer"] == (moments if offload in ("none", "base") else 0)


@pytest.mark.turn(of=4)
@pytest.mark.parametrize("base_shard", ["node", "world"])
def test_405b_on_128_gpus_is_simulated_whole(base_shard) -> None:
    shape = MEMBERS["3.1-405b"].shape
    train = {"global_batch": 128, "micro_batch": 1, "activation_checkpointing": "all"}
    config = config_of("3.1-405b", train=train, parallel={"base_shard": base_shard})
    found = simulate(config, shape, num_nodes=16, gpus_per_node=8, device_bytes=80 * GIB)
    assert found.composition["base shard"] == nf4_share(shape, 8 if base_shard == "node" else 128)
    trained = shape.adapter_parameters(shape.linear_shapes(), range(shape.num_layers), 16)
    assert found.composition["adapters"] == 4 * trained / 8, "9 GiB of them are sharded over a node"
    assert crossing(found, "between nodes") == 4 * trained / 8
    gathered = sum(t.num_bytes for t in found.traffic if t.kind == "_allgather_base_" and t.axis == base_shard)
    assert gathered >= 2 * 0.97 * nf4_share(shape, 1)
    assert found.peak_bytes < 60 * GIB
