"""Who holds what: what ``auto`` chooses from bytes, and what contradicts itself."""

from __future__ import annotations

import pytest

from dist_lora.config.schema import ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.layout.choices import GIB, Layout, check_section, choose_layout


def chosen(world_size: int, local_size: int, *, base_gib: float = 100, trained: int = 10**7, **settings: str) -> Layout:
    return choose_layout(
        ParallelSection(**settings),
        world_size=world_size,
        local_size=local_size,
        base_bytes=int(base_gib * GIB),
        trained_weights=trained,
        device_bytes=80 * GIB,
    )


def test_one_process_needs_no_engine_unless_the_base_waits_on_the_host() -> None:
    assert chosen(1, 1).engine == "none"
    assert chosen(1, 1, offload="optimizer").engine == "none"
    layout = chosen(1, 1, offload="base")
    assert (layout.engine, layout.base_on_host, layout.optimizer_on_host) == ("fsdp2", True, False)
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


def test_the_reasons_tell_bytes() -> None:
    engine, base, adapters = chosen(16, 8, base_gib=380).reasons
    assert engine == "engine    fsdp2: 16 processes share the base"
    assert base == (
        "base      cut over the 8 ranks of each node, 47.50 GiB each, and no byte of it crosses the network: "
        "47.50 GiB a rank fit in 48.00 GiB of a device"
    )
    assert adapters.startswith("adapters  whole on every rank, 152.6 MiB with gradients and AdamW's moments")
    crossing = chosen(16, 8, base_gib=390).reasons[1]
    assert "24.38 GiB each; 195.00 GiB of it cross the network to each rank, twice a pass" in crossing
    assert "48.75 GiB a rank do not fit in 48.00 GiB of a device" in crossing


@pytest.mark.parametrize(
    ("world", "settings", "told"),
    [
        ((2, 2), {"engine": "none"}, "none runs one process and 2 were started"),
        ((1, 1), {"engine": "none", "offload": "base"}, "parallel.offload: base brings the base in layer by layer"),
        ((1, 1), {"engine": "none", "adapters": "shard"}, "parallel.adapters: shard needs several processes"),
        ((4, 2), {"engine": "zero3", "base_shard": "node"}, "node over 2 nodes is not there with engine zero3"),
        ((2, 2), {"engine": "zero3", "adapters": "replicate"}, "replicate is not there with engine zero3"),
    ],
)
def test_what_contradicts_itself_is_refused_with_a_way_out(world, settings, told) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        check_section(ParallelSection(**settings), world_size=world[0], local_size=world[1])
    assert "Set parallel." in str(raised.value)


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_section(ParallelSection(engine="none", offload="all", adapters="shard"), world_size=2, local_size=2)
    assert len(str(raised.value).splitlines()) == 3
