"""Jobs of a real Slurm on several nodes, by the scripts that ``dist-lora slurm`` prints: they save, stop, start again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.runs import INJECT, ROOT
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


def faulty(fault: str) -> list[str]:
    """Options that let a fault into each rank."""
    return ["--env", f"PYTHONPATH={os.pathsep.join([str(INJECT), str(ROOT)])}", "--env", f"DIST_LORA_FAULT={fault}"]


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

    def output(self, run: str, job: int) -> str:
        return (self.run(run) / f"slurm-{job}.out").read_text()

    def output_of_task(self, run: str, task: str) -> str:
        """The log of an array's task, by its link in the run's folder."""
        return (self.run(run) / f"slurm-dist-lora-{task}.out").read_text()


@pytest.fixture(scope="module")
def jobs(tiny_llama, tmp_path_factory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    settings = chats_settings(tiny_llama("llama31"), folder, num_steps=NUM_STEPS)
    return Jobs(folder, settings | {"checkpoint": {"every": EVERY, "keep": 2}})


@pytest.fixture(scope="module")
def straight(slurm: Cluster, jobs: Jobs) -> Jobs:
    """A run on two nodes that nothing interrupts, by the script as it is printed, after what a site's .bashrc does."""
    setup = ("--setup", "false; echo $NOT_SET | grep nothing || true; export IS_SET_UP=1")
    job = slurm.submit(jobs.script(jobs.config("straight"), "--nodes", 2, "--time", "10", *setup), jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    assert found["JobState"] == "COMPLETED", jobs.output("straight", job)
    assert "exit code 0" in jobs.output("straight", job)
    return jobs


def assert_like(straight: Jobs, name: str) -> None:
    assert straight.metrics(name) == straight.metrics("straight")
    assert straight.adapter(name) == straight.adapter("straight")


def test_a_run_on_two_nodes_goes_to_its_end(straight: Jobs) -> None:
    assert straight.steps_done("straight") == NUM_STEPS


@pytest.mark.turn(of=5, among="clusters")
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
    assert told.count("requeueing") == 2
    assert_like(straight, name)


@pytest.mark.turn(of=5, among="clusters")
def test_a_run_out_of_time_is_started_again_with_a_new_limit(slurm: Cluster, straight: Jobs) -> None:
    printed = straight.script(
        straight.config("limited"), "--nodes", 2, "--time", "10", *faulty("slow_steps_until_slurm_starts_it_again")
    )
    job = slurm.submit(printed, straight.folder)
    straight.wait_for_step("limited", 5, lambda: straight.output("limited", job))
    slurm.set_limit(job, "1")  # what is left is less than the notice: Slurm sends its signal when it looks next
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", "the job to be started again", timeout_s=TIMEOUT_S)
    slurm.set_limit(job, "10")
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = straight.output("limited", job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), told
    assert "exit code 75" in told and "interrupted by SIGUSR1" in told
    assert_like(straight, "limited")


@pytest.mark.turn(of=5, among="clusters")
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_mistake_is_not_started_again(slurm: Cluster, jobs: Jobs, launcher: str) -> None:
    """Found once the run has its folder: torchrun's exit code is 1 then, and the mark says 2."""
    name = f"mistaken-{launcher}"
    config = jobs.config(name, data={"train": "no-such-file.jsonl"})
    job = slurm.submit(jobs.script(config, "--nodes", 2, "--time", "10", "--launcher", launcher), jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = jobs.output(name, job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), told
    assert "no-such-file.jsonl" in told and told.count("error:") >= 1


def test_a_set_up_that_fails_ends_the_job_before_anything_is_started(slurm: Cluster, jobs: Jobs) -> None:
    setup = ("--setup", "module load cuda/0.1")
    job = slurm.submit(jobs.script(jobs.config("no-module"), "--nodes", 2, "--time", "10", *setup), jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = jobs.output("no-module", job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), told
    assert "error: --setup: exit code 127 from: module load cuda/0.1" in told and "start 0 of job" not in told


@pytest.mark.turn(of=5, among="clusters")
def test_a_config_that_became_wrong_is_not_started_again(slurm: Cluster, jobs: Jobs) -> None:
    config = jobs.config("typo")
    printed = jobs.script(config, "--nodes", 2, "--time", "10")
    with (jobs.folder / config).open("a") as file:
        file.write("optimm: {}\n")
    job = slurm.submit(printed, jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = jobs.output("typo", job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), told
    assert "optimm" in told and "wrote no status" in told


@pytest.mark.turn(of=5, among="clusters")
def test_a_run_that_never_comes_on_is_given_up(slurm: Cluster, jobs: Jobs) -> None:
    """A rank is killed before the first save, each time."""
    printed = jobs.script(
        jobs.config("stuck"), "--nodes", 2, "--time", "10", "--max-stalled", 2, *faulty("kill_of_rank_1_in_step_3")
    )  # fmt: skip
    job = slurm.submit(printed, jobs.folder)
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = jobs.output("stuck", job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1"), told
    assert "not requeued: 2 starts in a row have saved no newer step" in told


@pytest.mark.turn(of=5, among="clusters")
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_lost_node_brings_the_job_back_by_itself(slurm: Cluster, straight: Jobs, launcher: str) -> None:
    """No process of it is left on the other node; with the node back the run ends as if nothing had been."""
    name = f"node-lost-{launcher}"
    job = slurm.submit(
        straight.script(straight.config(name), "--nodes", 2, "--time", "10", "--launcher", launcher), straight.folder
    )
    straight.wait_for_step(name, 50, lambda: straight.output(name, job))
    slurm.power_off("n2")
    try:
        slurm.wait_for(
            lambda: slurm.job(job)["JobState"] in ("PENDING", "FAILED"), "the job to end", timeout_s=TIMEOUT_S
        )
        slurm.wait_for(lambda: not slurm.ranks_on("n1", straight.folder), "n1's ranks to end", timeout_s=30)
    finally:
        slurm.start_node("n2")
    found = slurm.wait(job, timeout_s=TIMEOUT_S)
    told = straight.output(name, job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), told
    assert_like(straight, name)


@pytest.mark.turn(of=5, among="clusters")
def test_an_array_trains_a_config_in_each_task(slurm: Cluster, jobs: Jobs) -> None:
    """Each by itself: one is asked to stop and comes back, one is mistaken and doesn't."""
    configs = [jobs.config("array-a", train={"seed": 1}), jobs.config("array-b", data={"train": "none.jsonl"}),
               jobs.config("array-c", train={"seed": 2})]  # fmt: skip
    job = slurm.submit(jobs.script(*configs, "--nodes", 1, "--time", "10"), jobs.folder)
    jobs.wait_for_step("array-c", 30, lambda: jobs.output_of_task("array-c", f"{job}_2"))  # whose number is the array's
    slurm.signal(f"{job}_2", "--signal=USR1")
    ends = [slurm.wait(f"{job}_{i}", timeout_s=TIMEOUT_S) for i in range(3)]
    told = [jobs.output_of_task(f"array-{run}", f"{job}_{i}") for i, run in enumerate("abc")]
    assert [(end["JobState"], end["ExitCode"], end["Restarts"]) for end in ends] == [
        ("COMPLETED", "0:0", "0"), ("FAILED", "2:0", "0"), ("COMPLETED", "0:0", "1")], told  # fmt: skip
    assert jobs.steps_done("array-a") == jobs.steps_done("array-c") == NUM_STEPS
    assert jobs.adapter("array-a") != jobs.adapter("array-c")


@pytest.mark.turn(of=5, among="clusters")
def test_four_nodes_are_one_world(jobs: Jobs, straight: Jobs) -> None:
    with closing(Cluster(4)) as four:
        job = four.submit(jobs.script(jobs.config("four"), "--nodes", 4, "--time", "10"), jobs.folder)
        jobs.wait_for_step("four", 40, lambda: jobs.output("four", job))
        four.signal(job, "--signal=USR1")
        found = four.wait(job, timeout_s=TIMEOUT_S)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), jobs.output("four", job)
    for ours, theirs in zip(jobs.metrics("four")[:40], straight.metrics("straight"), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)


@pytest.mark.turn(of=5, among="clusters")
def test_a_cancelled_job_leaves_no_process_where_slurm_knows_only_groups(jobs: Jobs) -> None:
    """torchrun's workers have sessions of their own, which Slurm's tracking by process groups doesn't find."""
    with closing(Cluster(2, tracking="pgid")) as groups:
        job = groups.submit(
            jobs.script(jobs.config("cancelled"), "--nodes", 2, "--time", "10", "--launcher", "torchrun"), jobs.folder
        )
        jobs.wait_for_step("cancelled", 30, lambda: jobs.output("cancelled", job))
        groups.signal(job)
        found = groups.wait(job, timeout_s=TIMEOUT_S)
        for node in groups.nodes:
            groups.wait_for(
                lambda node=node: not groups.ranks_on(node, jobs.folder), f"{node}'s ranks to end", timeout_s=30
            )
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), jobs.output("cancelled", job)
    step = int((jobs.run("cancelled") / "status").read_text().split()[2])
    assert step >= 30  # asked by TERM, it has saved
