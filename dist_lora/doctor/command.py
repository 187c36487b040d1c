"""The work behind ``dist-lora doctor``: every rank looks at itself and its links, the first puts it together and tells."""

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
from dist_lora.doctor.findings import Answer, Examiner, Finding, merge_hosts, worst
from dist_lora.doctor.hub import examine_hub
from dist_lora.doctor.links import AxisRate, measure_links
from dist_lora.doctor.machine import (
    ask_driver,
    compare_gpus,
    compare_with_config,
    examine_gpus,
    examine_host,
    read_host,
    torch_build,
)
from dist_lora.doctor.network import examine_names, interfaces, judge_clocks, judge_links
from dist_lora.doctor.versions import compare_nodes, examine_versions
from dist_lora.engines.precision import TORCH_TYPES
from dist_lora.errors import EXIT_DONE, EXIT_FAILED, DistLoraError, SaveError
from dist_lora.layout.choices import choose_dtype
from dist_lora.plan.measured import AtSize, Link, Measured, Product, slowest_of, write_measured
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, default_device, join

LEAVE_S = 5.0  # how long the first rank, in which the store may live, waits for the others to hear the end
EARLIER_S = 0.8  # of a deadline: what a wait on another rank gets, so that it ends before the step that waits


@dataclass(frozen=True)
class Wishes:
    """What a user asks for: ``config`` is a run to look at, ``deadline_s`` what a step may take at most."""

    config: Config | None
    out: Path | None
    as_json: bool
    deadline_s: float

    @property
    def runs_dir(self) -> Path:
        """The folder of the runs, or the one where they would be."""
        return Path("runs") if self.config is None else self.config.runs_dir

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type that a run would be computed in."""
        wanted = "auto" if self.config is None else self.config.model.dtype
        return TORCH_TYPES[choose_dtype(wanted, on_gpu=device.type == "cuda")[0]]


def diagnose(launched: LaunchedRank | None, wishes: Wishes) -> int:
    """Look at everything, as one rank of ``launched``'s world or alone; the first rank prints. Returns the exit code.

    Never hangs: a step that does becomes a finding, and the process ends without it.
    """
    launched = launched or LaunchedRank(0, 1, 0, 1)
    patient = Patient(launched, wishes)
    patient.look_at_host()
    patient.meet()
    patient.measure()
    code = patient.finish()
    sys.stdout.flush()
    sys.stderr.flush()
    if patient.examiner.is_stuck:
        os._exit(code)
    if patient.world is not None:
        patient.world.leave()
    return code


class Patient:
    """One rank's view of itself and its world; the methods are called in the order in which they stand."""

    def __init__(self, launched: LaunchedRank, wishes: Wishes) -> None:
        self.launched, self.wishes = launched, wishes
        self.host = socket.gethostname()
        self.own = Answer()  # of this rank or host
        self.shared = Answer()  # of all ranks together: the first rank's alone
        self.links: list[AxisRate] = []
        self.world: World | None = None
        self.hosts: list[str] = [self.host]
        self.device = default_device(launched.local_rank)
        self.examiner = Examiner(wishes.deadline_s, begin=self._take_device)
        config = wishes.config
        self.local_size = (config.parallel.node_size if config else None) or launched.local_size
        self.is_first_of_host = launched.world_rank % self.local_size == 0

    def _take_device(self) -> None:
        """Each thread has a current GPU of its own, and begins with the first."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def look_at_host(self) -> None:
        """What needs no other rank: one of each host looks at it, every rank at its own names."""
        look = self.examiner.examine
        launched = self.launched
        if self.is_first_of_host:
            self.own.take(look("versions", examine_versions, todo="Start from a whole environment."))
            self._take("host", look("host", lambda: examine_host(read_host(), ranks=self.local_size), todo=_HOST))
            self._take(
                "gpus",
                look(
                    "GPUs",
                    lambda: _look_at_gpus(self.wishes.config),
                    todo="Run nvidia-smi: if it hangs too, restart the node.",
                ),
            )
            self._take("disk", look("disk", lambda: examine_disk(self.wishes.runs_dir), todo=_DISK))
        num_nodes = launched.world_size // self.local_size
        names = look(
            "interfaces",
            lambda: examine_names(os.environ, there=interfaces(), num_nodes=num_nodes, host=self.host),
            todo="The name service gives no answer: give addresses in place of names.",
        )
        self._take("names", names)
        if launched.world_rank == 0:
            self._take("hub", look("hub", lambda: examine_hub(os.environ, self.wishes.config), todo=_HUB))

    def _take(self, name: str, answer: Answer) -> None:
        """Findings as they are, facts under a name of their own."""
        self.own.findings += answer.findings
        self.own.facts[name] = answer.facts

    def meet(self) -> None:
        """Join the others, and learn on which host each is."""
        launched, deadline_s = self.launched, self.wishes.deadline_s
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
            self.hosts = [_hear(world, f"doctor/host/{rank}", limit).decode() for rank in range(launched.world_size)]
            self.world = world
            return Answer()

        self.own.take(self.examiner.examine("the ranks' meeting", step, todo=_JOIN, severity="fault"))

    def measure(self) -> None:
        """Compute on all ranks at once, then clocks and links."""
        dtype, deadline_s = self.wishes.dtype(self.device), self.wishes.deadline_s
        if self.world is not None:
            self._together("compute/begin")
        compute = self.examiner.examine(
            "compute", lambda: examine_compute(self.device, dtype, budget_s=deadline_s / 3), todo=_COMPUTE
        )
        self._take("compute", compute)
        self.own.facts["compute"] |= {
            "device": name_of(self.device),
            "memory_bytes": memory_of_device(self.device, ranks=self.local_size),
        }
        world = self.world
        if world is None:
            return
        if world.num_nodes > 1 and self._together("clocks/begin"):
            clocks = self.examiner.examine(
                "clocks", lambda: judge_clocks(clock_offsets(world, within_s=EARLIER_S * deadline_s)), todo=_CLOCKS
            )
            self.shared.take(clocks)
        if self._together("links/begin"):
            self.shared.take(self.examiner.examine("network", self._links, todo=_NETWORK, severity="fault"))

    def _links(self) -> Answer:
        assert self.world is not None
        rates, pairs = measure_links(self.world, hosts=self.hosts)
        self.links = rates
        return judge_links(rates, pairs, has_gpus=self.device.type == "cuda")

    def _together(self, key: str) -> bool:
        """Wait until every rank is here; False, with a finding, where one doesn't come."""
        world = self.world
        assert world is not None
        try:
            world.share(f"doctor/{key}/{world.world_rank}", b"1")
            limit = timedelta(seconds=2 * self.wishes.deadline_s)
            for rank in range(world.world_size):
                _hear(world, f"doctor/{key}/{rank}", limit)
        except RuntimeError as error:
            self.own.add("fault", "network", f"{key.partition('/')[0]}: {_words(error)}", _JOIN)
            return False
        return True

    def finish(self) -> int:
        """The first rank hears the others, writes and prints; the others hear how it ended. Returns the exit code."""
        world = self.world
        if world is None:
            if self.launched.world_rank > 0:
                self._tell_alone()
                return EXIT_FAILED
            return self._conclude([self.own.to_json()])
        if world.is_first:
            told = [self.own.to_json(), *self._hear_others(world)]
            code = self._conclude(told)
            world.share("doctor/code", str(code).encode())
            self._see_others_off(world)
            return code
        try:
            answer = json.dumps(self.own.to_json() | {"host": self.host})
            world.share(f"doctor/answer/{world.world_rank}", answer.encode())
            code = int(_hear(world, "doctor/code", timedelta(seconds=2 * self.wishes.deadline_s)))
            world.share(f"doctor/left/{world.world_rank}", b"1")
            return code
        except RuntimeError:  # the store is gone, and with it the first rank
            return EXIT_FAILED

    def _tell_alone(self) -> None:
        """What is wrong here, from a rank that found no way to the first: it may be the reason."""
        who = f"rank {self.launched.world_rank} of {self.launched.world_size} on {self.host}"
        lines = [
            f"{each.severity:8} {who}: {each.about}: {each.text}\n{'':8} -> {each.todo}"
            for each in self.own.findings
            if each.severity in ("fault", "warning")
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _hear_others(self, world: World) -> Iterator[dict[str, Any]]:
        limit = timedelta(seconds=self.wishes.deadline_s)
        for rank in range(1, world.world_size):
            try:
                yield json.loads(_hear(world, f"doctor/answer/{rank}", limit))
            except RuntimeError as error:
                self.shared.add("fault", "network", f"rank {rank} on {self.hosts[rank]}: {_words(error)}", _JOIN)
                limit = timedelta(seconds=1)

    def _see_others_off(self, world: World) -> None:
        deadline = time.monotonic() + LEAVE_S
        for rank in range(1, world.world_size):
            with contextlib.suppress(RuntimeError):
                _hear(world, f"doctor/left/{rank}", timedelta(seconds=max(0.01, deadline - time.monotonic())))

    def _conclude(self, told: Sequence[dict[str, Any]]) -> int:
        """Put all answers together, write and print them; the exit code."""
        report = Report(self, told)
        if self.wishes.out is not None:
            report.keep(self.wishes.out)
        print(json.dumps(report.to_json()) if self.wishes.as_json else "\n".join(report.lines()), flush=True)
        return EXIT_FAILED if worst(report.findings) == "fault" else EXIT_DONE


class Report:
    """All ranks' answers as one."""

    def __init__(self, patient: Patient, told: Sequence[dict[str, Any]]) -> None:
        self.patient = patient
        self.hosts = list(dict.fromkeys(patient.hosts))
        self.ranks = [(each.get("host", patient.host), Answer.of(each)) for each in told]
        self.findings = merge_hosts(
            ((host, finding) for host, answer in self.ranks for finding in answer.findings),
            num_hosts=len(self.hosts),
        )
        # Of each host one rank has looked at the host: GPUs, versions.
        firsts = {host: answer.facts for host, answer in self.ranks if "packages" in answer.facts}
        self.shared = Answer(list(patient.shared.findings), dict(patient.shared.facts))
        if len(firsts) > 1:
            self.shared.take(compare_nodes({h: _versions_of(facts) for h, facts in firsts.items()}))
            self.shared.take(compare_gpus({h: _gpus_of(facts) for h, facts in firsts.items()}))
        self.shared.take(judge_compute([(host, answer.facts.get("compute", {})) for host, answer in self.ranks]))
        self.findings += self.shared.findings

    def keep(self, out: Path) -> None:
        """Write the measured machine to a file; that it can't be is one more finding."""
        measured = self.measured()
        if measured is None:
            why = f"{out} is not written: not all of it was measured"
            self.findings.append(
                Finding("fault", "compute", why, "Mend what is told above, or give more time: --deadline.")
            )
            return
        try:
            write_measured(measured, out)
        except SaveError as error:
            self.findings.append(Finding("fault", "disk", str(error), "Give another file by --out."))

    def measured(self) -> Measured | None:
        """The machine for ``dist-lora plan --measured``; None where a part of it is not known."""
        patient = self.patient
        rates = [answer.facts.get("compute", {}) for _, answer in self.ranks]
        if len(rates) < patient.launched.world_size or not all("products" in each for each in rates):
            return None
        if not patient.links and patient.launched.world_size > 1:
            return None
        is_gpu = patient.device.type == "cuda"
        return Measured(
            device=str(rates[0]["device"]),
            is_gpu=is_gpu,
            dtype="bf16" if patient.wishes.dtype(patient.device) == torch.bfloat16 else "fp32",
            num_nodes=patient.launched.world_size // patient.local_size,
            ranks_per_node=patient.local_size,
            memory_bytes=min(each["memory_bytes"] for each in rates),
            host_bytes=int(psutil.virtual_memory().total),
            products=_slowest_products([each["products"] for each in rates]),
            attention=_slowest_products([each["attention"] for each in rates]),
            dense_weights_per_s={
                name: slowest_of(tuple(each["dense_weights_per_s"][name]) for each in rates)
                for name in rates[0]["dense_weights_per_s"]
            },
            elementwise=_slowest_sizes([each["elementwise"] for each in rates]),
            call_s=max(each["call_s"] for each in rates),
            links=_links_by_axis(patient.links),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as one object."""
        return {
            "severity": worst(self.findings),
            "ranks": self.patient.launched.world_size,
            "hosts": self.hosts,
            "findings": [
                {"severity": each.severity, "about": each.about, "text": each.text, "todo": each.todo,
                 "hosts": list(each.hosts or self.hosts)}
                for each in self.findings
            ],
            "facts": self.shared.facts,
            "facts_of_ranks": [{"rank": i, "host": host, **answer.facts} for i, (host, answer) in enumerate(self.ranks)],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """For the terminal: what was found, in its order, and how many of each kind.

        Of what is in order, and differs from host to host in its numbers, the first host's is shown.
        """
        size = self.patient.launched.world_size
        yield f"{size} rank{'s' if size > 1 else ''} on {', '.join(self.hosts)}"
        left_out = 0
        for each in self.findings:
            if each.severity == "ok" and each.hosts and self.hosts[0] not in each.hosts:
                left_out += 1
                continue
            where = f" (on {', '.join(each.hosts)})" if each.hosts else ""
            yield f"{each.severity:8} {each.about}: {each.text}{where}"
            if each.todo:
                yield f"{'':8} -> {each.todo}"
        if left_out:
            yield f"{'ok':8} {left_out} more of the other hosts, see --json"
        count = {kind: sum(each.severity == kind for each in self.findings) for kind in ("fault", "warning", "note")}
        yield ", ".join(f"{number} {kind}{'s' if number != 1 else ''}" for kind, number in count.items())


def _look_at_gpus(config: Config | None) -> Answer:
    # A driver that is too old for torch's CUDA still counts its GPUs.
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = ask_driver()
    answer = examine_gpus(driver, num_seen=num_seen, build=torch_build())
    if config is not None:
        answer.take(compare_with_config(driver or (), config.machine, num_seen=num_seen))
    return answer


def _hear(world: World, key: str, limit: timedelta) -> bytes:
    """What another rank shares under ``key``; RuntimeError where it doesn't within ``limit``."""
    try:
        world.store.wait([key], limit)
    except Exception as error:
        raise RuntimeError(f"no answer within {limit.total_seconds():g} s") from error
    value: bytes = world.store.get(key)
    return value


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) if not isinstance(error, DistLoraError) else str(error)


def _versions_of(facts: dict[str, Any]) -> dict[str, str | None]:
    return {"Python": facts["python"], **facts["packages"]}


def _gpus_of(facts: dict[str, Any]) -> list[str]:
    return [f"{gpu['name']} (driver {gpu['driver']})" for gpu in facts.get("gpus", {}).get("gpus", ())]


def _links_by_axis(rates: Sequence[AxisRate]) -> dict[str, dict[str, Link]]:
    links: dict[str, dict[str, Link]] = {}
    for each in rates:
        sizes = tuple(AtSize(*size) for size in each.by_size)
        links.setdefault(each.axis, {})[each.kind] = Link(sizes, each.latency_s)
    return links


def _slowest_products(ranks: Sequence[Sequence[dict[str, Any]]]) -> tuple[Product, ...]:
    """Of the sizes that all ranks have measured, what the slowest reached."""
    by_size: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for products in ranks:
        for each in products:
            size = (each["tokens"], each["width"], each["out"])
            by_size.setdefault(size, []).append(tuple(each["flops_per_s"]))
    return tuple(Product(*size, slowest_of(rates)) for size, rates in by_size.items() if len(rates) == len(ranks))


def _slowest_sizes(ranks: Sequence[Sequence[dict[str, Any]]]) -> tuple[AtSize, ...]:
    """As ``_slowest_products``; a rank leaves out the largest sizes first."""
    return tuple(
        AtSize(same[0]["num_bytes"], slowest_of(tuple(each["bytes_per_s"]) for each in same))
        for same in zip(*ranks, strict=False)
    )


_HOST = "Look at what runs on this host: it does not say what it has."
_DISK = "The file system gives no answer in time: set runs_dir to another, or see whether its server is up."
_HUB = "Set HF_HUB_OFFLINE=1 where all lies here, so that no run waits for it."
_COMPUTE = "Look at what else runs here (top, nvidia-smi), or give more time: --deadline 300."
_CLOCKS = "See the network's findings: a node did not answer through the store."
_JOIN = (
    "Is every node started, with the same address, port and number of processes, and is the port open between them? "
    "See the findings on interfaces; a rank that failed has printed why."
)
_NETWORK = (
    "Ranks that meet and then can't exchange data use wrong interfaces or a firewall is between them: set "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, open all ports between the nodes; NCCL_DEBUG=INFO says what NCCL tries."
)
