"""Names, addresses and interfaces of the ranks' hosts, their clocks, and the bandwidth between ranks."""

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
from dist_lora.text import count

MOST_OFFSET_S = 1.0
SLOW_TIMES = 3.0  # a link that is slower than the others by this factor is named
CROSSING_TIMES = 4.0  # a network that is slower than a node's own links by this factor


def interfaces() -> dict[str, list[str]]:
    """The addresses of this host's interfaces that are up."""
    stats = psutil.net_if_stats()
    return {
        name: [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
    }


def examine_names(
    environment: Mapping[str, str], *, up: Mapping[str, Sequence[str]], num_nodes: int, host: str
) -> Answer:
    """Whether the ranks of several nodes can find each other with these settings and names.

    Args:
        up: the interfaces of this host, from ``interfaces``.
    """
    answer = Answer(facts={"interfaces": {name: list(addresses) for name, addresses in up.items()}})
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if wanted and not _matches(variable, wanted, up):
            answer.add(
                "fault",
                "interfaces",
                f"{variable} is {wanted}, but the interfaces that are up here are {', '.join(up) or 'none'}",
                f"Set {variable} to one of them, or unset it.",
            )
    if num_nodes == 1:
        return answer
    own = _addresses_of(host)
    names_interface = environment.get("GLOO_SOCKET_IFNAME") and environment.get("NCCL_SOCKET_IFNAME")
    if not own or all(_is_loopback(address) for address in own):
        resolution = f"resolves to {', '.join(sorted(own))}, a loopback address" if own else "doesn't resolve"
        answer.add(
            "note" if names_interface else "fault",
            "interfaces",
            f"the hostname {host} {resolution}, and other nodes connect to its address",
            "Fix /etc/hosts or DNS, or name the interface of the network: "
            "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0.",
        )
    _examine_master(environment, num_nodes=num_nodes, answer=answer)
    if answer.findings == []:
        answer.add(
            "ok", "interfaces", f"{host} resolves to {', '.join(sorted(own))}; interfaces that are up: {', '.join(up)}"
        )
    return answer


def _examine_master(environment: Mapping[str, str], *, num_nodes: int, answer: Answer) -> None:
    """Whether ``MASTER_ADDR``, where a launcher sets it, can be the first node on all nodes."""
    master = environment.get("MASTER_ADDR")
    if master:
        addresses = _addresses_of(master)
        if not addresses:
            answer.add(
                "fault",
                "interfaces",
                f"MASTER_ADDR is {master}, which doesn't resolve here",
                "Set it to a name of the first node that all nodes can resolve, or to its address.",
            )
        elif all(_is_loopback(address) for address in addresses):
            answer.add(
                "fault",
                "interfaces",
                f"MASTER_ADDR is {master}, a loopback address, and there are {num_nodes} nodes",
                "Set MASTER_ADDR, or torchrun's --rdzv-endpoint, to the first node's address in the network between them.",
            )


def _matches(variable: str, wanted: str, up: Iterable[str]) -> bool:
    """Whether an interface matches; NCCL takes prefixes, after ``=`` whole names, after ``^`` what to exclude."""
    if variable == "NCCL_SOCKET_IFNAME":
        if wanted.startswith("^"):
            excluded = wanted[1:].removeprefix("=").split(",")
            return any(not any(name.startswith(prefix) for prefix in excluded) for name in up if name != "lo")
        if not wanted.startswith("="):
            return any(name.startswith(prefix) for name in up for prefix in wanted.split(",") if prefix)
        wanted = wanted[1:]
    return any(name in wanted.split(",") for name in up)


def _addresses_of(name: str) -> set[str]:
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
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
    answer = Answer(facts={"clock_offsets_s": {offset.host: offset.seconds for offset in offsets}})
    wrong = [offset for offset in offsets if abs(offset.seconds) - offset.doubt_s > MOST_OFFSET_S]
    for offset in wrong:
        answer.add(
            "warning",
            "clocks",
            f"the clock of {offset.host} is {abs(offset.seconds):.1f} s "
            f"{'ahead of' if offset.seconds > 0 else 'behind'} the first node's",
            "Synchronize them by NTP (chronyd, systemd-timesyncd): a run stops before its job's end by the clock of its node.",
        )
    if offsets and not wrong:
        most = max(offsets, key=lambda offset: abs(offset.seconds))
        answer.add("ok", "clocks", f"within {abs(most.seconds) + most.doubt_s:.3f} s of each other ({most.host})")
    return answer


def judge_links(rates: Sequence[AxisRate], pairs: Sequence[PairRate], *, has_gpus: bool) -> Answer:
    """The bandwidth of the links, by axis of the mesh, and the slowest of them by name."""
    answer = Answer(facts={"axes": [asdict(rate) for rate in rates], "pairs": [asdict(pair) for pair in pairs]})
    for rate in rates:
        slow, fast = rate.bytes_per_s
        answer.add(
            "ok",
            "network",
            f"{rate.kind} {rate.axis}, {count(rate.num_ranks, 'rank')}: {slow / 1e9:.3g} to {fast / 1e9:.3g} GB/s received per rank, "
            f"latency {rate.latency_s * 1e6:,.0f} µs",
        )
    for axis in dict.fromkeys(pair.axis for pair in pairs):
        _judge_pairs(axis, [pair for pair in pairs if pair.axis == axis], answer)
    by_axis = {rate.axis: rate.bytes_per_s[1] for rate in rates if rate.kind == "all-gather"}
    inside, between = by_axis.get("within a node"), by_axis.get("between nodes")
    if inside and between and inside > CROSSING_TIMES * between:
        answer.add(
            "note",
            "network",
            f"all-gather is {inside / between:.0f} times as fast within a node as between nodes",
            "parallel.base_shard: node keeps the base off the network, if a node's GPUs can hold it (gpu, if each can).",
        )
    if has_gpus and inside and inside < 2e9:
        answer.add(
            "warning",
            "network",
            f"the GPUs of a node exchange {inside / 1e9:.2f} GB/s, less than PCIe provides",
            "See `nvidia-smi topo -m`; NCCL_P2P_DISABLE and NCCL_SHM_DISABLE should not be set, and IOMMU/ACS should be off.",
        )
    return answer


def _judge_pairs(axis: str, pairs: Sequence[PairRate], answer: Answer) -> None:
    slowest = min(pairs, key=lambda pair: pair.bytes_per_s)
    usual = statistics.median(pair.bytes_per_s for pair in pairs if pair is not slowest or len(pairs) == 1)
    text = f"the slowest link {axis} is {slowest}: {slowest.bytes_per_s / 1e9:.3g} GB/s"
    if slowest.bytes_per_s * SLOW_TIMES < usual:
        answer.add(
            "warning",
            "network",
            f"{text}; the others reach {usual / 1e9:.3g}",
            f"Check {slowest.receiver_host}'s and {slowest.sender_host}'s interfaces, cables and what else uses them, or "
            "exclude the node (Slurm: --exclude): every collective waits for it.",
        )
    else:
        answer.add("ok", "network", f"{text} (median of the others: {usual / 1e9:.3g})")
