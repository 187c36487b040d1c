"""`dist-lora doctor` as a user runs it: on one rank, on two, and where a rank is lost."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dist_lora.plan.measured import read_measured
from tests.e2e.runs import Done, Process, run, run_processes, write_config

QUICK = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file of a measured machine, and what was told of it, by two ranks."""
    out = tmp_path_factory.mktemp("doctor") / "machine.json"
    _, done = run_processes([(("doctor", "--nproc", 2, "--json", "--out", out, "--deadline", 20), QUICK)])
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.slow
def test_two_ranks_tell_one_object_with_all_that_was_looked_at(machine) -> None:
    _, told = machine
    assert told["ranks"] == 2 and len(told["hosts"]) == 1 and len(told["facts_of_ranks"]) == 2
    about = {each["about"] for each in told["findings"]}
    assert about >= {"versions", "processors", "host memory", "disk", "hub", "compute", "network"}
    assert all(each["todo"] for each in told["findings"] if each["severity"] in ("warning", "fault"))
    axes = [(each["kind"], each["axis"]) for each in told["facts"]["axes"]]
    assert axes == [("all-gather", "within a node"), ("all-reduce", "within a node")]
    assert {(each["sender"], each["receiver"]) for each in told["facts"]["pairs"]} == {(0, 1), (1, 0)}
    assert told["severity"] != "fault"


@pytest.mark.slow
def test_the_measured_machine_is_what_plan_reads(machine, tmp_path: Path) -> None:
    out, _ = machine
    measured = read_measured(out)
    assert (measured.num_nodes, measured.ranks_per_node, measured.is_gpu, measured.dtype) == (1, 2, False, "fp32")
    assert set(measured.links["within a node"]) == {"all-gather", "all-reduce"}
    config = write_config(tmp_path / "it.yaml", run="it", model={"name": "3.2-1b"}, data={"train": "x"},
                          train={"steps": 3, "sequence_length": 128})  # fmt: skip
    done = run("plan", config, "--measured", out, "--json")
    assert done.returncode == 0, done.stderr
    low, high = json.loads(done.stdout)["step_s"]
    assert 0 < low < high
    other = run("plan", config, "--measured", out, "--gpus-per-node", 4)
    assert other.returncode == 2
    assert (
        f"--measured: {out} was measured on 1 x 2 ranks (nodes x ranks per node), and 1 x 4 were requested"
        in other.stderr
    )


@pytest.mark.turn(of=2, among="whole runs")
def test_a_rank_that_never_comes_is_a_fault_and_all_else_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:
        launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        launcher["DIST_LORA_RENDEZVOUS"] = f"{folder}/rendezvous"
        _, done = run_processes([(("doctor", "--deadline", 3), QUICK | launcher)])
    assert done.returncode == 1
    assert "fault    rendezvous: couldn't be measured: JoinError: 1 of 2 processes joined within" in done.stdout
    assert "missing rank 1" in done.stdout
    assert "-> Is every node started, with the same address, port and number of processes" in done.stdout
    assert "ok       versions: Python" in done.stdout and "ok       disk: " in done.stdout


def two_ranks(fault: str | None = None, **of_second: str) -> list[Done]:
    """Two ranks that nobody sees through, of which rank 1 begins with a function of ``faults.py`` or has other variables."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DIST_LORA_RENDEZVOUS": f"{folder}/rendezvous"}
        with contextlib.ExitStack() as ends:
            ranks = [
                Process("doctor", "--deadline", 4, fault=fault if rank else None,
                        added=QUICK | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (of_second if rank else {}))
                for rank in range(2)
            ]  # fmt: skip
            for rank in ranks:
                ends.callback(rank.close)
            codes = [rank.wait(90) for rank in ranks]
            assert None not in codes, [rank.stderr() for rank in ranks]
            return [Done(code or 0, rank.stdout(), rank.stderr()) for code, rank in zip(codes, ranks, strict=True)]


@pytest.mark.turn(of=2, among="whole runs")
def test_a_rank_that_hangs_in_the_links_ends_the_others_waiting() -> None:
    first, second = two_ranks("hang_in_links")
    assert first.returncode == second.returncode == 1
    assert "fault    network: couldn't be measured: no answer within 4 s" in first.stdout
    assert "ok       versions: Python" in first.stdout


@pytest.mark.turn(of=2)
def test_a_rank_that_is_gone_is_named() -> None:
    first, second = two_ranks("gone_in_links")
    assert (first.returncode, second.returncode) == (1, 9)
    assert "fault    network: couldn't be measured: " in first.stdout
    assert "fault    network: rank 1 on " in first.stdout and "no answer within 4 s" in first.stdout


@pytest.mark.turn(of=2, among="whole runs")
def test_a_rank_that_finds_no_way_to_the_first_tells_itself_what_is_wrong_there() -> None:
    first, second = two_ranks(GLOO_SOCKET_IFNAME="none0")
    assert first.returncode == second.returncode == 1
    assert "fault    rendezvous: couldn't be measured: " in first.stdout
    assert "rank 1 of 2 on " in second.stderr and second.stdout == ""
    assert "interfaces: GLOO_SOCKET_IFNAME is none0, but the interfaces that are up here are " in second.stderr


def test_where_the_measured_would_go_is_checked_first(tmp_path: Path) -> None:
    done = run("doctor", "--out", tmp_path / "no" / "machine.json")
    assert (
        done.returncode == 2
        and "--out: " in done.stderr
        and "Name a file in a folder that can be written" in done.stderr
    )


def test_a_run_whose_folder_cant_be_written_is_a_fault(tmp_path: Path, tiny_llama) -> None:
    config = write_config(
        tmp_path / "it.yaml", run="it", runs_dir="/proc/runs", model={"name": str(tiny_llama())}, data={"train": "x"}
    )
    _, done = run_processes([(("doctor", config, "--deadline", 10), QUICK)])
    assert done.returncode == 1
    assert "fault    disk: /proc can't be written" in done.stdout and "1 fault, " in done.stdout
