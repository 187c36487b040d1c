"""What the doctor reports about a host, from made-up facts, and that it ends whatever a step does."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lora.config.schema import Config, MachineSection
from dist_lora.doctor import disk, hub, network, versions
from dist_lora.doctor.clocks import Offset
from dist_lora.doctor.command import Examination, Report, Request
from dist_lora.doctor.compute import MAX_CALLS, calls_of, judge_compute, measure_compute
from dist_lora.doctor.disk import examine_disk
from dist_lora.doctor.findings import Answer, Examiner, Finding, merge_hosts, worst
from dist_lora.doctor.links import AxisRate, PairRate
from dist_lora.doctor.machine import (
    GpuFacts,
    HostFacts,
    ask_driver,
    compare_gpus,
    compare_with_config,
    examine_capabilities,
    examine_gpus,
    examine_host,
    read_host,
)
from dist_lora.doctor.network import examine_names, judge_clocks, judge_links
from dist_lora.doctor.versions import TESTED, compare_nodes, examine_compiled, examine_versions
from dist_lora.plan.measured import read_measured
from dist_lora.world.launcher import LaunchedRank
from tests import ROOT
from tests.e2e.fake_hub import Hub, serving

GIB = 2**30


def texts(answer: Answer, severity: str) -> list[str]:
    """The texts of one severity; each finding that is wrong says what to do."""
    assert all(each.todo for each in answer.findings if each.severity in ("warning", "fault"))
    return [each.text for each in answer.findings if each.severity == severity]


# Versions


def test_the_tested_versions_are_those_of_the_constraints_file() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    by_name = {name.lower().replace("-", "_"): version for name, version in pinned.items()}
    assert {name: by_name[name.lower()] for name in TESTED} == TESTED


def test_every_package_that_is_required_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert required <= set(TESTED)
    assert f">={versions.TESTED_PYTHON}" == project["requires-python"]


def test_the_tested_versions_are_ok_with_any_build() -> None:
    answer = examine_versions(lambda name: TESTED[name] + ("+cu128" if name == "torch" else ""))
    assert texts(answer, "warning") == texts(answer, "fault") == []
    assert texts(answer, "ok")[0].endswith("as tested together")


def test_older_other_and_missing_packages_are_reported_with_the_command_that_helps() -> None:
    found = {**TESTED, "transformers": "4.57.1", "accelerate": "1.16.0", "deepspeed": None, "peft": None}
    answer = examine_versions(found.get)
    assert texts(answer, "warning") == ["older than tested: transformers 4.57.1 (tested: 5.23.0)"]
    assert texts(answer, "note") == ["not as tested: accelerate 1.16.0 (tested: 1.15.0)"]
    assert texts(answer, "fault") == ["not installed: deepspeed"]
    assert [each.todo for each in answer.findings if each.severity == "fault"] == [
        "Install what is missing: pip install deepspeed==0.19.8"
    ]


@pytest.mark.parametrize("keeps", [True, False])
def test_packages_that_are_compiled_anew_in_each_process_are_told(monkeypatch, tmp_path, keeps) -> None:
    package = tmp_path / "packages" / "compiled_or_not"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(sys, "dont_write_bytecode", not keeps)
    importlib.import_module(package.name)
    monkeypatch.setitem(sys.modules, package.name, sys.modules.pop(package.name))  # gone when the test is over
    answer = examine_compiled(package.name)
    if keeps:
        assert answer.findings == []
        return
    assert len(texts(answer, "warning")) == 1
    assert "compiles compiled_or_not and what else it imports anew" in texts(answer, "warning")[0]
    assert texts(answer, "warning")[0].endswith("isn't there, and PYTHONDONTWRITEBYTECODE is set")
    subprocess.run(answer.findings[0].todo.partition(": ")[2].replace("python", sys.executable, 1).split(), check=True)
    assert examine_compiled(package.name).findings == []


def test_nodes_with_different_versions_are_named() -> None:
    same = {"torch": "2.13.0", "Python": "3.11.7"}
    assert compare_nodes({"a": same, "b": same}).findings == []
    answer = compare_nodes({"a": same, "b": {**same, "torch": "2.14.0"}, "c": same})
    assert texts(answer, "fault") == ["nodes have different versions of torch: 2.13.0 on a, c; 2.14.0 on b"]


# The host


def host(**changed: float | None) -> HostFacts:
    values = {"cores": 8, "usable_cores": 8, "total_bytes": 64 * GIB, "available_bytes": 60 * GIB, "limit_bytes": None,
              "shm_bytes": 32 * GIB}  # fmt: skip
    return HostFacts(**{**values, **changed})  # type: ignore[arg-type]


def test_a_host_with_enough_of_everything_is_ok() -> None:
    answer = examine_host(host(), ranks=8)
    assert {each.severity for each in answer.findings} == {"ok"}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"usable_cores": 1.5}, "8 ranks share 1.5 cores"),
        (
            {"available_bytes": 31 * GIB},
            "31.00 GiB are available to 8 ranks, and each needs 4.00 GiB to load",
        ),
        ({"limit_bytes": 16 * GIB}, "16.00 GiB are available to 8 ranks"),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm has 0.06 GiB, and the ranks of a node may pass data through it"),
    ],
    ids=str,
)
def test_too_little_of_one_thing_is_a_warning(changed: dict[str, float], words: str) -> None:
    (text,) = texts(examine_host(host(**changed), ranks=8), "warning")
    assert text.startswith(words)


def test_a_quota_of_the_control_group_counts_as_cores(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert read_host(tmp_path).usable_cores == 0.5
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert read_host(tmp_path).usable_cores == len(os.sched_getaffinity(0))


# GPUs

BUILD = {"torch": "2.13.0+cu128", "cuda": "12.8", "nccl": "2.27.5"}
SMI = """#!/bin/sh
test "$1" = --query-gpu=index,name,driver_version,memory.total,memory.free || exit 9
echo "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 81000"
echo "1, NVIDIA A100-SXM4-40GB, 570.86.15, 40960, 30000"
"""


def test_the_drivers_table_is_read(tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(SMI)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    found = ask_driver([str(script)])
    assert found == [
        GpuFacts(0, "NVIDIA H100 80GB HBM3", "570.86.15", 81559 * 2**20, 81000 * 2**20),
        GpuFacts(1, "NVIDIA A100-SXM4-40GB", "570.86.15", 40960 * 2**20, 30000 * 2**20),
    ]
    assert ask_driver([str(tmp_path / "none")]) is None
    assert ask_driver(["sleep", "100"], timeout_s=0.1) is None


def gpu(index: int, name: str = "H100", taken: int = 0) -> GpuFacts:
    return GpuFacts(index, name, "570.86", 80 * GIB, 80 * GIB - taken)


def test_gpus_of_one_kind_that_nobody_uses_are_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = examine_gpus([gpu(0), gpu(1)], num_seen=2, build=BUILD)
    assert {each.severity for each in answer.findings} == {"ok"}
    assert "torch sees 2 of 2 (torch 2.13.0+cu128, CUDA 12.8, NCCL 2.27.5)" in texts(answer, "ok")


def test_unlike_used_and_unseen_gpus_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    unlike = texts(examine_gpus([gpu(0), gpu(1, "A100")], num_seen=2, build=BUILD), "warning")
    assert unlike == ["of different types: A100 of 80.00 GiB, H100 of 80.00 GiB"]
    taken = texts(examine_gpus([gpu(0), gpu(1, taken=7 * GIB)], num_seen=2, build=BUILD), "warning")
    assert taken == ["7.00 GiB of GPU 1 are already in use"]
    lost = texts(examine_gpus([gpu(0), gpu(1)], num_seen=1, build=BUILD), "warning")
    assert lost == ["the driver reports 2 GPUs but torch sees 1"]
    no_cuda = {"torch": "2.13.0+cpu", "cuda": None, "nccl": None}
    (unseen,) = texts(examine_gpus([gpu(0)], num_seen=0, build=no_cuda), "fault")
    assert unseen.startswith("the driver reports 1 GPU but torch sees none: torch 2.13.0+cpu, CUDA -")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (hidden,) = texts(examine_gpus([gpu(0)], num_seen=0, build=BUILD), "fault")
    assert hidden.endswith("CUDA_VISIBLE_DEVICES is ''")


def test_gpus_without_bf16_are_a_fault_only_where_it_is_asked_for() -> None:
    assert examine_capabilities([(8, 0), (9, 0)], dtype="bf16").findings == []
    (text,) = texts(examine_capabilities([(7, 5), (8, 6)], dtype="bf16"), "fault")
    assert text == "1 GPU is of compute capability 7.5: no bf16, which model.dtype asks for"
    assert texts(examine_capabilities([(7, 0), (7, 0)], dtype="auto"), "note") == [
        "2 GPUs are of compute capability 7.0: no bf16; runs compute in fp32"
    ]


def test_nodes_with_different_gpus_are_named() -> None:
    assert compare_gpus({"a": ["H100"], "b": ["H100"]}).findings == []
    (text,) = texts(compare_gpus({"a": ["H100", "H100"], "b": ["A100"]}), "warning")
    assert text == "nodes have different GPUs or drivers: H100, H100 on a; A100 on b"


# The disk


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MOST_BYTES", 2**23)
    answer = examine_disk(tmp_path / "runs" / "not there yet")
    assert answer.facts["free_bytes"] > 0 and answer.facts["write_bytes_per_s"] > 0
    assert answer.facts["rename"] is True and answer.facts["flock"] is True
    assert texts(answer, "fault") == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_and_slow_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MOST_BYTES", 2**22)
    monkeypatch.setattr(disk, "LEAST_FREE_BYTES", 2**60)
    monkeypatch.setattr(disk, "SLOW_BYTES_PER_S", 1e15)
    free, slow = texts(examine_disk(tmp_path), "warning")
    assert free.endswith(f"are free in {tmp_path}") and slow.startswith(f"{tmp_path} writes ")


def test_a_disk_without_locks_or_renaming_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MOST_BYTES", 2**22)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as on a file system that says yes to everybody
    assert texts(examine_disk(tmp_path), "fault") == [f"flock in {tmp_path} grants the same lock twice"]

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    rename, lock = texts(examine_disk(tmp_path), "fault")
    assert rename.startswith("a folder or file can't be renamed in ") and "Function not implemented" in rename
    assert lock == f"flock doesn't work in {tmp_path}: Function not implemented"


def test_a_folder_that_cant_be_written_is_a_fault() -> None:
    assert texts(examine_disk(Path("/proc/runs")), "fault")[0].startswith("/proc can't be written: ")


# Names and addresses

UP = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}


@pytest.mark.parametrize(
    "variable, value, is_there",
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),  # gloo wants the whole name
        ("GLOO_SOCKET_IFNAME", "eth1,ib0", True),
        ("NCCL_SOCKET_IFNAME", "eth", True),  # NCCL a beginning
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "enp", False),
    ],
)
def test_an_interface_that_is_not_there_is_a_fault(variable: str, value: str, is_there: bool) -> None:
    answer = examine_names({variable: value}, up=UP, num_nodes=1, host="a")
    expected = f"{variable} is {value}, but the interfaces that are up here are lo, eth0, ib0"
    assert texts(answer, "fault") == ([] if is_there else [expected])


def test_names_that_lead_home_are_faults_where_there_are_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"a": {"127.0.1.1"}, "b": {"10.0.0.2"}, "localhost": {"127.0.0.1", "::1"}}
    monkeypatch.setattr(network, "_addresses_of", lambda name: known.get(name, set()))
    home = {"MASTER_ADDR": "localhost"}
    assert texts(examine_names(home, up=UP, num_nodes=1, host="a"), "fault") == []
    loopback, master = texts(examine_names(home, up=UP, num_nodes=2, host="a"), "fault")
    assert (
        loopback == "the hostname a resolves to 127.0.1.1, a loopback address, and other nodes connect to its address"
    )
    assert master == "MASTER_ADDR is localhost, a loopback address, and there are 2 nodes"
    assert texts(examine_names({"MASTER_ADDR": "nowhere"}, up=UP, num_nodes=2, host="b"), "fault") == [
        "MASTER_ADDR is nowhere, which doesn't resolve here"
    ]
    named = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "b"}
    assert texts(examine_names(named, up=UP, num_nodes=2, host="a"), "fault") == []
    assert texts(examine_names({"MASTER_ADDR": "b"}, up=UP, num_nodes=2, host="b"), "ok") != []


# The hub


def config_for(model: str) -> Config:
    return Config.model_validate({"run": "it", "model": {"name": model}, "data": {"train": "x.jsonl"}})


def test_a_hub_that_answers_is_ok_and_one_that_does_not_is_reported(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Hub({})) as there:
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        assert texts(hub.examine_hub({}, None), "ok") == [f"{there.url} answers"]
        assert len(there.requests) == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    (gone,) = texts(hub.examine_hub({}, None, timeout_s=2), "warning")
    assert gone.startswith("http://127.0.0.1:9 can't be reached (")
    (needed,) = texts(hub.examine_hub({}, config_for("nobody/nothing"), timeout_s=2), "fault")
    assert needed.endswith("; nobody/nothing isn't complete in the cache")


def test_offline_is_a_fault_only_where_files_are_missing(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert texts(hub.examine_hub({}, config_for(str(tiny_llama()))), "fault") == []
    (lacking,) = texts(hub.examine_hub({}, config_for("3.1-8b")), "fault")
    assert lacking.startswith("not contacted, since HF_HUB_OFFLINE is set; meta-llama/")


def test_a_model_that_is_whole_in_the_cache_needs_no_hub(tiny_llama, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tiny_llama()))
    assert texts(hub.examine_hub({}, config_for("some/one")), "ok") == ["not contacted, since HF_HUB_OFFLINE is set"]
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert len(texts(hub.examine_hub({}, config_for("some/one")), "fault")) == 1


# Judgements over ranks


def test_a_clock_is_wrong_only_beyond_doubt() -> None:
    assert texts(judge_clocks([Offset("b", 0.4, 0.01), Offset("c", -1.2, 0.5)]), "warning") == []
    (text,) = texts(judge_clocks([Offset("b", -61.0, 0.01)]), "warning")
    assert text == "the clock of b is 61.0 s behind the first node's"


def pair(sender: int, rate: float) -> PairRate:
    return PairRate("between nodes", sender, sender + 1, f"h{sender}", f"h{sender + 1}", rate)


def test_the_slowest_link_is_named_and_one_far_below_the_others_is_a_warning() -> None:
    even = judge_links([], [pair(0, 2e9), pair(1, 1.5e9), pair(2, 2e9)], has_gpus=False)
    assert texts(even, "warning") == []
    assert texts(even, "ok")[0].startswith(
        "the slowest link between nodes is from rank 1 on h1 to rank 2 on h2: 1.5 GB/s"
    )
    uneven = judge_links([], [pair(0, 2e9), pair(1, 0.1e9), pair(2, 2e9)], has_gpus=False)
    (text,) = texts(uneven, "warning")
    assert text == "the slowest link between nodes is from rank 1 on h1 to rank 2 on h2: 0.1 GB/s; the others reach 2"


def test_a_network_far_slower_than_a_node_has_its_advice() -> None:
    rates = [
        AxisRate("all-gather", axis, 2, (rate / 2, rate), 1e-5, ())  # type: ignore[arg-type]
        for axis, rate in (("within a node", 100e9), ("between nodes", 5e9))
    ]
    assert texts(judge_links(rates, [], has_gpus=True), "note") == [
        "all-gather is 20 times as fast within a node as between nodes"
    ]
    slow = [AxisRate("all-gather", "within a node", 2, (0.5e9, 1e9), 1e-5, ())]
    assert texts(judge_links(slow, [], has_gpus=True), "warning") != []
    assert texts(judge_links(slow, [], has_gpus=False), "warning") == []


def test_a_rank_that_computes_far_slower_is_named() -> None:
    def facts(rate: float) -> dict[str, object]:
        return {"device": "d", "products": [{"flops_per_s": [rate / 2, rate]}], "elementwise": [{"bytes_per_s": [1, 2e9]}],
                "dense_weights_per_s": {"nf4": [1, 2], "int8": [1, 2]}}  # fmt: skip

    assert texts(judge_compute([("a", facts(9e12)), ("a", facts(8e12)), ("b", facts(9e12))]), "warning") == []
    (text,) = texts(judge_compute([("a", facts(9e12)), ("a", {}), ("b", facts(9e12)), ("b", facts(3e12))]), "warning")
    assert text == "rank 3 on b reaches 3 TFLOP/s, the others 9"
    assert judge_compute([("a", {})]).findings == []


# Compute


def test_the_rates_of_compute_are_in_order_and_of_all_kinds() -> None:
    found = measure_compute(torch.device("cpu"), torch.float32, budget_s=0.1)
    for each in (*found["products"], *found["attention"]):
        slow, fast = each["flops_per_s"]
        assert 0 < slow <= fast < 1e16
    assert set(found["dense_weights_per_s"]) == {"nf4", "int8"}
    assert 0 < found["call_s"] < 0.1
    json.dumps(found)


# Steps and their end


def test_a_step_that_hangs_or_fails_becomes_a_finding() -> None:
    examiner = Examiner(deadline_s=0.05)
    forever = threading.Event()

    def hang() -> Answer:
        forever.wait()
        return Answer()

    answer = examiner.examine("disk", hang, todo="Look at the disk.")
    assert answer.findings == [
        Finding("warning", "disk", "couldn't be measured: no answer within 0.05 s", "Look at the disk.")
    ]
    assert examiner.is_stuck
    forever.set()

    def fail() -> Answer:
        raise OSError("no such\n  device")

    begun: list[str] = []
    quick = Examiner(deadline_s=20, begin=lambda: begun.append(threading.current_thread().name))
    (finding,) = quick.examine("disk", fail, todo="Look.").findings
    assert finding.text == "couldn't be measured: OSError: no such device" and not quick.is_stuck
    assert begun == ["doctor-disk"]


def test_equal_findings_of_hosts_are_one() -> None:
    warning, note = Finding("warning", "disk", "x", "y"), Finding("note", "GPUs", "z")
    merged = merge_hosts([("a", warning), ("a", warning), ("b", note), ("a", note)], num_hosts=2)
    assert merged == [Finding("warning", "disk", "x", "y", ("a",)), note]
    assert worst(merged) == "warning" and worst([]) == "ok"
    assert Answer.from_json(json.loads(json.dumps(Answer(merged, {"k": 1}).to_json()))) == Answer(merged, {"k": 1})


def test_a_machine_that_cant_be_written_is_a_finding_and_all_else_is_reported(tmp_path: Path) -> None:
    examination = Examination(
        LaunchedRank(0, 1, 0, 1), Request(None, tmp_path / "machine.json", as_json=False, deadline_s=5)
    )
    report = Report(examination, [Answer().to_json()])
    report.write_machine(tmp_path / "machine.json")
    assert report.findings[-1].text == f"{tmp_path}/machine.json isn't written: not everything was measured"
    device = torch.device("cpu")
    compute = {**measure_compute(device, torch.float32, budget_s=0.1), "device": "CPU", "memory_bytes": GIB}
    report = Report(examination, [Answer(facts={"compute": compute}).to_json()])
    report.write_machine(tmp_path / "none" / "machine.json")
    assert report.findings[-1].severity == "fault" and "can't be written" in report.findings[-1].text
    report.write_machine(tmp_path / "machine.json")
    assert read_measured(tmp_path / "machine.json").memory_bytes == GIB
    assert list(report.lines())[-1] == "1 fault, 0 warnings, 0 notes"


def test_of_what_is_in_order_the_first_hosts_is_shown_and_all_that_is_wrong() -> None:
    examination = Examination(LaunchedRank(0, 3, 0, 1), Request(None, None, as_json=False, deadline_s=5))
    examination.hosts = ["a", "b", "c"]

    def answer(host: str, memory: str, *more: Finding) -> dict[str, object]:
        return Answer([Finding("ok", "host memory", memory), Finding("ok", "hub", "same"), *more]).to_json() | {
            "host": host
        }

    answers = [
        answer("a", "64 GiB"),
        answer("b", "32 GiB", Finding("fault", "disk", "bad", "Fix it.")),
        answer("c", "16 GiB"),
    ]
    report = Report(examination, answers)
    assert list(report.lines()) == [
        "3 ranks on a, b, c",
        "ok       host memory: 64 GiB (on a)",
        "ok       hub: same",
        "fault    disk: bad (on b)",
        "         -> Fix it.",
        "ok       2 more on the other hosts, see --json",
        "1 fault, 0 warnings, 0 notes",
    ]
    tree = report.to_json()
    assert tree["severity"] == "fault" and len(tree["findings"]) == 5
    assert [each["hosts"] for each in tree["findings"]][:2] == [["a"], ["a", "b", "c"]]


def test_gpus_that_are_not_those_of_the_config_are_a_warning() -> None:
    driver = [gpu(0, name="NVIDIA H100 80GB HBM3"), gpu(1, name="NVIDIA H100 80GB HBM3")]

    def findings(**section: Any) -> list[tuple[str, str]]:
        answer = compare_with_config(driver, MachineSection(**section), num_seen=2)
        return [(each.severity, each.text) for each in answer.findings]

    assert findings() == []
    assert findings(gpu="h100-80gb", gpus_per_node=2) == [("ok", "the GPUs match the config: 2 x h100-80gb")]
    assert findings(gpu="rtx4090-24gb", gpus_per_node=8) == [
        ("warning", "machine.gpu: the config names rtx4090-24gb, but this host has NVIDIA H100 80GB HBM3 of 80.00 GiB"),
        ("warning", "machine.gpus_per_node: the config names 8, but torch sees 2"),
    ]
    (unknown,) = compare_with_config([], MachineSection(gpu="h100-80gb"), num_seen=8).findings
    assert unknown.severity == "note" and "can't be compared" in unknown.text, "torch sees GPUs without nvidia-smi"
    (only,) = compare_with_config([], MachineSection(gpu="h100-80gb"), num_seen=0).findings
    assert only.severity == "warning" and only.text.endswith("this host has no GPU") and only.todo


def test_short_work_on_a_gpu_is_timed_many_times_in_a_row_and_long_work_once() -> None:
    """A single call is timed with its launch and the wait for its end: 20 to 40 us, more than a thin product takes."""
    assert [calls_of(call_s) for call_s in (1.0, 2e-3, 1.1e-3, 2e-5, 1e-7, 0.0)] == [1, 1, 2, 100, MAX_CALLS, MAX_CALLS]
