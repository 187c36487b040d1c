"""Which rank a process is, by its launcher: torchrun, deepspeed, srun, or none."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from dist_lora.errors import ConfigError
from dist_lora.world.launcher import LaunchedRank, is_first_of_node, launched_rank, note_for_torchrun
from dist_lora.world.slurm import hosts_of, is_step, rendezvous_of, tasks_per_node
from tests import ROOT

# As a real Slurm (22.05) sets them: two nodes, of four tasks the fourth; the job was asked for by -N2 -n4.
JOB = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[003-004,010]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NODELIST": "gpu[003-004,010]",
    "SLURM_NNODES": "3",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2,1(x2)",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
}
TASK = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[004,010]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
}
SHELL_OF_SALLOC = JOB | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu003",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu003", ["gpu003"]),
        ("gpu[003-004,010]", ["gpu003", "gpu004", "gpu010"]),
        ("a1,b[2-3]-x", ["a1", "b2-x", "b3-x"]),
        ("r[0-1]n[08-10]", ["r0n08", "r0n09", "r0n10", "r1n08", "r1n09", "r1n10"]),
        ("[1-3]", ["1", "2", "3"]),
        ("a[9-010,7],b,", ["a9", "a10", "a7", "b"]),
        ("a[098-101]", ["a098", "a099", "a100", "a101"]),
        ("n1,n1", ["n1", "n1"]),
    ],
)
def test_a_node_list_is_expanded_in_its_order(nodelist: str, hosts: list[str]) -> None:
    assert hosts_of(nodelist) == hosts


@pytest.mark.parametrize(
    ("nodelist", "found"),
    [
        ("", "found no host"),
        ("a[1-2", "found a bracket that is not closed"),
        ("a1-2]", "found brackets that don't match"),
        ("a[[1]]", "found brackets that don't match"),
        ("a[]", r"found \[\]: '' is neither a number nor a range"),
        ("a[1-x]", r"found \[1-x\]: '1-x' is neither a number nor a range"),
        ("a[3-1]", r"found \[3-1\]: 3-1 counts down or is longer than 65536"),
        ("a[0-999999999]", r"found \[0-999999999\]: 0-999999999 counts down or is longer than 65536"),
        ("a[0-999][0-999]", "found more than 65536 hosts"),
    ],
)
def test_what_is_no_node_list_is_refused(nodelist: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"^the node list .*: {found}; expected hosts as Slurm writes them: n1,"):
        hosts_of(nodelist)


@pytest.mark.slurm
@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no Slurm here: scontrol is not on the PATH")
@pytest.mark.parametrize("nodelist", ["gpu[003-004,010]", "r[0-1]n[08-10]", "a[9-010,7],b", "[1-3]", "n1,n1"])
def test_slurm_itself_expands_a_node_list_so(nodelist: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")  # it refuses to start without
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    assert hosts_of(nodelist) == done.stdout.split()


def test_tasks_per_node_are_counted() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(
        ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE: found '2\(x\)', expected tasks per node as in 2"
    ):
        tasks_per_node("2(x)")


def test_without_a_launcher_there_is_no_launched_rank() -> None:
    assert launched_rank({}) is None


def test_torchrun_and_deepspeed_say_which_rank_a_process_is() -> None:
    assert launched_rank(TORCHRUN) == LaunchedRank(1, 4, 1, 2)
    deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert launched_rank(deepspeed) == LaunchedRank(3, 4, 1, 2)


def test_a_task_of_srun_is_a_rank_and_its_rendezvous_is_on_the_first_host_of_its_step() -> None:
    launched = launched_rank(TASK)
    assert launched is not None and launched == LaunchedRank(3, 4, 1, 2, launched.rendezvous)
    assert launched.rendezvous is not None and launched.rendezvous[0] == "gpu004"
    others = [launched_rank(TASK | changes) for changes in (
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0,1", "SLURM_NODEID": "0"},
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_GTIDS": "0,1", "SLURM_NODEID": "0"},
        {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
    )]  # fmt: skip
    assert others == [LaunchedRank(rank, 4, rank % 2, 2, launched.rendezvous) for rank in range(3)]


def test_what_a_launcher_says_within_a_task_of_srun_counts() -> None:
    assert launched_rank(TASK | TORCHRUN) == LaunchedRank(1, 4, 1, 2)


@pytest.mark.parametrize(
    "environment",
    [
        JOB,
        JOB | {"SLURM_STEP_ID": "batch"},
        SHELL_OF_SALLOC,
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
    ids=["batch shell", "batch shell that says so", "shell of salloc", "one task"],
)
def test_a_shell_of_slurm_and_a_task_alone_are_no_world(environment: dict[str, str]) -> None:
    assert launched_rank(environment) is None


def test_a_world_size_that_a_batch_script_set_is_compared_with_srun() -> None:
    assert launched_rank(TASK | {"WORLD_SIZE": "4"}) == launched_rank(TASK)
    with pytest.raises(ConfigError, match="WORLD_SIZE: found 8, but srun started 4 tasks; unset it"):
        launched_rank(TASK | {"WORLD_SIZE": "8"})
    with pytest.raises(ConfigError, match="the environment has WORLD_SIZE but not RANK, LOCAL_RANK"):
        launched_rank(JOB | {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": "0"}, "the environment has RANK but not WORLD_SIZE, LOCAL_RANK: a launcher sets all of them"),
        (TORCHRUN | {"RANK": "one"}, "the launcher's variables are not all numbers: .*'RANK': 'one'"),
        (TORCHRUN | {"RANK": "4"}, "variables contradict each other: rank 4 of 4, local rank 1 of 2"),
    ],
)
def test_half_a_launcher_is_refused(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        launched_rank(changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
            r"srun started 2\(x3\),1 tasks on the nodes of this step: every node must run the same number. "
            "Start with --ntasks-per-node=N, N a divisor of 7",
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_GTIDS": "1,3"},
            "srun's tasks 1, 3 on this node are not consecutive: .* Start with srun --distribution=block",
        ),
        (
            {"SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_GTIDS": "1,2"},
            "srun's tasks 1, 2 on this node are not consecutive",
        ),
        ({"SLURM_PROCID": ""}, "SLURM_PROCID: found '', expected a number: SLURM_STEP_ID says that srun started this"),
        ({"SLURM_PROCID": "4"}, "variables contradict each other: rank 4 of 4"),
    ],
)
def test_tasks_that_make_no_world_are_refused(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        launched_rank(TASK | changes)


def test_tasks_per_node_are_found_where_an_old_slurm_has_no_variables_of_the_step() -> None:
    old = {name: value for name, value in TASK.items() if not name.startswith("SLURM_STEP_") or name == "SLURM_STEP_ID"}
    launched = launched_rank(old | {"SLURM_NTASKS_PER_NODE": "2"})
    assert launched is not None and (launched.world_size, launched.local_size) == (4, 2)
    assert launched.rendezvous is not None and launched.rendezvous[0] == "gpu003"


# The rendezvous


def test_the_rendezvous_of_a_job_is_on_its_first_host_at_its_own_port() -> None:
    ports = set()
    for job in range(1000, 1100):
        host, port = rendezvous_of(JOB | {"SLURM_JOB_ID": str(job)})
        assert host == "gpu003" and 15000 <= port <= 60000
        ports.add(port)
    assert len(ports) == 100
    steps = {rendezvous_of(TASK | {"SLURM_STEP_ID": str(step)})[1] for step in range(5)}
    assert len({*steps, rendezvous_of(JOB)[1]}) == 6


def test_the_users_address_of_the_rendezvous_is_used() -> None:
    assert rendezvous_of(TASK | {"MASTER_ADDR": "head", "MASTER_PORT": "4000"}) == ("head", 4000)


def test_the_rendezvous_of_one_node_is_on_itself() -> None:
    alone = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    assert rendezvous_of(alone)[0] == rendezvous_of(alone | {"SLURM_JOB_NODELIST": "gpu003"})[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},
            "SLURM_JOB_NODELIST and SLURM_NODELIST are not set, and the job has 2 nodes: the rendezvous host is unknown.",
        ),
        ({"SLURM_JOB_ID": "7"}, "are not set, and the job has an unknown number of nodes: .* Start it within a job"),
        (
            TASK | {"MASTER_ADDR": "localhost"},
            "MASTER_ADDR: found localhost, and the job has 2 nodes, each of which would connect to itself. Unset it "
            r"\(then gpu004 is used\)",
        ),
        (TASK | {"MASTER_PORT": "http"}, "MASTER_PORT: found 'http', expected a number from 1 to 65535"),
        (TASK | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID: found '', expected the job's id"),
    ],
)
def test_the_rendezvous_is_never_guessed(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        rendezvous_of(environment)
    assert error.value.exit_code == 2


def test_only_a_number_below_the_special_ones_is_a_step() -> None:
    assert is_step({"SLURM_STEP_ID": "0"}) and is_step({"SLURM_STEP_ID": "41"})
    for text in ("", "batch", "4294967290", "4294967291", "4294967292", "-1"):
        assert not is_step({"SLURM_STEP_ID": text})


def test_the_launched_rank_is_known_without_torch() -> None:
    program = "import sys, dist_lora.world.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_one_process_per_node_reports_what_all_have_found() -> None:
    assert is_first_of_node({}) and is_first_of_node(JOB) and is_first_of_node(SHELL_OF_SALLOC)
    assert is_first_of_node(TORCHRUN | {"LOCAL_RANK": "0"}) and not is_first_of_node(TORCHRUN)
    assert is_first_of_node(TASK | {"SLURM_LOCALID": "0"}) and not is_first_of_node(TASK)
    assert is_first_of_node(TASK | TORCHRUN | {"LOCAL_RANK": "0"})
    assert is_first_of_node({"LOCAL_RANK": "1"})  # a shell's leftover


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_a_mistake_before_the_rendezvous_is_reported_once_per_node(rank, count, monkeypatch, capsys) -> None:
    from dist_lora import cli

    for name, value in {**TORCHRUN, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dist-lora", "train", "no-such.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.count("error: no-such.yaml: no such file") == count


def test_a_number_of_processes_that_contradicts_the_launcher_is_refused(tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from dist_lora.cli import app

    config = tmp_path / "config.yaml"
    config.write_text("run: a\nmodel: {name: 3.1-8b}\ndata: {train: a.jsonl}\n")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["train", str(config), "--nproc", "4"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(
        "--nproc: found 4, and the launcher started 2 processes on each node (4 in total)."
    )


def test_torchrun_shows_our_sentence_as_the_root_cause(tmp_path, monkeypatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    note_for_torchrun({}, "nobody asks")
    note_for_torchrun({"TORCHELASTIC_ERROR_FILE": str(tmp_path / "no" / "folder")}, "nowhere to write")
    note_for_torchrun({"TORCHELASTIC_ERROR_FILE": str(file)}, "error: runs/a: the disk is full.\nFree some space.")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    shown = ChildFailedError("dist_lora", {0: failure}).format_msg()
    assert "error: runs/a: the disk is full.\n  Free some space." in shown and "To enable traceback" not in shown
