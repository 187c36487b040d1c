"""Who holds what: what ``auto`` chooses from bytes, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from dist_lora.config.schema import Config, ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.layout.choices import (
    TIGHT,
    Layout,
    check_section,
    choose,
    choose_attention,
    choose_dtype,
    choose_kernels,
    choose_layout,
    choose_recomputed,
    lr_lines,
    with_lr,
)
from dist_lora.layout.memory import memory_of, reserve_bytes, setup_of
from dist_lora.layout.setup import Setup
from dist_lora.text import GIB


def chosen(world_size: int, local_size: int, *, base_gib: float = 100, trained: int = 10**7, **settings: str) -> Layout:
    return choose_layout(
        ParallelSection(**settings),
        world_size=world_size,
        local_size=local_size,
        base_bytes=int(base_gib * GIB),
        trained_weights=trained,
        device_bytes=80 * GIB,
    )


def test_one_process_needs_no_engine() -> None:
    assert chosen(1, 1).engine == "none"
    assert chosen(1, 1, offload="optimizer").engine == "none"
    layout = chosen(1, 1, offload="base")
    assert (layout.engine, layout.base_on_host, layout.optimizer_on_host) == ("none", True, False)
    assert layout.reasons[0] == "engine    none: one process, which fetches each layer while the one before it computes"
    assert layout.reasons[1].endswith("100.00 GiB, layers in host memory, embedding and head on the device")
    assert chosen(1, 1, offload="base", engine="fsdp2").engine == "fsdp2"
    assert chosen(8, 8).engine == "fsdp2"


def test_the_base_stays_within_a_node_where_it_fits() -> None:
    # 60 % of 80 GiB are 48: 380 GiB over 8 are 47.5, 390 are 48.75.
    assert chosen(16, 8, base_gib=380).base_shard == "node"
    assert chosen(16, 8, base_gib=390).base_shard == "world"
    assert chosen(16, 8, base_gib=390, offload="base").base_shard == "node"
    assert chosen(16, 8, base_gib=390, base_shard="node").base_shard == "node"
    assert chosen(16, 8, engine="zero3").base_shard == "world"


def test_adapters_are_shared_once_they_take_more_than_a_twentieth_of_a_device() -> None:
    # 5 % of 80 GiB are 4 GiB: 268,435,456 weights of 16 bytes.
    assert chosen(16, 8, trained=268_435_456).adapters == "replicate"
    assert chosen(16, 8, trained=268_435_457).adapters == "shard"
    assert chosen(16, 8, adapters="shard").adapters == "shard"
    assert chosen(2, 1, trained=10**9).adapters == "replicate"  # nobody in the node to share them with
    assert chosen(16, 8, engine="zero3").adapters == "shard"


def test_the_reasons_give_bytes() -> None:
    engine, base, adapters = chosen(16, 8, base_gib=380).reasons
    assert engine == "engine    fsdp2: 16 processes share the base"
    assert base == (
        "base      sharded over the 8 ranks of each node, 47.50 GiB each, none of it crosses the network: "
        "47.50 GiB per rank fit in 48.00 GiB of a device"
    )
    assert adapters.startswith("adapters  replicated, 152.6 MiB with gradients and AdamW's moments")
    crossing = chosen(16, 8, base_gib=390).reasons[1]
    assert "24.38 GiB each; each receives 195.00 GiB over the network, twice per micro-batch" in crossing
    assert "48.75 GiB per rank don't fit in 48.00 GiB of a device" in crossing


@pytest.mark.parametrize(
    ("world", "settings", "told"),
    [
        ((2, 2), {"engine": "none"}, "none runs one process and 2 were started"),
        ((1, 1), {"engine": "none", "adapters": "shard"}, "parallel.adapters: shard needs several processes"),
        ((4, 2), {"engine": "zero3", "base_shard": "node"}, "node over 2 nodes isn't supported by engine zero3"),
        ((2, 2), {"engine": "zero3", "adapters": "replicate"}, "replicate isn't supported by engine zero3"),
        ((2, 2), {"engine": "zero3", "base_shard": "gpu"}, "parallel.base_shard: gpu isn't supported by engine zero3"),
        (
            (2, 2),
            {"base_shard": "gpu", "adapters": "shard"},
            "parallel.adapters: shard isn't supported with parallel.base_",
        ),
        (
            (2, 2),
            {"base_shard": "gpu", "offload": "base"},
            "base keeps the base in host memory, and parallel.base_shard: gpu",
        ),
        (
            (2, 1),
            {"base_shard": "gpu", "offload": "all"},
            "all keeps the base in host memory, and parallel.base_shard: gpu",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_a_way_out(world, settings, told) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        check_section(ParallelSection(**settings), world_size=world[0], local_size=world[1])
    assert "Set parallel." in str(raised.value)


def test_the_whole_base_is_on_each_gpu_as_set_and_its_adapters_too() -> None:
    layout = chosen(16, 8, base_gib=15, base_shard="gpu", trained=10**9)
    assert (layout.engine, layout.base_shard, layout.adapters, layout.has_whole_base) == (
        "fsdp2",
        "gpu",
        "replicate",
        True,
    )
    assert layout.reasons == (
        "engine    fsdp2: 16 processes hold the base each",
        "base      whole on each of 16 ranks, 15.00 GiB: as set",
        "adapters  replicated, 14.90 GiB with gradients and AdamW's moments: like the base",
    )
    assert chosen(16, 8, base_shard="gpu", offload="optimizer").optimizer_on_host
    assert chosen(1, 1, base_shard="gpu").engine == "none"
    alone = chosen(1, 1, base_shard="gpu", offload="base")  # one process holds it in any case, here on the host
    assert (alone.engine, alone.base_shard, alone.base_on_host) == ("none", "node", True)
    assert not chosen(8, 8).has_whole_base and chosen(1, 1).has_whole_base


def setup_by_auto(*, device_gib: float, on_gpu: bool = True, parallel: dict[str, str], **train: object) -> Setup:
    """8B in bf16 (14.96 GiB) on two nodes of two GPUs, with sequences of 2 x 4096 tokens."""
    config = Config.model_validate({
        "run": "it", "model": {"name": "3.1-8b", "dtype": "bf16"}, "data": {"train": "x"},
        "train": {"micro_batch": 2, "sequence_length": 4096, **train}, "parallel": parallel,
    })  # fmt: skip
    machine = {"num_nodes": 2, "gpus_per_node": 2, "device_bytes": int(device_gib * GIB)}
    return setup_of(config, MEMBERS["3.1-8b"].shape, **machine, on_gpu=on_gpu)


def needed_bytes(setup: Setup) -> int:
    held = memory_of(setup).device
    return held + reserve_bytes(held)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_auto_keeps_the_whole_base_on_each_gpu_from_the_byte_on_where_all_of_a_step_fits_in_nine_tenths(
    recompute,
) -> None:
    train = {"activation_checkpointing": recompute}
    as_set = setup_by_auto(device_gib=80, parallel={"base_shard": "gpu"}, **train)
    enough_gib = needed_bytes(as_set) / TIGHT / GIB
    above, below = (setup_by_auto(device_gib=enough_gib * f, parallel={}, **train) for f in (1.0001, 0.9999))
    assert above.layout.base_shard == "gpu" and memory_of(above) == memory_of(as_set)
    assert re.fullmatch(
        r"base      whole on each of 4 ranks, 14.96 GiB: \S+ GiB with all that a step holds fit in \S+ GiB \(90% of a GPU\)",
        above.layout.reasons[1],
    )
    assert below.layout.base_shard == "node"
    assert re.search(
        r"; whole on each, \S+ GiB with all that a step holds don't fit in \S+ GiB \(90% of a GPU\)$",
        below.layout.reasons[1],
    )
    assert [reason.split()[0] for reason in below.choices.reasons][:3] == ["engine", "base", "adapters"]


def test_auto_recomputes_no_layer_more_for_a_whole_base() -> None:
    """Sharded, 36 GiB ask for some layers; the whole base would fit if more recomputed."""
    sharded = setup_by_auto(device_gib=36, parallel={})
    whole = setup_by_auto(device_gib=36, parallel={"base_shard": "gpu"})
    assert sharded.layout.base_shard == "node"
    assert 0 < len(sharded.recomputed) < len(whole.recomputed) and needed_bytes(whole) < TIGHT * 36 * GIB
    assert setup_by_auto(device_gib=60, parallel={}).recomputed == range(0)


@pytest.mark.parametrize(
    ("parallel", "because"),
    [
        ({"adapters": "shard"}, "not whole on each, since the adapters are sharded (parallel.adapters)"),
        ({"offload": "base"}, "in 48.00 GiB of a device"),
        ({"base_shard": "node"}, "none of it crosses the network: as set"),
        ({"engine": "zero3"}, "ZeRO-3 ignores nodes"),
    ],
)
def test_auto_shards_what_is_set_to_be_elsewhere(parallel, because) -> None:
    layout = setup_by_auto(device_gib=80, parallel=parallel).layout
    assert layout.base_shard in ("node", "world") and layout.reasons[1].endswith(because)
    assert layout.reasons[0] in ("engine    fsdp2: 4 processes share the base", "engine    zero3: as set")


def test_auto_shards_on_cpus_however_much_memory_there_is() -> None:
    layout = setup_by_auto(device_gib=900, on_gpu=False, parallel={}).layout
    assert layout.base_shard == "node"
    assert layout.reasons[1].endswith("; not whole on each, since ranks on CPUs share the host's memory")
    assert setup_by_auto(device_gib=900, on_gpu=False, parallel={"base_shard": "gpu"}).layout.base_shard == "gpu"


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_section(ParallelSection(engine="none", offload="all", adapters="shard"), world_size=2, local_size=2)
    assert len(str(raised.value).splitlines()) == 2


def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu() -> None:
    assert choose_dtype("auto", on_gpu=True) == ("bf16", "on a GPU")
    assert choose_dtype("auto", on_gpu=False) == ("fp32", "on a CPU")
    assert choose_dtype("bf16", on_gpu=False) == ("bf16", "as set")
    assert choose_dtype("auto", on_gpu=True, has_bf16=False)[0] == "fp32"
    assert choose_dtype("fp32", on_gpu=True, has_bf16=False) == ("fp32", "as set")
    with pytest.raises(ConfigError, match=r"model.dtype: bf16 needs GPUs of compute capability 8.0 or newer"):
        choose_dtype("bf16", on_gpu=True, has_bf16=False)


def test_auto_takes_flash_on_a_gpu_in_16_bits_and_tiles_on_a_cpu_in_fp32() -> None:
    assert choose_attention("auto", dtype="bf16", on_gpu=True)[0] == "varlen"
    assert choose_attention("auto", dtype="fp32", on_gpu=True)[0] == "sdpa-repeated"
    assert choose_attention("sdpa", dtype="fp32", on_gpu=True)[0] == "sdpa-repeated"
    assert choose_attention("sdpa", dtype="bf16", on_gpu=True)[0] == "sdpa"
    assert choose_attention("auto", dtype="fp32", on_gpu=False)[0] == "tiled"
    assert choose_attention("sdpa", dtype="fp32", on_gpu=False) == ("sdpa", "as set")
    assert choose_attention("auto", dtype="bf16", on_gpu=False)[0] == "sdpa"
    assert choose_attention("eager", dtype="bf16", on_gpu=True) == ("eager", "as set")
    for dtype, on_gpu, found in (("fp32", True, "fp32 on GPUs"), ("bf16", False, "bf16 on CPUs")):
        with pytest.raises(ConfigError, match=f"model.attention: varlen .* and this run computes in {found}. Set"):
            choose_attention("varlen", dtype=dtype, on_gpu=on_gpu)


def recompute_line(
    setting: str | bool | int, *, on_gpu: bool = True, device_gib: float = 32, layers: str = "all"
) -> str:
    """The last reason of 1B (16 layers) with sequences of 4 x 8192 tokens."""
    config = Config.model_validate({
        "run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x"}, "lora": {"layers": layers},
        "train": {"activation_checkpointing": setting, "micro_batch": 4, "sequence_length": 8192},
    })  # fmt: skip
    machine = {"num_nodes": 2, "gpus_per_node": 2, "device_bytes": int(device_gib * GIB)}
    setup = setup_of(config, MEMBERS["3.2-1b"].shape, **machine, on_gpu=on_gpu)
    assert [reason.split()[0] for reason in setup.choices.reasons] == [
        "engine", "base", "adapters", "dtype", "attention", "kernels", "recompute"
    ]  # fmt: skip
    # An auto that is resolved is the same as if it had been set.
    again = config.model_copy(
        update={"train": config.train.model_copy(update={"activation_checkpointing": len(setup.recomputed)})}
    )
    assert setup_of(again, MEMBERS["3.2-1b"].shape, **machine, on_gpu=on_gpu).recomputed == setup.recomputed
    return setup.choices.reasons[-1]


def test_fused_kernels_are_taken_on_gpus_unless_set_otherwise() -> None:
    assert choose_kernels("auto", on_gpu=True) == (True, "norms, RoPE, SwiGLU and loss by Triton, on a GPU")
    assert choose_kernels("none", on_gpu=True) == (False, "as set")
    assert choose_kernels("auto", on_gpu=False) == (False, "the fused ones need a GPU")


@pytest.mark.parametrize(("setting", "on_gpu", "expected"), [
    ("auto", False, "recompute no layer: saves time on a CPU"),
    ("all", False, "recompute all 16 layers: as set"), (True, True, "recompute all 16 layers: as set"),
    ("none", True, "recompute no layer: as set"), (False, True, "recompute no layer: as set"),
    (0, True, "recompute no layer: as set"), (1, False, "recompute 1 of 16 layers (0): as set"),
    (16, True, "recompute all 16 layers: as set"),
])  # fmt: skip
def test_what_recomputes_is_as_set_and_nothing_on_a_cpu(setting, on_gpu, expected) -> None:
    assert recompute_line(setting, on_gpu=on_gpu) == expected


def test_auto_recomputes_the_fewest_layers_that_fit_in_nine_tenths_of_a_gpu() -> None:
    assert re.fullmatch(
        r"recompute no layer: \S+ GiB fit in 180.00 GiB \(90% of a GPU\)", recompute_line("auto", device_gib=200)
    )
    found = re.fullmatch(
        r"recompute (\d+) of 16 layers \(0-(\d+)\): the fewest that fit in 27.00 GiB \(90% of a GPU\): (\S+) GiB, with (\d+) it would "
        r"be (\S+) GiB",
        recompute_line("auto", device_gib=30),
    )
    assert found is not None
    chosen, last, needed, one_less, more = (float(number) for number in found.groups())
    assert last == one_less == chosen - 1 and 0 < chosen < 16 and needed < 27 <= more
    assert re.fullmatch(
        r"recompute 15 of 16 layers \(0-14\): a GPU can't need less than \S+ GiB, more than 7.20 GiB \(90% of a GPU\)",
        recompute_line("auto", device_gib=8),
    )


def test_the_last_layer_keeps_what_the_peak_holds_anyway_at_the_end_of_its_recomputation() -> None:
    config = Config.model_validate({
        "run": "it", "model": {"name": "3.1-405b"}, "data": {"train": "x"},
        "train": {"micro_batch": 1, "sequence_length": 2048},
    })  # fmt: skip
    setup = setup_of(config, MEMBERS["3.1-405b"].shape, num_nodes=1, gpus_per_node=8, device_bytes=80 * GIB)
    assert setup.recomputed == range(125)
    everything = replace_recomputed(setup, range(126))
    its_output = 2048 * 16384 * 2  # which is made again too
    assert memory_of(everything).device - memory_of(setup).device == its_output


def replace_recomputed(setup: Setup, recomputed: range) -> Setup:
    return dataclasses.replace(setup, choices=dataclasses.replace(setup.choices, recomputed=recomputed))


def test_layers_before_the_first_adapter_save_nothing_and_never_recompute() -> None:
    assert recompute_line("all", layers="6-9") == "recompute 10 of 16 layers (6-15): as set"
    assert recompute_line(2, layers="6-9") == "recompute 2 of 16 layers (6-7): as set"
    assert recompute_line(16, layers="6-9") == "recompute 10 of 16 layers (6-15): as set"


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"train.activation_checkpointing: 17 layers can't recompute, since the model has 16. Set at most 16",
    ):
        recompute_line(17)


@pytest.mark.parametrize("limit", [1, 2, 3, 17])
@pytest.mark.parametrize("of_last", [-3, 0, 3])
def test_the_fewest_are_found_by_bisection_wherever_they_are(limit, of_last) -> None:
    """Each layer saves 10 bytes, but for the last: what it saves may be more or less than what it costs at the peak."""
    bytes_of = {num: 1000 - 10 * num for num in range(limit)} | {limit: 1000 - 10 * (limit - 1) + of_last}
    for room in range(1000 - 10 * limit - 20, 1020):
        fitting = [num for num in range(limit + 1) if bytes_of[num] < TIGHT * (room / TIGHT)]
        least = min(range(limit + 1), key=lambda num: bytes_of[num])
        layers, _ = choose_recomputed(
            "auto",
            num_layers=limit + 5,
            first_trained=5,
            device_bytes=room / TIGHT,
            needed_bytes=lambda layers: bytes_of[len(layers)],
        )
        assert layers == range(5, 5 + (fitting[0] if fitting else least)), room


def test_what_nf4_can_not_store_is_refused_where_the_choices_are_made() -> None:
    config = Config.model_validate({"run": "it", "model": {"name": "x", "quant": "nf4"}, "data": {"train": "x"}})
    shape = dataclasses.replace(MEMBERS["3.2-1b"].shape, ffn=96)
    with pytest.raises(
        ConfigError, match=r"model.quant: nf4 can't store x: down_proj: nf4 splits each row into blocks of 64"
    ):
        choose(config, shape, name="x", world_size=1, local_size=1, device_bytes=2**35, on_gpu=False)


@pytest.mark.parametrize(
    "section", [{"engine": "fsdp2"}, {"engine": "fsdp2", "adapters": "shard"}, {"engine": "zero3"}], ids=str
)
@pytest.mark.parametrize(("world_size", "local_size"), [(1, 1), (2, 1), (4, 2)])
def test_one_rank_is_written_as_one(section: dict[str, str], world_size: int, local_size: int) -> None:
    layout = choose_layout(
        ParallelSection.model_validate(section), world_size=world_size, local_size=local_size, base_bytes=10 * GIB,
        trained_weights=10**7, device_bytes=80 * GIB,
    )  # fmt: skip
    text = "\n".join(layout.reasons)
    assert not re.search(r"\b1 (ranks|processes|nodes|GPUs)\b|\bover the 1\b|\bover all 1\b", text), text
    assert ("on the only rank" in text) is (local_size == 1 and (world_size == 1 or section["engine"] != "zero3"))


@pytest.mark.parametrize(
    ("member", "lr"), [("3.2-1b", 4.91e-4), ("3.1-8b", 2.86e-4), ("3.1-70b", 1.66e-4), ("3.1-405b", 9.67e-5)]
)
@pytest.mark.parametrize("rank", [1, 64])
def test_a_rate_by_the_formula_is_tinker_s_at_any_rank(member: str, lr: float, rank: int) -> None:
    config = lr_config(rank=rank)
    resolved = with_lr(config, MEMBERS[member].shape)
    assert (config.optim.lr, resolved.optim.lr, resolved.optim.peak_lr) == ("auto", lr, lr)
    choices = choose(
        config, MEMBERS[member].shape, name=member, world_size=1, local_size=1, device_bytes=2**40, on_gpu=True
    )
    width = f"{MEMBERS[member].shape.hidden:,}"
    assert f"lr        {lr:g}: 5e-4 x (2000 / {width})^0.781, Tinker's formula" in choices.reasons[-1]


def lr_config(**lora: Any) -> Config:
    settings = {"run": "it", "model": {"name": "x"}, "data": {"train": "x"}, "lora": lora, "optim": {"lr": "auto"}}
    return Config.model_validate(settings)


def test_a_rate_by_the_formula_is_refused_for_another_alpha_and_a_number_is_as_set() -> None:
    shape = MEMBERS["3.1-8b"].shape
    with pytest.raises(
        ConfigError, match=r"optim.lr: auto is known for lora.alpha: 32 \(at any rank\), and alpha is 16"
    ) as told:
        with_lr(lr_config(alpha=16), shape)
    assert "or a number, about optim.lr=0.000572" in str(told.value)
    mixed = [{"name": f"model.layers.{i}.self_attn.q_proj", "rank": 4, "alpha": a} for i, a in enumerate((16, 32))]
    with pytest.raises(ConfigError, match=r"alpha is 16, 32. Set lora.alpha=32, or a number$"):
        with_lr(lr_config(modules=mixed), shape)
    as_set = Config.model_validate({"run": "it", "model": {"name": "x"}, "data": {"train": "x"}, "lora": {"alpha": 16}})
    assert with_lr(as_set, shape) is as_set and lr_lines(as_set, shape) == ()
