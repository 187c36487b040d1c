"""Names, addresses and interfaces of the ranks' hosts, their clocks, and what the links between ranks carry."""

from __future__ import annotations

import ipaddress
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import psutil

from dist_lora.doctor.clocks import Offset
from dist_lora.doctor.findings import Answer
from dist_lora.doctor.links import AxisRate, PairRate

MOST_OFFSET_S = 1.0
SLOW_TIMES = 3.0  # a link that is so much slower than its like is named
CROSSING_TIMES = 4.0  # a network that is so much slower than a node's own links


def interfaces() -> dict[str, list[str]]:
    """The addresses of this host's interfaces that are up."""
    stats = psutil.net_if_stats()
    return {
        name: [each.address for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
    }


def examine_names(
    environment: Mapping[str, str], *, there: Mapping[str, Sequence[str]], num_nodes: int, host: str
) -> Answer:
    """Whether the ranks of several nodes would find each other by these settings and names.

    Args:
        there: the interfaces of this host, see ``interfaces``.
    """
    answer = Answer(facts={"interfaces": {name: list(addresses) for name, addresses in there.items()}})
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if wanted and not _matches(variable, wanted, there):
            answer.add(
                "fault",
                "interfaces",
                f"{variable} is {wanted}, and the interfaces that are up here are {', '.join(there) or 'none'}",
                f"Set {variable} to one of them, or unset it.",
            )
    if num_nodes == 1:
        return answer
    own = _addresses_of(host)
    names_interface = environment.get("GLOO_SOCKET_IFNAME") and environment.get("NCCL_SOCKET_IFNAME")
    if not own or all(_is_loopback(address) for address in own):
        what = f"means {', '.join(sorted(own))}, this host itself" if own else "means no address"
        answer.add(
            "note" if names_interface else "fault",
            "interfaces",
            f"the name {host} {what}, and other nodes are told that name's address",
            "Mend /etc/hosts or the name service, or name the interface of the network: "
            "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0.",
        )
    _examine_master(environment, num_nodes=num_nodes, answer=answer)
    if answer.findings == []:
        answer.add("ok", "interfaces", f"{host} is {', '.join(sorted(own))}; up are {', '.join(there)}")
    return answer


def _examine_master(environment: Mapping[str, str], *, num_nodes: int, answer: Answer) -> None:
    """Whether ``MASTER_ADDR``, where a launcher sets it, means the first node on all of them."""
    master = environment.get("MASTER_ADDR")
    if master:
        addresses = _addresses_of(master)
        if not addresses:
            answer.add(
                "fault",
                "interfaces",
                f"MASTER_ADDR is {master}, a name without an address here",
                "Give the first node's name as all nodes know it, or its address.",
            )
        elif all(_is_loopback(address) for address in addresses):
            answer.add(
                "fault",
                "interfaces",
                f"MASTER_ADDR is {master}, which means each node itself, and there are {num_nodes} nodes",
                "Give the first node's address in the network that joins them: MASTER_ADDR, or torchrun's --rdzv-endpoint.",
            )


def _matches(variable: str, wanted: str, there: Iterable[str]) -> bool:
    """Whether an interface is named; NCCL reads beginnings, after = whole names, after ^ what to leave out."""
    if variable == "NCCL_SOCKET_IFNAME":
        if wanted.startswith("^"):
            left_out = wanted[1:].removeprefix("=").split(",")
            return any(not any(name.startswith(each) for each in left_out) for name in there if name != "lo")
        if not wanted.startswith("="):
            return any(name.startswith(each) for name in there for each in wanted.split(",") if each)
        wanted = wanted[1:]
    return any(name in wanted.split(",") for name in there)


def _addresses_of(name: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return set()


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


# Between ranks


def judge_clocks(offsets: Sequence[Offset]) -> Answer:
    """Whether the nodes' clocks agree."""
    answer = Answer(facts={"clock_offsets_s": {each.host: each.seconds for each in offsets}})
    wrong = [each for each in offsets if abs(each.seconds) - each.doubt_s > MOST_OFFSET_S]
    for each in wrong:
        answer.add(
            "warning",
            "clocks",
            f"the clock of {each.host} is {abs(each.seconds):.1f} s {'ahead of' if each.seconds > 0 else 'behind'} the first node's",
            "Have them set by NTP (chronyd, systemd-timesyncd): a run stops before its job's end by the clock of its node.",
        )
    if offsets and not wrong:
        most = max(offsets, key=lambda each: abs(each.seconds))
        answer.add("ok", "clocks", f"within {abs(most.seconds) + most.doubt_s:.3f} s of each other ({most.host})")
    return answer


def judge_links(rates: Sequence[AxisRate], pairs: Sequence[PairRate], *, has_gpus: bool) -> Answer:
    """What the links carry, by axis of the mesh, and the slowest of them by name."""
    answer = Answer(facts={"axes": [asdict(each) for each in rates], "pairs": [asdict(each) for each in pairs]})
    for each in rates:
        slow, fast = each.bytes_per_s
        answer.add(
            "ok",
            "network",
            f"{each.kind} {each.axis}, {each.num_ranks} ranks: a rank receives {slow / 1e9:.3g} to {fast / 1e9:.3g} GB/s, "
            f"a small one takes {each.latency_s * 1e6:,.0f} µs",
        )
    for axis in dict.fromkeys(pair.axis for pair in pairs):
        _judge_pairs(axis, [pair for pair in pairs if pair.axis == axis], answer)
    by_axis = {each.axis: each.bytes_per_s[1] for each in rates if each.kind == "all-gather"}
    inside, between = by_axis.get("within a node"), by_axis.get("between nodes")
    if inside and between and inside > CROSSING_TIMES * between:
        answer.add(
            "note",
            "network",
            f"within a node a rank receives {inside / between:.0f} times as much as from other nodes",
            "parallel.base_shard: node keeps the base off the network, where a node's GPUs hold it.",
        )
    if has_gpus and inside and inside < 2e9:
        answer.add(
            "warning",
            "network",
            f"the GPUs of a node exchange {inside / 1e9:.2f} GB/s, less than PCIe carries",
            "See `nvidia-smi topo -m`; NCCL_P2P_DISABLE and NCCL_SHM_DISABLE should not be set, and IOMMU/ACS should be off.",
        )
    return answer


def _judge_pairs(axis: str, pairs: Sequence[PairRate], answer: Answer) -> None:
    slowest = min(pairs, key=lambda pair: pair.bytes_per_s)
    usual = statistics.median(pair.bytes_per_s for pair in pairs if pair is not slowest or len(pairs) == 1)
    told = f"the slowest link {axis} is {slowest}: {slowest.bytes_per_s / 1e9:.3g} GB/s"
    if slowest.bytes_per_s * SLOW_TIMES < usual:
        answer.add(
            "warning",
            "network",
            f"{told}; the others carry {usual / 1e9:.3g}",
            f"Look at {slowest.receiver_host}'s and {slowest.sender_host}'s interfaces, cables and what else uses them, or "
            "leave the node out (Slurm: --exclude): every collective waits for it.",
        )
    else:
        answer.add("ok", "network", f"{told} (median of the others: {usual / 1e9:.3g})")
