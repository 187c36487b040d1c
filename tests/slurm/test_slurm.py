"""Jobs of a real Slurm on several nodes, by the scripts that ``dist-lora slurm`` prints: they save, stop, start again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks.runs import chats_settings
from tests.slurm import cluster
from tests.slurm.cluster import Cluster, script

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(cluster.lacking()), reason=cluster.lacking() or "-")]

NUM_STEPS = 300
EVERY = 20
TIMEOUT_S = 240.0
EXACT = ("step", "loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with closing(Cluster(2)) as made:
        yield made


class Jobs:
    """Scripts and configs in one folder, each run with a name of its own."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def config(self, run: str, **sections: Mapping[str, Any]) -> Path:
        tree = self.settings | {"run": run, "runs_dir": "runs"}
        for name, values in sections.items():
            tree = tree | {name: {**tree.get(name, {}), **values}}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return Path(path.name)

    def script(self, *arguments: object) -> str:
        """As it is printed, for one GPU a node (which torch doesn't see here) and one core."""
        return script(
            *arguments, "--gpus-per-node", 1, "--cpus-per-gpu", 1, "--env", "HF_HUB_OFFLINE=1", "--env", "DS_ACCELERATOR=cpu",
            folder=self.folder,
        )  # fmt: skip

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def steps_done(self, name: str) -> int:
        path = self.run(name) / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_step(self, name: str, step: int, told: Callable[[], str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.steps_done(name) < step:
            assert time.monotonic() < deadline, told()
            time.sleep(0.02)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in EXACT} for line in lines]

    def adapter(self, name: str) -> bytes:
        return (self.run(name) / "adapter" / "adapter_model.safetensors").read_bytes()

    def told(self, job: int | str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text() if (self.folder / f"slurm-{job}.out").exists() else "nothing"

    def output(self, run: str, job: int) -> str:
        return (self.folder / f"slurm-{run}-{job}.out").read_text()


@pytest.fixture(scope="module")
def jobs(tiny_llama, tmp_path_factory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    settings = chats_settings(tiny_llama("llama31"), folder, num_steps=NUM_STEPS)
    return Jobs(folder, settings | {"checkpoint": {"every": EVERY, "keep": 2}})


@pytest.fixture(scope="module")
def straight(slurm: Cluster, jobs: Jobs) -> Jobs:
    """A run on two nodes that nothing interrupts, by the script as it is printed."""
    job = slurm.submit(jobs.script(jobs.config("straight"), "--nodes", 2, "--time", "10"), jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    assert found["JobState"] == "COMPLETED", jobs.output("straight", job)
    assert "exit code 0" in jobs.output("straight", job)
    return jobs


def assert_like(straight: Jobs, name: str) -> None:
    assert straight.metrics(name) == straight.metrics("straight")
    assert straight.adapter(name) == straight.adapter("straight")


def test_a_run_on_two_nodes_goes_to_its_end(straight: Jobs) -> None:
    assert straight.steps_done("straight") == NUM_STEPS


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_preempted_run_is_started_again_and_ends_as_if_nothing_had_been(
    slurm: Cluster, straight: Jobs, launcher: str
) -> None:
    """By the step's signal, as Slurm preempts, and then by the batch shell's, as some clusters do."""
    name = f"preempted-{launcher}"
    job = slurm.submit(
        straight.script(straight.config(name), "--nodes", 2, "--time", "10", "--launcher", launcher), straight.folder
    )
    for step, options in ((40, ("--signal=USR1",)), (120, ("--batch", "--signal=USR1"))):
        straight.wait_for_step(name, step, lambda: straight.output(name, job))
        slurm.signal(job, *options)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = straight.output(name, job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "2"), told
    assert told.count("to be started again") == 2
    assert_like(straight, name)
