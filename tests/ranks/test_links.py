"""Links and clocks between real ranks, in simulated nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from dist_lora.doctor import links
from dist_lora.doctor.clocks import Offset, clock_offsets
from dist_lora.doctor.links import AxisRate, PairRate, measure_links
from dist_lora.world.world import World
from tests.ranks.pool import RankFailed

HOSTS = ("a", "a", "b", "b")


def links_of(world: World) -> tuple[list[AxisRate], list[PairRate]]:
    links.SIZES = (2**14, 2**16)
    return measure_links(world, hosts=HOSTS)


@pytest.fixture(scope="module")
def on_two_nodes(ranks) -> list[tuple[list[AxisRate], list[PairRate]]]:
    return ranks(4).run(links_of, node_size=2)


def test_all_ranks_measure_the_collectives_of_every_axis(on_two_nodes) -> None:
    for rates, _ in on_two_nodes:
        assert [(each.kind, each.axis, each.num_ranks) for each in rates] == [
            (kind, axis, size)
            for axis, size in (("within a node", 2), ("between nodes", 2), ("over all ranks", 4))
            for kind in ("all-gather", "all-reduce")
        ]
        for each in rates:
            assert 0 < each.bytes_per_s[0] <= each.bytes_per_s[1] and each.latency_s > 0
            assert [size for size, _ in each.by_size] == [2**14, 2**16]
            assert all(each.bytes_per_s[0] <= slow <= fast <= each.bytes_per_s[1] for _, (slow, fast) in each.by_size)


def test_the_rings_go_within_nodes_and_between_equal_places_of_nodes(on_two_nodes) -> None:
    for _, pairs in on_two_nodes:
        found = {(each.axis, each.sender, each.receiver) for each in pairs}
        inside = {("within a node", a, b) for a, b in ((0, 1), (1, 0), (2, 3), (3, 2))}
        between = {("between nodes", a, b) for a, b in ((0, 2), (2, 0), (1, 3), (3, 1))}
        assert found == inside | between and len(pairs) == 8
        assert all(each.bytes_per_s > 0 for each in pairs)
        crossing = next(each for each in pairs if (each.sender, each.receiver) == (1, 3))
        assert str(crossing) == "from rank 1 on a to rank 3 on b"


def test_one_node_has_one_axis(ranks) -> None:
    for rates, pairs in ranks(2).run(links_of):
        assert {each.axis for each in rates} == {"within a node"}
        assert {(each.sender, each.receiver) for each in pairs} == {(0, 1), (1, 0)}


class LateSend:
    """A message that is on its way only some time after somebody waits for it."""

    def __init__(self, start: Callable[[], list[dist.Work]]) -> None:
        self._start = start

    def wait(self) -> None:
        """See the class."""
        time.sleep(0.1)
        self._start()[0].wait()


def slow_send(world: World) -> list[PairRate]:
    """What rank 1 sends comes late: each message of the ring is timed on its own link."""
    links.SIZES = (2**14,)
    started = dist.batch_isend_irecv

    def late(moves: list[dist.P2POp]) -> list[Any]:
        if world.world_rank != 1:
            return started(moves)
        return [*started(moves[:1]), LateSend(lambda: started(moves[1:]))]

    dist.batch_isend_irecv = late
    try:
        return measure_links(world, hosts=HOSTS)[1]
    finally:
        dist.batch_isend_irecv = started


def test_a_link_that_is_slow_is_told_from_the_others(ranks) -> None:
    for pairs in ranks(4).run(slow_send):
        slowest = min(pairs, key=lambda each: each.bytes_per_s)
        assert (slowest.sender, slowest.receiver) == (1, 2)


# Clocks


def skewed(world: World, ahead_s: list[float]) -> list[Offset]:
    node = world.world_rank // world.local_size
    return clock_offsets(world, within_s=20, clock=lambda: time.time() + ahead_s[node], host=f"host{node}")


def test_a_clock_that_is_ahead_is_measured_to_within_its_doubt(ranks) -> None:
    first, *others = ranks(4).run(skewed, [100.0, 103.5, 100.0, 70.0], node_size=1)
    assert others == [[], [], []]
    assert [each.host for each in first] == ["host1", "host2", "host3"]
    for each, expected in zip(first, (3.5, 0.0, -30.0), strict=True):
        assert abs(each.seconds - expected) <= each.doubt_s + 1e-3


def silent(world: World) -> list[Offset]:
    if not world.is_first:
        world.fetch("begun")  # a rank that goes before all have met is another fault
        return []
    world.share("begun", b"1")
    return clock_offsets(world, within_s=0.2)


def test_a_node_that_says_nothing_ends_the_waiting(ranks) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(2).run(silent, node_size=1)
    assert caught.value.kinds[0] == "RuntimeError" and caught.value.kinds[1] == ""
