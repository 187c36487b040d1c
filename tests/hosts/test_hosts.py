"""Runs over several hosts, whose links are counted and cut."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from dist_lora.config.schema import Config
from dist_lora.herd.shape import read_shape
from dist_lora.layout.memory import setup_of
from dist_lora.layout.storage import FP32
from dist_lora.plan.measured import read_measured
from dist_lora.plan.traffic import received_bytes
from tests.e2e.runs import INJECT, ROOT
from tests.hosts import network
from tests.hosts.network import Hosts, Ranks
from tests.ranks.runs import chats_settings

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(network.lacking()), reason=network.lacking() or "-")]

TIMEOUT_S = 120.0
FROM_STEP = 3  # the steps before it warm up: connections are made, step 1 checks more


@dataclass
class Runs:
    """Runs of one tiny model over some hosts."""

    hosts: Hosts
    folder: Path
    settings: dict[str, Any]
    port: int = 29500

    def config(self, run: str, **sections: Mapping[str, Any]) -> Path:
        tree = self.settings | {"run": run, "runs_dir": str(self.folder / "runs")}
        for name, values in sections.items():
            tree = tree | {name: {**tree.get(name, {}), **values}}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(self, run: str, *, on_each: int = 1, fault: str | None = None, **sections: Mapping[str, Any]) -> Ranks:
        config = self.config(run, **sections)
        noted = self.folder / f"noted-{run}"
        noted.mkdir(exist_ok=True)
        self.port += 1
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{INJECT}:{ROOT}", "NOTED": str(noted)}
        if fault is not None:
            environment["DIST_LORA_FAULT"] = fault
        return Ranks(
            self.hosts,
            [sys.executable, "-m", "dist_lora", "train", config],
            on_each=on_each,
            port=self.port,
            folder=self.folder,
            environment=environment,
        )

    def to_its_end(self, run: str, **given: Any) -> Path:
        with closing(self.start(run, **given)) as ranks:
            codes = ranks.wait(TIMEOUT_S)
            assert set(codes) == {0}, "\n".join(ranks.told())
        return self.folder / "runs" / run

    def sent_a_step(self, run: str, world_rank: int) -> float:
        """Bytes that a rank's host sends in a step, by its interface's own counter."""
        lines = (self.folder / f"noted-{run}" / f"rank-{world_rank}").read_text().splitlines()
        counts = {int(step): int(num_bytes) for step, num_bytes, _ in map(str.split, lines)}
        return median(counts[step + 1] - counts[step] for step in sorted(counts)[FROM_STEP:-1])


def runs_on(number: int, tiny_llama: Any, folder: Path) -> Iterator[Runs]:
    settings = chats_settings(tiny_llama("llama31", num_layers=4, ffn=2048), folder, num_steps=9)
    settings["lora"] = {"rank": 64}
    settings["train"] |= {"global_batch": 4, "micro_batch": 4}
    settings["checkpoint"] = {"every": 100}
    with closing(Hosts(number)) as hosts:
        yield Runs(hosts, folder, settings)


@pytest.fixture(scope="module")
def two(tiny_llama, tmp_path_factory) -> Iterator[Runs]:
    yield from runs_on(2, tiny_llama, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tiny_llama, tmp_path_factory) -> Iterator[Runs]:
    yield from runs_on(4, tiny_llama, tmp_path_factory.mktemp("four"))


def planned(runs: Runs, run: str, *, on_each: int) -> tuple[float, int]:
    """Bytes a step that a rank receives from other hosts by the plan, and of all adapters' gradients."""
    config = Config.model_validate(yaml.safe_load((runs.folder / f"{run}.yaml").read_text()))
    setup = setup_of(
        config,
        read_shape(Path(config.model.name)),
        num_nodes=runs.hosts.number,
        gpus_per_node=on_each,
        device_bytes=2**34,
        on_gpu=False,
    )
    return received_bytes(setup)[1], FP32 * setup.trained_weights


@pytest.mark.turn(of=5, among="clusters")
@pytest.mark.parametrize(
    ("number", "on_each", "base_shard", "quant"),
    [(2, 1, "node", "none"), (2, 1, "node", "nf4"), (2, 1, "world", "none"), (2, 1, "world", "nf4"),
     (4, 1, "node", "none"), (4, 1, "world", "nf4"), (2, 2, "node", "nf4"), (2, 2, "world", "none"),
     (2, 2, "gpu", "nf4")],
)  # fmt: skip
def test_what_crosses_between_hosts_is_what_was_planned(
    request: pytest.FixtureRequest, number: int, on_each: int, base_shard: str, quant: str
) -> None:
    """With the base in each node it is the adapters' gradients, once around a ring, and next to nothing else."""
    runs: Runs = request.getfixturevalue({2: "two", 4: "four"}[number])
    run = f"{base_shard}-{quant}-{on_each}"
    runs.to_its_end(
        run,
        on_each=on_each,
        fault="bytes_of_the_network_told",
        parallel={"base_shard": base_shard},
        model={"quant": quant},
    )
    by_plan, gradients = planned(runs, run, on_each=on_each)
    sent = [runs.sent_a_step(run, host * on_each) for host in range(number)]
    assert sent == pytest.approx([on_each * by_plan] * number, rel=0.05)
    if base_shard != "world":
        world_size = number * on_each
        assert max(sent) <= 1.05 * gradients * 2 * (world_size - 1) / world_size


@pytest.mark.turn(of=5, among="clusters")
def test_a_cut_link_ends_all_ranks_and_the_run_goes_on_when_it_is_back(two: Runs) -> None:
    """Each host tells once of the other, soon after ``hang_timeout``: neither hears what the other one says."""
    settings = {
        "parallel": {"hang_timeout": 8.0, "base_shard": "world"},
        "train": {"steps": 60},
        "checkpoint": {"every": 5},
    }
    whole = two.to_its_end("whole", **settings)
    metrics = two.folder / "runs" / "cut" / "metrics.jsonl"
    with closing(two.start("cut", **settings)) as ranks:
        deadline = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
            assert time.monotonic() < deadline, ranks.told()
            time.sleep(0.02)
        two.hosts.cut(1)
        codes = ranks.wait(60)
        two.hosts.mend(1)
    first, second = ranks.told()
    assert codes == [1, 1], (first, second)
    assert first.count("error:") == second.count("error:") == 1, (first, second)
    assert re.search(r"error: rank 1 of 2 on a1 doesn't respond", first)
    assert re.search(
        r"error: rank 1 of 2 on a1 \(in: step \d+.*has had no answer from the store at 10\.77\.0\.1:\d+ for \d+ s",
        second,
    )
    assert len(metrics.read_text().splitlines()) < 60
    two.to_its_end("cut", **settings)
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (metrics.parent / adapter).read_bytes() == (whole / adapter).read_bytes()


@pytest.mark.turn(of=5, among="clusters")
def test_a_lost_host_leaves_a_run_that_goes_on_with_fewer(two: Runs) -> None:
    """``launch/torchrun.sh`` with one host or two: the other is switched off in mid-step; the losses stay the same."""
    small = {
        "train": {"steps": 200},
        "lora": {"rank": 2},
        "optim": {"lr": 1e-4},  # small, so that the last bits of another order of adding don't grow over 200 steps
        "checkpoint": {"every": 10},
        "parallel": {"hang_timeout": 10.0},
    }
    whole = two.to_its_end("elastic-whole", **small)
    config = two.config("elastic", **small)
    metrics = two.folder / "runs" / "elastic" / "metrics.jsonl"
    files = [two.folder / f"torchrun-{host}" for host in range(2)]
    agents = []
    try:
        for host in range(2):
            place = {"NNODES": "1:2", "HEAD": f"{two.hosts.address(0)}:29400", "NPROC": "1", "LOCAL_ADDR": two.hosts.address(host),
                     "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "JOIN_TIMEOUT": "60"}  # fmt: skip
            command = ["bash", ROOT / "launch" / "torchrun.sh", config]
            agents.append(two.hosts.start(host, command, environment=place, told=files[host]))
        deadline = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 25:
            assert time.monotonic() < deadline, [file.read_text() for file in files]
            time.sleep(0.02)
        two.hosts.power_off(1)
        code = agents[0].wait(TIMEOUT_S)
    finally:
        two.hosts.mend(1)
        for agent in agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()
    told = files[0].read_text()
    assert code == 0, told
    assert ": 2 ranks x micro_batch" in told and ": 1 rank x micro_batch" in told, told
    ours, theirs = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (metrics.parent, whole)
    )
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.skipif(
    any(shutil.which(name, path="/usr/sbin:/usr/bin:/bin") is None for name in ("sshd", "ssh-keygen", "pdsh")),
    reason="no sshd or pdsh on this machine (Debian: apt-get install openssh-server pdsh)",
)
@pytest.mark.turn(of=5, among="clusters")
def test_deepspeeds_launcher_starts_all_hosts_by_ssh(two: Runs) -> None:
    """``launch/deepspeed.sh`` with a hostfile, on the first host: it is stopped by a file STOP, and goes on by itself."""
    settings = {"train": {"steps": 30}, "parallel": {"engine": "zero3"}}
    whole = two.to_its_end("ssh-whole", **settings)
    config = two.config("ssh", **settings)
    home = two.folder / "home"
    home.mkdir()
    (home / "hostfile").write_text("a0 slots=1\na1 slots=1\n")
    (home / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    daemons, by_ssh = two.hosts.allow_ssh()
    place = {**by_ssh, "HOME": str(home), "HOSTFILE": str(home / "hostfile"), "PYTHON": sys.executable}
    run, told = two.folder / "runs" / "ssh", two.folder / "told-ssh"

    def start() -> subprocess.Popen[bytes]:
        return two.hosts.start(0, ["bash", ROOT / "launch" / "deepspeed.sh", config], environment=place, told=told)

    try:
        first = start()
        deadline = time.monotonic() + TIMEOUT_S
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
            assert time.monotonic() < deadline and first.poll() is None, told.read_text()
            time.sleep(0.02)
        (run / "STOP").touch()
        assert first.wait(TIMEOUT_S) == 75, told.read_text()
        assert len((run / "metrics.jsonl").read_text().splitlines()) < 30
        assert start().wait(TIMEOUT_S) == 0, told.read_text()
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (run / adapter).read_bytes() == (whole / adapter).read_bytes()


@pytest.mark.turn(of=5, among="clusters")
def test_doctor_names_the_slow_host_and_measures_each_axis(four: Runs) -> None:
    """Two ranks on each of four hosts, one of which has a link of 200 Mbit/s."""
    machine = four.folder / "machine.json"
    four.hosts.slow(2, "200mbit")
    four.port += 1
    try:
        command = [sys.executable, "-m", "dist_lora", "doctor", "--deadline", 120, "--json", "--out", machine]
        ranks = Ranks(
            four.hosts, command, on_each=2, port=four.port, folder=four.folder, environment={"HF_HUB_OFFLINE": "1"}
        )
        with closing(ranks):
            codes = ranks.wait(TIMEOUT_S)
            assert codes == [0] * 8, "\n".join(ranks.told())
    finally:
        four.hosts.fast(2)
    told = json.loads(ranks.files[0].read_text().splitlines()[-1])  # above it stand torch's own warnings
    assert told["hosts"] == ["a0", "a1", "a2", "a3"] and told["ranks"] == 8
    assert [(each["kind"], each["axis"], each["num_ranks"]) for each in told["facts"]["axes"]] == [
        (kind, axis, size)
        for axis, size in (("within a node", 2), ("between nodes", 4), ("over all ranks", 8))
        for kind in ("all-gather", "all-reduce")
    ]
    warned = [each["text"] for each in told["findings"] if each["severity"] == "warning" and each["about"] == "network"]
    assert len(warned) == 1 and re.search(
        r"slowest link between nodes is from rank . on a\d to rank . on a\d", warned[0]
    )
    assert "on a2" in warned[0]
    clocks = [each for each in told["findings"] if each["about"] == "clocks"]
    assert [each["severity"] for each in clocks] == ["ok"]
    links = read_measured(machine).links
    assert set(links) == {"within a node", "between nodes", "over all ranks"}
    # No faster than the link that is limited: of what a ring sends over it, in both directions at once.
    assert max(each.bytes_per_s[1] for each in links["between nodes"]["all-gather"].by_size) < 1.5 * 200e6 / 8
