"""The work behind ``dist-lora doctor``: every rank examines itself and its links, rank 0 merges and prints the report."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from dist_lora.config.schema import Config
from dist_lora.doctor.clocks import clock_offsets
from dist_lora.doctor.compute import examine_compute, judge_compute, memory_of_device, name_of
from dist_lora.doctor.disk import examine_disk
from dist_lora.doctor.fabric import examine_fabric
from dist_lora.doctor.findings import Answer, Examiner, Finding, merge_hosts, worst
from dist_lora.doctor.hub import examine_hub
from dist_lora.doctor.links import AxisRate, measure_links
from dist_lora.doctor.machine import (
    ask_driver,
    compare_gpus,
    compare_with_config,
    examine_capabilities,
    examine_gpus,
    examine_host,
    read_host,
    torch_build,
)
from dist_lora.doctor.network import examine_names, interfaces, judge_clocks, judge_links
from dist_lora.doctor.versions import compare_nodes, examine_compiled, examine_versions
from dist_lora.engines.precision import TORCH_TYPES
from dist_lora.errors import EXIT_DONE, EXIT_FAILED, DistLoraError, SaveError
from dist_lora.layout.choices import choose_dtype
from dist_lora.plan.measured import AtSize, Link, Measured, Product, slowest_of, write_measured
from dist_lora.text import count
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, computes_bf16, default_device, join

LEAVE_S = 5.0  # how long rank 0, which may host the store, waits for the others to read the exit code
EARLIER_S = 0.8  # of a deadline: the limit of a wait for another rank, so that it ends before the step that waits


@dataclass(frozen=True)
class Request:
    """What the user asks for: ``config`` is a run to check, ``deadline_s`` the most that a step may take."""

    config: Config | None
    out: Path | None
    as_json: bool
    deadline_s: float

    @property
    def runs_dir(self) -> Path:
        """The folder of the runs, or the default one."""
        return Path("runs") if self.config is None else self.config.runs_dir

    def dtype(self, device: torch.device) -> torch.dtype:
        """The compute dtype of a run."""
        wanted = "auto" if self.config is None else self.config.model.dtype
        has_bf16 = computes_bf16(device)
        if not has_bf16 and wanted == "bf16":  # which is a finding of its own
            wanted = "auto"
        return TORCH_TYPES[choose_dtype(wanted, on_gpu=device.type == "cuda", has_bf16=has_bf16)[0]]


def diagnose(launched: LaunchedRank | None, request: Request) -> int:
    """Examine everything, as one of several ranks or alone; rank 0 prints. Returns the exit code.

    Never hangs: a step that does becomes a finding, and the process exits without it.
    """
    launched = launched or LaunchedRank(0, 1, 0, 1)
    examination = Examination(launched, request)
    examination.inspect_host()
    examination.join_others()
    examination.measure()
    code = examination.finish()
    sys.stdout.flush()
    sys.stderr.flush()
    if examination.examiner.is_stuck:
        os._exit(code)
    if examination.world is not None:
        examination.world.leave()
    return code


class Examination:
    """One rank's view of itself and its world; the public methods are called in the order of their definition."""

    def __init__(self, launched: LaunchedRank, request: Request) -> None:
        self.launched, self.request = launched, request
        self.host = socket.gethostname()
        self.own = Answer()  # of this rank or host
        self.shared = Answer()  # of all ranks; filled on rank 0 only
        self.links: list[AxisRate] = []
        self.world: World | None = None
        self.hosts: list[str] = [self.host]
        self.device = default_device(launched.local_rank)
        self.examiner = Examiner(request.deadline_s, begin=self._set_device)
        config = request.config
        self.local_size = (config.parallel.node_size if config else None) or launched.local_size
        self.is_first_of_host = launched.world_rank % self.local_size == 0

    def _set_device(self) -> None:
        """Each thread has its own current GPU, at first GPU 0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def inspect_host(self) -> None:
        """What needs no other rank: the host on one rank per host, names on every rank."""
        examine = self.examiner.examine
        launched = self.launched
        if self.is_first_of_host:
            self.own.extend(examine("versions", examine_versions, todo="Start from a complete environment."))
            self.own.extend(examine("versions", examine_compiled, todo="Start from a complete environment."))
            self._record("host", examine("host", lambda: examine_host(read_host(), ranks=self.local_size), todo=_HOST))
            self._record(
                "gpus",
                examine(
                    "GPUs",
                    lambda: _examine_gpus(self.request.config),
                    todo="Run nvidia-smi: if it hangs too, restart the node.",
                ),
            )
            self._record("disk", examine("disk", lambda: examine_disk(self.request.runs_dir), todo=_DISK))
        num_nodes = launched.world_size // self.local_size
        if self.is_first_of_host:
            fabric = examine("fabric", lambda: examine_fabric(os.environ, num_nodes=num_nodes), todo=_FABRIC)
            self._record("fabric", fabric)
        names = examine(
            "interfaces",
            lambda: examine_names(os.environ, up=interfaces(), num_nodes=num_nodes, host=self.host),
            todo="The name service doesn't answer: use addresses instead of names.",
        )
        self._record("names", names)
        if launched.world_rank == 0:
            self._record("hub", examine("hub", lambda: examine_hub(os.environ, self.request.config), todo=_HUB))

    def _record(self, name: str, answer: Answer) -> None:
        """Add the findings, and the facts under ``name``."""
        self.own.findings += answer.findings
        self.own.facts[name] = answer.facts

    def join_others(self) -> None:
        """Join the other ranks, and learn each one's host."""
        launched, deadline_s = self.launched, self.request.deadline_s
        if launched.world_size == 1:
            return

        def step() -> Answer:
            world = join(
                launched,
                os.environ,
                # Later than the step's own deadline: NCCL's watchdog ends a process whose collective hangs.
                collective_timeout_s=2 * deadline_s + 30,
                node_size=self.local_size,
                join_timeout_s=EARLIER_S * deadline_s,
                watches_failures=False,  # rank 0 reports what is wrong with another rank
            )
            world.share(f"doctor/host/{launched.world_rank}", self.host.encode())
            limit = timedelta(seconds=EARLIER_S * deadline_s)
            self.hosts = [_receive(world, f"doctor/host/{rank}", limit).decode() for rank in range(launched.world_size)]
            self.world = world
            return Answer()

        self.own.extend(self.examiner.examine("rendezvous", step, todo=_JOIN, severity="fault"))

    def measure(self) -> None:
        """Measure compute on all ranks at once, then clocks and links."""
        dtype, deadline_s = self.request.dtype(self.device), self.request.deadline_s
        if self.world is not None:
            self._wait_for_all("compute/begin")
        compute = self.examiner.examine(
            "compute", lambda: examine_compute(self.device, dtype, budget_s=deadline_s / 3), todo=_COMPUTE
        )
        self._record("compute", compute)
        self.own.facts["compute"] |= {
            "device": name_of(self.device),
            "memory_bytes": memory_of_device(self.device, ranks=self.local_size),
        }
        world = self.world
        if world is None:
            return
        if world.num_nodes > 1 and self._wait_for_all("clocks/begin"):
            clocks = self.examiner.examine(
                "clocks", lambda: judge_clocks(clock_offsets(world, within_s=EARLIER_S * deadline_s)), todo=_CLOCKS
            )
            self.shared.extend(clocks)
        if self._wait_for_all("links/begin"):
            self.shared.extend(self.examiner.examine("network", self._links, todo=_NETWORK, severity="fault"))

    def _links(self) -> Answer:
        assert self.world is not None
        rates, pairs = measure_links(self.world, hosts=self.hosts)
        self.links = rates
        return judge_links(rates, pairs, has_gpus=self.device.type == "cuda")

    def _wait_for_all(self, key: str) -> bool:
        """Wait until every rank gets here; False, with a finding, where one doesn't."""
        world = self.world
        assert world is not None
        try:
            world.share(f"doctor/{key}/{world.world_rank}", b"1")
            limit = timedelta(seconds=2 * self.request.deadline_s)
            for rank in range(world.world_size):
                _receive(world, f"doctor/{key}/{rank}", limit)
        except RuntimeError as error:
            self.own.add("fault", "network", f"{key.partition('/')[0]}: {_one_line(error)}", _JOIN)
            return False
        return True

    def finish(self) -> int:
        """Rank 0 collects the answers, writes and prints; the others get its exit code, which is returned."""
        world = self.world
        if world is None:
            if self.launched.world_rank > 0:
                self._report_alone()
                return EXIT_FAILED
            return self._conclude([self.own.to_json()])
        if world.is_first:
            answers = [self.own.to_json(), *self._receive_answers(world)]
            code = self._conclude(answers)
            world.share("doctor/code", str(code).encode())
            self._wait_for_others_to_leave(world)
            return code
        try:
            answer = json.dumps(self.own.to_json() | {"host": self.host})
            world.share(f"doctor/answer/{world.world_rank}", answer.encode())
            code = int(_receive(world, "doctor/code", timedelta(seconds=2 * self.request.deadline_s)))
            world.share(f"doctor/left/{world.world_rank}", b"1")
            return code
        except RuntimeError:  # the store is gone, and rank 0 with it
            return EXIT_FAILED

    def _report_alone(self) -> None:
        """Print what is wrong here, on a rank that couldn't join: it may be the reason."""
        who = f"rank {self.launched.world_rank} of {self.launched.world_size} on {self.host}"
        lines = [
            f"{finding.severity:8} {who}: {finding.about}: {finding.text}\n{'':8} -> {finding.todo}"
            for finding in self.own.findings
            if finding.severity in ("fault", "warning")
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _receive_answers(self, world: World) -> Iterator[dict[str, Any]]:
        limit = timedelta(seconds=self.request.deadline_s)
        for rank in range(1, world.world_size):
            try:
                yield json.loads(_receive(world, f"doctor/answer/{rank}", limit))
            except RuntimeError as error:
                self.shared.add("fault", "network", f"rank {rank} on {self.hosts[rank]}: {_one_line(error)}", _JOIN)
                limit = timedelta(seconds=1)

    def _wait_for_others_to_leave(self, world: World) -> None:
        deadline = time.monotonic() + LEAVE_S
        for rank in range(1, world.world_size):
            with contextlib.suppress(RuntimeError):
                _receive(world, f"doctor/left/{rank}", timedelta(seconds=max(0.01, deadline - time.monotonic())))

    def _conclude(self, answers: Sequence[dict[str, Any]]) -> int:
        """Merge all answers, write and print them; the exit code."""
        report = Report(self, answers)
        if self.request.out is not None:
            report.write_machine(self.request.out)
        print(json.dumps(report.to_json()) if self.request.as_json else "\n".join(report.lines()), flush=True)
        return EXIT_FAILED if worst(report.findings) == "fault" else EXIT_DONE


class Report:
    """All ranks' answers merged."""

    def __init__(self, examination: Examination, answers: Sequence[dict[str, Any]]) -> None:
        self.examination = examination
        self.hosts = list(dict.fromkeys(examination.hosts))
        self.ranks = [(tree.get("host", examination.host), Answer.from_json(tree)) for tree in answers]
        self.findings = merge_hosts(
            ((host, finding) for host, answer in self.ranks for finding in answer.findings),
            num_hosts=len(self.hosts),
        )
        # One rank per host has examined the host: GPUs, versions.
        firsts = {host: answer.facts for host, answer in self.ranks if "packages" in answer.facts}
        self.shared = Answer(list(examination.shared.findings), dict(examination.shared.facts))
        if len(firsts) > 1:
            self.shared.extend(compare_nodes({h: _versions_of(facts) for h, facts in firsts.items()}))
            self.shared.extend(compare_gpus({h: _gpus_of(facts) for h, facts in firsts.items()}))
        self.shared.extend(judge_compute([(host, answer.facts.get("compute", {})) for host, answer in self.ranks]))
        self.findings += self.shared.findings

    def write_machine(self, out: Path) -> None:
        """Write the measured machine to a file; where that fails, add a finding."""
        measured = self.measured()
        if measured is None:
            why = f"{out} isn't written: not everything was measured"
            self.findings.append(
                Finding("fault", "compute", why, "Fix the faults above, or allow more time: --deadline.")
            )
            return
        try:
            write_measured(measured, out)
        except SaveError as error:
            self.findings.append(Finding("fault", "disk", str(error), "Set --out to another file."))

    def measured(self) -> Measured | None:
        """The machine for ``dist-lora plan --measured``; None where a part of it wasn't measured."""
        examination = self.examination
        computes = [answer.facts.get("compute", {}) for _, answer in self.ranks]
        if len(computes) < examination.launched.world_size or not all("products" in compute for compute in computes):
            return None
        if not examination.links and examination.launched.world_size > 1:
            return None
        is_gpu = examination.device.type == "cuda"
        return Measured(
            device=str(computes[0]["device"]),
            is_gpu=is_gpu,
            dtype="bf16" if examination.request.dtype(examination.device) == torch.bfloat16 else "fp32",
            num_nodes=examination.launched.world_size // examination.local_size,
            ranks_per_node=examination.local_size,
            memory_bytes=min(compute["memory_bytes"] for compute in computes),
            host_bytes=int(psutil.virtual_memory().total),
            products=_slowest_products([compute["products"] for compute in computes]),
            attention=_slowest_products([compute["attention"] for compute in computes]),
            dense_weights_per_s={
                name: slowest_of(tuple(compute["dense_weights_per_s"][name]) for compute in computes)
                for name in computes[0]["dense_weights_per_s"]
            },
            elementwise=_slowest_sizes([compute["elementwise"] for compute in computes]),
            call_s=max(compute["call_s"] for compute in computes),
            links=_links_by_axis(examination.links),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "severity": worst(self.findings),
            "ranks": self.examination.launched.world_size,
            "hosts": self.hosts,
            "findings": [
                {"severity": finding.severity, "about": finding.about, "text": finding.text, "todo": finding.todo,
                 "hosts": list(finding.hosts or self.hosts)}
                for finding in self.findings
            ],
            "facts": self.shared.facts,
            "facts_of_ranks": [{"rank": i, "host": host, **answer.facts} for i, (host, answer) in enumerate(self.ranks)],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """For the terminal: the findings in order, and how many of each severity.

        Of ``ok`` findings that differ from host to host, only the first host's are shown.
        """
        size = self.examination.launched.world_size
        yield f"{count(size, 'rank')} on {', '.join(self.hosts)}"
        num_hidden = 0
        for finding in self.findings:
            if finding.severity == "ok" and finding.hosts and self.hosts[0] not in finding.hosts:
                num_hidden += 1
                continue
            where = f" (on {', '.join(finding.hosts)})" if finding.hosts else ""
            yield f"{finding.severity:8} {finding.about}: {finding.text}{where}"
            if finding.todo:
                yield f"{'':8} -> {finding.todo}"
        if num_hidden:
            yield f"{'ok':8} {num_hidden} more on the other hosts, see --json"
        severities = [finding.severity for finding in self.findings]
        yield ", ".join(count(severities.count(kind), kind) for kind in ("fault", "warning", "note"))


def _examine_gpus(config: Config | None) -> Answer:
    # A driver that is too old for torch's CUDA still counts its GPUs.
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = ask_driver()
    answer = examine_gpus(driver, num_seen=num_seen, build=torch_build())
    capabilities = [torch.cuda.get_device_capability(i) for i in range(num_seen)] if torch.version.hip is None else []
    wanted = "auto" if config is None else config.model.dtype
    answer.extend(examine_capabilities(capabilities, dtype=wanted))
    if config is not None:
        answer.extend(compare_with_config(driver or (), config.machine, num_seen=num_seen))
    return answer


def _receive(world: World, key: str, limit: timedelta) -> bytes:
    """What another rank shares under ``key``; a RuntimeError where it doesn't within ``limit``."""
    try:
        world.store.wait([key], limit)
    except Exception as error:
        raise RuntimeError(f"no answer within {limit.total_seconds():g} s") from error
    value: bytes = world.store.get(key)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) if not isinstance(error, DistLoraError) else str(error)


def _versions_of(facts: dict[str, Any]) -> dict[str, str | None]:
    return {"Python": facts["python"], **facts["packages"]}


def _gpus_of(facts: dict[str, Any]) -> list[str]:
    return [f"{gpu['name']} (driver {gpu['driver']})" for gpu in facts.get("gpus", {}).get("gpus", ())]


def _links_by_axis(rates: Sequence[AxisRate]) -> dict[str, dict[str, Link]]:
    links: dict[str, dict[str, Link]] = {}
    for rate in rates:
        sizes = tuple(AtSize(*size) for size in rate.by_size)
        links.setdefault(rate.axis, {})[rate.kind] = Link(sizes, rate.latency_s)
    return links


def _slowest_products(ranks: Sequence[Sequence[dict[str, Any]]]) -> tuple[Product, ...]:
    """The rates of the slowest rank, for the sizes that all ranks have measured."""
    by_size: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for products in ranks:
        for product in products:
            size = (product["tokens"], product["width"], product["out"])
            by_size.setdefault(size, []).append(tuple(product["flops_per_s"]))
    return tuple(Product(*size, slowest_of(rates)) for size, rates in by_size.items() if len(rates) == len(ranks))


def _slowest_sizes(ranks: Sequence[Sequence[dict[str, Any]]]) -> tuple[AtSize, ...]:
    """As ``_slowest_products``; a rank skips the largest sizes first."""
    return tuple(
        AtSize(same[0]["num_bytes"], slowest_of(tuple(entry["bytes_per_s"]) for entry in same))
        for same in zip(*ranks, strict=False)
    )


_HOST = "Check what runs on this host: it doesn't report its cores and memory."
_FABRIC = "Check the adapters with ibstat or fi_info: their driver doesn't answer."
_DISK = "The file system doesn't answer in time: set runs_dir to another, or check its server."
_HUB = "Set HF_HUB_OFFLINE=1 if all files are local, so that no run waits for it."
_COMPUTE = "Check what else runs here (top, nvidia-smi), or allow more time: --deadline 300."
_CLOCKS = "See the findings on the network: a node didn't answer through the store."
_JOIN = (
    "Is every node started, with the same address, port and number of processes, and is the port open between them? "
    "See the findings on interfaces; a rank that failed has printed why."
)
_NETWORK = (
    "Ranks that join but can't exchange data use wrong interfaces or have a firewall between them: set "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, open all ports between the nodes; NCCL_DEBUG=INFO shows what NCCL tries."
)
