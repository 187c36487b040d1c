"""Whoever starts the ranks, on one node or on two, the losses are those of our own start, and so are the exit codes."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.e2e.runs import ROOT, free_port, losses, write_config
from tests.slurm import cluster

LAUNCH = ROOT / "launch"
ENGINES = ("fsdp2", "zero3")
BIN = Path(sys.executable).parent
TIMEOUT_S = 200
AT_ONCE = 2  # runs of two ranks each


class Started(NamedTuple):
    """A command under way, as a shell runs it in a folder with its stdin closed."""

    process: subprocess.Popen[str]

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        try:
            _, told = self.process.communicate(timeout=TIMEOUT_S)
        finally:
            self.process.kill()
        return self.process.returncode, told


def start(*words: object, folder: Path, **added: object) -> Started:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    environment |= {name: str(value) for name, value in added.items()}
    process = subprocess.Popen(
        # A shell can't trap what was ignored as it began, as SIGINT is where the tests run in the background.
        ["env", "--default-signal=INT", "bash", "-c", 'exec "$@" <&-', "bash", *map(str, words)],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return Started(process)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    """A folder with a space in its name: beside ``train me.yaml`` the data lie, and runs/ will."""
    made = tmp_path_factory.mktemp("a folder")
    settings = yaml.safe_load(config.read_text())
    shutil.copy(settings["data"]["train"], made / "the data.jsonl")
    settings |= {"runs_dir": "the runs", "data": {"train": "the data.jsonl", "cache_dir": "cache"}}
    write_config(made / "train me.yaml", **settings)
    (made / "the hosts").write_text("# two of them\nnode-a slots=1\nnode-b slots=1 # the second\n\n")
    return made


def torchrun(folder: Path, *arguments: str) -> list[Started]:
    return [start(LAUNCH / "torchrun.sh", "train me.yaml", *arguments, folder=folder, NPROC=2)]


def torchrun_on_two_nodes(folder: Path, *arguments: str) -> list[Started]:
    told = {"NNODES": 2, "NPROC": 1, "HEAD": f"127.0.0.1:{free_port()}", "JOIN_TIMEOUT": 120}
    return [start(LAUNCH / "torchrun.sh", "train me.yaml", *arguments, folder=folder, **told) for _ in range(2)]


def deepspeed(folder: Path, *arguments: str) -> list[Started]:
    (folder / "one host").write_text("node-a slots=2\n")
    return [start(LAUNCH / "deepspeed.sh", "train me.yaml", *arguments, folder=folder, HOSTFILE="one host")]


def deepspeed_on_two_nodes(folder: Path, *arguments: str) -> list[Started]:
    told = {"HOSTFILE": "the hosts", "HEAD": f"127.0.0.1:{free_port()}"}
    return [
        start(LAUNCH / "deepspeed.sh", "train me.yaml", *arguments, folder=folder, NODE_RANK=node, **told)
        for node in range(2)
    ]


# Does in this machine what pdsh does by ssh: the words on each of the hosts of -w, with %n for the host's place.
PDSH = r"""#!/usr/bin/env bash
while [[ $1 != -w ]]; do shift; done
IFS=, read -r -a hosts <<< "$2"
shift 2
codes=0
for n in "${!hosts[@]}"; do bash -c "${*//%n/$n}" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || codes=$?; done
exit "$codes"
"""


def deepspeed_by_ssh(folder: Path, *arguments: str) -> list[Started]:
    tools = folder.with_name("tools")
    tools.mkdir(exist_ok=True)
    for name, text in (("pdsh", PDSH), ("ssh", "#!/usr/bin/env bash\necho 127.0.0.1\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    if not (link := folder.with_name("no-space")).exists():
        link.symlink_to(folder)
    # Bash keeps the name by which it came to a folder.
    inside = 'cd "$1" && shift && exec bash "$@"'
    return [
        start(
            "bash", "-c", inside, "bash", link, LAUNCH / "deepspeed.sh", "train me.yaml", *arguments,
            folder=folder, HOSTFILE="the hosts", PATH=f"{tools}:{os.environ['PATH']}",
        )
    ]  # fmt: skip


def accelerate(folder: Path, *arguments: str, machines: Sequence[int] = (0,)) -> list[Started]:
    port = free_port()
    return [
        start(
            BIN / "accelerate", "launch", "--config_file", LAUNCH / "accelerate.yaml", "--num_processes", 2,
            *(("--num_machines", 2, "--machine_rank", machine, "--main_process_ip", "127.0.0.1") if len(machines) > 1 else ()),
            "--main_process_port", port, "--module", "dist_lora", "train", "train me.yaml", *arguments, folder=folder,
        )
        for machine in machines
    ]  # fmt: skip


def srun(slurm: cluster.Cluster, folder: Path, *arguments: str) -> list[Started]:
    told = {name: value for name, value in slurm.environment.items() if name in ("PATH", "SLURM_CONF")}
    return [
        start("srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit", sys.executable, "-m", "dist_lora", "train",
              "train me.yaml", *arguments, folder=folder, **told)
    ]  # fmt: skip


LAUNCHERS: Mapping[str, Callable[..., list[Started]]] = {
    "torchrun": torchrun,
    "torchrun, two nodes": torchrun_on_two_nodes,
    "deepspeed": deepspeed,
    "deepspeed, two nodes": deepspeed_on_two_nodes,
    "deepspeed by ssh": deepspeed_by_ssh,
    "accelerate": accelerate,
    "accelerate, two nodes": functools.partial(accelerate, machines=(0, 1)),
}
NEEDS_SLURM = [pytest.mark.slurm, pytest.mark.skipif(bool(cluster.lacking()), reason=cluster.lacking() or "-")]


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [*NEEDS_SLURM, pytest.mark.turn(of=2)] if name == "srun" else [pytest.mark.turn(of=10)]


@pytest.fixture(scope="module")
def launched(folder, request) -> Iterator[Callable[[str, str], Path]]:
    """``launched("torchrun", "zero3")``: the folder of that run, at its end; all that the suite needs are started at once."""
    wanted = [
        (item.callspec.params["name"], item.callspec.params["engine"])
        for item in request.session.items
        if item.module is request.module and "launched" in item.fixturenames
    ]
    runs: dict[tuple[str, str], Future[Path]] = {}
    launchers = dict(LAUNCHERS)

    def run(name: str, engine: str) -> Path:
        called = f"{name} {engine}".replace(",", "").replace(" ", "-")
        started = launchers[name](folder, f"run={called}", f"parallel.engine={engine}")
        for code, told in [each.end() for each in started]:
            assert code == 0, told
        return folder / "the runs" / called

    with ExitStack() as held:
        if any(name == "srun" for name, _ in wanted):
            launchers["srun"] = functools.partial(srun, held.enter_context(closing(cluster.Cluster(2))))
        pool = held.enter_context(ThreadPoolExecutor(AT_ONCE))
        runs = {each: pool.submit(run, *each) for each in dict.fromkeys(wanted)}
        yield lambda name, engine: runs[name, engine].result()


@pytest.mark.parametrize(
    ("name", "engine"),
    [pytest.param(name, engine, marks=marks_of(name)) for name in (*LAUNCHERS, "srun") for engine in ENGINES],
)
def test_whoever_starts_the_ranks_the_losses_are_the_same(name, engine, launched, whole) -> None:
    found, wanted = losses(launched(name, engine)), losses(whole)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=0, abs=1e-5)


# How it ends


@pytest.mark.turn(of=6, among="launchers")
def test_a_node_that_torchrun_waits_for_in_vain_is_told(folder) -> None:
    code, told = start(
        LAUNCH / "torchrun.sh", "train me.yaml", "run=half", folder=folder, NNODES=2, NPROC=1, JOIN_TIMEOUT=5,
        HEAD=f"127.0.0.1:{free_port()}",
    ).end()  # fmt: skip
    assert code == 1, told
    assert "RendezvousTimeoutError" in told
    assert "1 of 2 nodes joined at 127.0.0.1:" in told and "within 5 s: start it on each, with the same NNODES" in told


@pytest.mark.turn(of=6, among="launchers")
def test_nodes_with_other_numbers_of_processes_are_told(folder) -> None:
    told = {"NNODES": 2, "HEAD": f"127.0.0.1:{free_port()}", "JOIN_TIMEOUT": 60}
    ends = [
        start(LAUNCH / "torchrun.sh", "train me.yaml", "run=uneven", folder=folder, NPROC=n, **told) for n in (1, 2)
    ]
    texts = "".join(text for code, text in [each.end() for each in ends] if code)
    # By rank 0, and by its torchrun as the root cause, below the stack of its own.
    assert texts.count("error: the processes of this run don't match.") == 2, texts
    assert re.search(r"process(es)? on this node, not ", texts)


@pytest.mark.turn(of=6, among="launchers")
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_mistake_has_its_exit_code_and_one_error(folder, script) -> None:
    code, told = start(
        LAUNCH / script, "train me.yaml", f"run=no-data-{script}", "data.train=none.jsonl", folder=folder, NPROC=2
    ).end()
    assert code == 2, told
    # torchrun shows it again as the root cause, below the stack of its own.
    assert told.count("error: data.train: none.jsonl doesn't exist") == (2 if "torchrun" in script else 1)


@pytest.mark.turn(of=6, among="launchers")
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_script_that_is_asked_to_stop_lets_the_ranks_save_and_ends_with_75(folder, script, number) -> None:
    run = f"asked-{script}-{number.name}"
    arguments = ("train me.yaml", f"run={run}", "train.steps=5000", "checkpoint.every=5000")
    started = start(LAUNCH / script, *arguments, folder=folder, NPROC=2)
    metrics = folder / "the runs" / run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and started.process.poll() is None, started.end()
        time.sleep(0.1)
    started.process.send_signal(number)
    code, told = started.end()
    assert code == 75, told
    assert len(list((folder / "the runs" / run / "checkpoints").glob("step-*/manifest.json"))) == 2, told


DEAF = f"""#!{sys.executable}
import signal, subprocess, sys, time
if "torch.distributed.run" not in sys.argv:
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.run(["sleep", "2"])
time.sleep(600)
"""


@pytest.mark.turn(of=6, among="launchers")
def test_a_torchrun_that_is_deaf_when_its_ranks_have_ended_is_ended(folder) -> None:
    stand_in = folder.with_name("deaf")
    stand_in.write_text(DEAF)
    stand_in.chmod(0o755)
    code, told = start(
        LAUNCH / "torchrun.sh",
        "train me.yaml",
        folder=folder,
        PYTHON=stand_in,
        NNODES=2,
        NPROC=1,
        HEAD="a:1",
        JOIN_TIMEOUT=1,
    ).end()
    assert code == 1, told
    assert "torchrun has had no ranks for 3 s and is ended" in told


# How it is called


@pytest.mark.parametrize(
    ("script", "arguments", "added", "told"),
    [
        ("torchrun.sh", [], {}, "no config is given: bash launch/torchrun.sh CONFIG"),
        ("torchrun.sh", ["c"], {"NNODES": "two"}, "NNODES: found two, expected a number, or a range like 2:4"),
        ("torchrun.sh", ["c"], {"NNODES": "2"}, "HEAD: found nothing, expected HOST:PORT of one of the nodes"),
        ("torchrun.sh", ["c"], {"NNODES": "2", "HEAD": "a"}, "HEAD: found a, expected HOST:PORT"),
        ("torchrun.sh", ["c"], {"NPROC": "0"}, "NPROC: found 0, expected a number of processes"),
        ("torchrun.sh", ["c"], {"JOIN_TIMEOUT": "5m"}, "JOIN_TIMEOUT: found 5m, expected seconds"),
        ("torchrun.sh", ["c"], {"PYTHON": "no-python"}, "PYTHON: there is no no-python"),
        ("deepspeed.sh", [], {}, "no config is given: bash launch/deepspeed.sh CONFIG"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "none"}, "HOSTFILE: there is no file none"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "train me.yaml"}, "has no line like node-a slots=8"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "the hosts", "NPROC": "2"}, "NPROC and HOSTFILE are both set"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "the hosts", "NODE_RANK": "2"}, "NODE_RANK: found 2, expected 0 to 1"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "the hosts", "NODE_RANK": "1"}, "HEAD: found nothing, expected HOST:PORT"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "the hosts"}, "DeepSpeed's ssh can't go to a folder with a space"),
        ("deepspeed.sh", ["c"], {"NODE_RANK": "1"}, "NODE_RANK is set and HOSTFILE isn't"),
        ("deepspeed.sh", ["c"], {"NPROC": "3", "CUDA_VISIBLE_DEVICES": "4,6"}, "NPROC: found 3, and CUDA_VISIBLE_DEVICES has 2"),
        ("deepspeed.sh", ["c"], {"HEAD": "a:b"}, "HEAD: found a:b, expected HOST:PORT of the first node"),
        ("deepspeed.sh", ["c"], {"HOSTFILE": "uneven"}, "HOSTFILE: the nodes of uneven have different slots"),
    ],
)  # fmt: skip
def test_a_script_that_is_called_wrongly_says_so_in_a_line(folder, script, arguments, added, told) -> None:
    (folder / "uneven").write_text("a slots=2\nb slots=4\n")
    code, text = start(LAUNCH / script, *arguments, folder=folder, **added).end()
    assert code == 2 and text.startswith(f"launch/{script}: ") and told in text and text.count("\n") == 1, text


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, "--include=localhost:4,6 "),
        ({"CUDA_VISIBLE_DEVICES": "4,6", "NPROC": "1"}, "--include=localhost:4 "),
        ({"CUDA_VISIBLE_DEVICES": "", "NPROC": "3"}, "--num_accelerators=3 "),
        ({"CUDA_VISIBLE_DEVICES": "4,6", "HOSTFILE": "the hosts", "NODE_RANK": "0", "HEAD": "a:1"}, "--hostfile=the hosts --no_ssh "),
    ],
)  # fmt: skip
def test_deepspeed_gets_the_gpus_that_are_visible_here(folder, added, told) -> None:
    stand_in = folder.with_name("says its words")
    stand_in.write_text('#!/bin/sh\necho "$@" >&2\necho 1\n')
    stand_in.chmod(0o755)
    code, text = start(LAUNCH / "deepspeed.sh", "train me.yaml", folder=folder, PYTHON=stand_in, **added).end()
    words = text.splitlines()[-1]
    assert code == 0 and words.startswith("-m deepspeed.launcher.runner ") and told in words, text
    assert words.endswith("--no_local_rank --log_level=warning --module dist_lora train train me.yaml")
