"""The batch script that ``dist-lora slurm`` prints, run by bash beside stand-ins for Slurm's commands."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dist_lora.cli import app
from dist_lora.errors import ConfigError, DistLoraError, PlanError
from dist_lora.plan.hardware import find_gpu
from dist_lora.slurm.command import Job, make_job, make_script, submit
from dist_lora.slurm.job import Request, _within
from dist_lora.slurm.templates import FOLDER, TEMPLATES, text_of
from dist_lora.world.slurm import hosts_of, rendezvous_of
from tests import ROOT


def config(folder: Path, run: str = "it", **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "run": run,
        "runs_dir": str(folder / "all runs"),
        "model": {"name": "3.2-1b"},
        "data": {"train": "data.jsonl"},
        "train": {"steps": 1000, "global_batch": 32, "micro_batch": 1},
    }
    path = folder / f"{run} config.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def request(folder: Path, *configs: Path, **changes: Any) -> Request:
    made = Request(
        configs=configs or (config(folder),),
        overrides=(),
        num_nodes=3,
        gpus_per_node=2,
        gpu=find_gpu("h100-80gb"),
        python=str(folder / "py thon"),
    )
    return replace(made, **changes)


class Stubs:
    """A folder of commands that write down how they were called; ``python`` leaves the mark that it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("scontrol", "scancel"):
            self.write(self.bin / name, f'echo {name} "$@" >> "$CALLS"; [[ $1 != requeue ]] || kill -KILL $PPID')
        # As srun does: the task alone, with what comes after srun's own options.
        self.write(self.bin / "srun", 'echo srun "$@" >> "$CALLS"; while [[ $1 == -* ]]; do shift; done; exec "$@"')
        (folder / "all runs" / "it").mkdir(parents=True)

    def write(self, path: Path, text: str) -> None:
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def python(self, text: str) -> None:
        """``text`` is bash; ``$STATUS`` is the file of the mark, ``$ATTEMPT`` what names this start."""
        self.write(self.folder / "py thon", text)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "gpu[003-004,010]",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_PER_TASK": "8",
        }
        added = job | environment
        added |= {
            "STATUS": str(self.folder / "all runs" / "it" / "status"),
            "ATTEMPT": f"{added['SLURM_JOB_ID']}.{added.get('SLURM_RESTART_COUNT', 0)}",
            "CALLS": str(self.calls),
            "PATH": f"{self.bin}:/usr/bin:/bin",
        }
        return subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=added,
            cwd=self.folder,
        )

    def run(self, script: str, **environment: str) -> tuple[int, str]:
        started = self.start(script, **environment)
        told, _ = started.communicate(script, timeout=30)
        return started.returncode, told

    @property
    def called(self) -> str:
        return self.calls.read_text() if self.calls.exists() else ""


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


def leaves(mark: str, exit_code: int = 1) -> str:
    return f'echo "{mark}" > "$STATUS"; exit {exit_code}'


# What becomes of a job


@pytest.mark.parametrize(
    ("mark", "python_code", "exit_code", "is_requeued"),
    [
        ("75 again 120 0 $ATTEMPT stopped on SIGUSR1's request", 75, -9, True),
        ("75 again 120 0 $ATTEMPT stopped", 1, -9, True),  # as torchrun has it
        ("1 again 120 1 $ATTEMPT a lost peer", 1, -9, True),
        ("running again 120 0 $ATTEMPT since", 137, -9, True),
        ("0 final 120 0 $ATTEMPT done", 0, 0, False),
        ("2 final 120 0 $ATTEMPT a mistake", 1, 2, False),
        ("3 final 120 0 $ATTEMPT does not fit", 1, 3, False),
        ("4 final 120 0 $ATTEMPT damaged", 1, 4, False),
        ("1 final 120 0 $ATTEMPT not a number", 1, 1, False),
        ("75 final 120 0 $ATTEMPT the file STOP", 75, 75, False),
        ("75 again 120 3 $ATTEMPT no step comes", 75, 75, False),
        ("running again 0 3 $ATTEMPT since", 137, 1, False),
        ("running again 0 0 $ATTEMPT since", 2, 1, False),  # the mark of a rank elsewhere is not to be seen yet
        ("75 again 120 0 76.0 an earlier job's", 1, 1, False),
        ("75 again 120 0 76.0 an earlier job's", 2, 2, False),
    ],
)
def test_the_mark_and_no_exit_code_says_whether_it_is_started_again(
    stubs: Stubs, mark: str, python_code: int, exit_code: int, is_requeued: bool
) -> None:
    stubs.python(leaves(mark, python_code))
    code, told = stubs.run(make_script(request(stubs.folder)))
    assert stubs.called.count("scontrol requeue 77") == is_requeued, told
    if not is_requeued:
        assert code == exit_code, told


def test_without_a_mark_it_is_not_started_again(stubs: Stubs) -> None:
    stubs.python("exit 9")
    code, told = stubs.run(make_script(request(stubs.folder)))
    assert (code, "requeue" in stubs.called) == (9, False)
    assert "srun ended with exit code 9, and the run wrote no status for this attempt" in told


@pytest.mark.parametrize(("restart", "is_requeued"), [("0", True), ("2", True), ("3", False)])
def test_a_signal_before_the_ranks_listen_starts_it_again_a_few_times(
    stubs: Stubs, restart: str, is_requeued: bool
) -> None:
    stubs.python("kill -USR1 $$; sleep 9")
    _, told = stubs.run(make_script(request(stubs.folder)), SLURM_RESTART_COUNT=restart)
    assert ("scontrol requeue 77" in stubs.called) == is_requeued, told


@pytest.mark.parametrize(("restart", "is_requeued"), [("6", True), ("7", True), ("8", False)])
def test_only_starts_since_the_last_status_count_as_signalled_before_the_ranks_listened(
    stubs: Stubs, restart: str, is_requeued: bool
) -> None:
    (stubs.folder / "all runs" / "it" / "status").write_text("75 again 900 0 77.5 stopped\n")
    stubs.python("kill -USR1 $$; sleep 9")
    _, told = stubs.run(make_script(request(stubs.folder)), SLURM_RESTART_COUNT=restart)
    assert ("scontrol requeue 77" in stubs.called) == is_requeued, told


def test_a_task_of_an_array_asks_for_itself_alone(stubs: Stubs) -> None:
    other = config(stubs.folder, "other")
    stubs.python(leaves("75 again 120 0 $ATTEMPT stopped", 75))
    script = make_script(request(stubs.folder, config(stubs.folder), other))
    stubs.run(script, SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="0")
    assert "scontrol requeue 70_0" in stubs.called
    assert f"{stubs.folder}/it config.yaml" in stubs.called and "other config.yaml" not in stubs.called
    assert "#SBATCH --array=0-1" in script and "slurm-%x-%A_%a.out" in script


def test_a_signal_to_the_shell_reaches_the_ranks(stubs: Stubs) -> None:
    stubs.python('touch "$STATUS.begun"; for i in {1..600}; do [[ ! -e $CALLS.go ]] || break; sleep 0.1; done; '
                 + leaves("75 again 1 0 $ATTEMPT stopped", 75))  # fmt: skip
    started = stubs.start("")
    assert started.stdin is not None
    started.stdin.write(make_script(request(stubs.folder)))
    started.stdin.close()
    begun = stubs.folder / "all runs" / "it" / "status.begun"
    while not begun.exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGUSR1)
    while "scancel --signal=USR1 77" not in stubs.called:
        assert started.poll() is None, "the script ended and passed no signal on"
        time.sleep(0.01)
    Path(f"{stubs.calls}.go").touch()
    started.wait(30)
    assert "scontrol requeue 77" in stubs.called


def test_what_slurm_ends_is_not_started_again(stubs: Stubs) -> None:
    """A cancelled job would come back for ever; a preempted one is put back by Slurm itself."""
    stubs.python('kill -TERM "$PPID"; ' + leaves("75 again 1 0 $ATTEMPT stopped on SIGTERM's request", 75))
    code, told = stubs.run(make_script(request(stubs.folder)))
    assert (code, "requeue" in stubs.called) == (75, False), told


def test_outside_a_job_it_says_so(stubs: Stubs) -> None:
    done = subprocess.run(["bash"], input=make_script(request(stubs.folder)), capture_output=True, text=True, check=False,
                          env={"PATH": "/usr/bin:/bin"})  # fmt: skip
    assert (done.returncode, "this is a script for sbatch" in done.stderr) == (2, True)


# How the ranks are started


def test_srun_starts_a_task_for_each_gpu(stubs: Stubs) -> None:
    stubs.python(leaves("0 final 1 0 $ATTEMPT done", 0))
    script = make_script(request(stubs.folder, overrides=("run=it", "lora.rank=4")))
    assert stubs.run(script)[0] == 0
    assert "#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n#SBATCH --cpus-per-task=8\n" in script
    python, path = stubs.folder / "py thon", stubs.folder / "it config.yaml"
    assert (
        f"srun --kill-on-bad-exit=1 --cpus-per-task=8 {python} -m dist_lora train {path} run=it lora.rank=4\n"
        == stubs.called
    )


def test_torchrun_meets_on_the_first_host_at_the_jobs_own_port(stubs: Stubs) -> None:
    stubs.python(leaves("0 final 1 0 $ATTEMPT done", 0))
    script = make_script(request(stubs.folder, launcher="torchrun"))
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=2\n#SBATCH --cpus-per-task=16\n" in script
    endpoints = []
    for job in ("77", "78"):
        assert stubs.run(script, SLURM_JOB_ID=job)[0] == 0
        endpoints.append(re.findall(r"--nnodes=3 --nproc-per-node=2 .*--rdzv-endpoint=(\S+)", stubs.called)[-1])
        environment = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "gpu[003-004,010]"}
        assert endpoints[-1] == "{}:{}".format(*rendezvous_of(environment))
    assert endpoints[0].startswith("gpu003:") and endpoints[0] != endpoints[1]


NAMES = st.text("abgn", min_size=1, max_size=4)
NUMBERS = st.integers(0, 120).map(lambda n: f"{n:03d}")
RANGES = st.tuples(NUMBERS, st.integers(0, 9)).map(lambda pair: f"{pair[0]}-{int(pair[0]) + pair[1]:03d}")
BRACKETS = st.lists(NUMBERS | RANGES, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
NODES = st.lists(NAMES | BRACKETS, min_size=1, max_size=4).map("".join).filter(lambda text: not text.startswith("["))


@given(st.lists(st.lists(NODES, min_size=1, max_size=3).map(",".join), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_the_scripts_first_host_is_the_lists_first(nodelists: list[str]) -> None:
    text = (FOLDER / "many-nodes-torchrun.sbatch").read_text()
    function = re.search(r"^first_host\(\) \{.*?^\}", text, re.MULTILINE | re.DOTALL)
    assert function is not None
    done = subprocess.run(["bash", "-c", function[0] + '\nfor list; do first_host "$list"; echo; done', "-", *nodelists],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == [hosts_of(nodelist)[0] for nodelist in nodelists]


def test_what_is_asked_for_stands_in_the_script(tmp_path: Path) -> None:
    script = make_script(
        request(tmp_path, partition="big", account="lab", mail="me@lab", time="2-12:00:00", environment=("A=b c", "D=$E"),
                setup=("module load cuda",), extra=("--qos=high",), container="image.sif")
    )  # fmt: skip
    for line in ("#SBATCH --partition=big", "#SBATCH --account=lab", "#SBATCH --mail-user=me@lab", "#SBATCH --time=2-12:00:00",
                 "#SBATCH --qos=high", "export A='b c'", "export D='$E'", "module load cuda", "#SBATCH --requeue"):  # fmt: skip
        assert f"\n{line}\n" in script
    assert 'apptainer exec --nv --bind "${mounts:1}" --pwd "$PWD" image.sif' in script
    pyxis = make_script(request(tmp_path, container="nvcr.io/x:1"))
    assert '--container-image=nvcr.io/x:1 --container-mounts="${mounts:1}" --container-workdir="$PWD"' in pyxis


# What runs before the ranks


def test_set_up_may_read_variables_that_are_not_set_and_fail_inside(stubs: Stubs) -> None:
    """As conda's activation and most a .bashrc do; what follows has bash's checks again."""
    stubs.python('echo "$FOUND ${config-}" >> "$CALLS"; ' + leaves("0 final 1 0 $ATTEMPT done", 0))
    bashrc = stubs.folder / "bashrc"
    bashrc.write_text(
        "[[ -z $PS1 ]] || echo interactive\nfalse | true\nset -e\nconfig=theirs\nexport FOUND=it$NOT_SET\n"
    )
    script = make_script(request(stubs.folder, setup=(f"source {bashrc} # of the user", "false || FOUND+=!")))
    code, told = stubs.run(script)
    assert code == 0, told
    assert "it! " in stubs.called and f"train {stubs.folder}/it config.yaml" in stubs.called
    after = script[script.index("set +e -uo pipefail") :]
    assert after.index("config=") > 0, "no set-up changes the script's own variables"


def test_a_set_up_that_fails_ends_the_job_and_says_which(stubs: Stubs) -> None:
    stubs.python(leaves("0 final 1 0 $ATTEMPT done", 0))
    code, told = stubs.run(make_script(request(stubs.folder, setup=("true", "module load 'cuda 13'", "true"))))
    assert (code, stubs.called) == (2, "")
    assert told.splitlines()[-1] == "error: --setup: exit code 127 from: module load 'cuda 13'"


# What a container sees


def seen_in(stubs: Stubs, script: str, **environment: str) -> list[str]:
    """The mounts, by a stand-in for apptainer."""
    stubs.write(stubs.bin / "apptainer", 'echo apptainer "$@" >> "$CALLS"')
    stubs.run(script, HOME=str(stubs.folder / "home"), **environment)
    mounts, folder = re.findall(r"^apptainer exec --nv --bind (.*) --pwd (.*) image.sif ", stubs.called, re.MULTILINE)[
        -1
    ]
    pairs = [mount.split(":") for mount in mounts.split(",")]
    assert all(outside == inside for outside, inside in pairs) and folder == str(stubs.folder)
    assert "--kill-on-bad-exit=1" in stubs.called
    return [outside for outside, _ in pairs]


def test_a_container_sees_all_that_the_config_names(stubs: Stubs, tmp_path_factory, tiny_llama, monkeypatch) -> None:
    """Also the ends of links: a data file in the submit folder that lies elsewhere, a downloaded model's blobs."""
    away = tmp_path_factory.mktemp("elsewhere")
    for name in ("snapshots/1", "blobs", "data", "lake", "here", "cache", "more"):
        (away / name).mkdir(parents=True)
    for file in tiny_llama("llama31").iterdir():
        (away / "blobs" / file.name).write_bytes(file.read_bytes())
        (away / "snapshots" / "1" / file.name).symlink_to(away / "blobs" / file.name)
    (away / "data" / "train.jsonl").touch()
    (away / "lake" / "eval.jsonl").touch()
    monkeypatch.chdir(stubs.folder)
    (stubs.folder / "eval.jsonl").symlink_to(away / "lake" / "eval.jsonl")
    path = config(
        stubs.folder,
        model={"name": str(away / "snapshots" / "1")},
        data={
            "train": [str(away / "data" / "train.jsonl"), "org/on-the-hub"],
            "eval": "eval.jsonl",
            "cache_dir": str(away / "cache" / "new"),
        },
        runs_dir=str(away / "runs"),
    )
    script = make_script(request(stubs.folder, path, container="image.sif", binds=(away / "more",)))
    named = {str(away / name) for name in ("snapshots/1", "blobs", "data", "lake", "runs", "cache/new", "more")}
    caches = {str(stubs.folder / "home" / ".cache" / name) for name in ("huggingface", "dist_lora")}
    assert set(seen_in(stubs, script)) == {str(stubs.folder)} | named | caches
    assert all(Path(mount).is_dir() for mount in named | caches), "apptainer refuses what isn't there"
    elsewhere = {"HF_HUB_CACHE": str(away / "hub"), "HF_HOME": str(away / "hf")}
    assert set(elsewhere.values()) <= set(seen_in(stubs, script, **elsewhere))


def test_a_container_that_cannot_see_a_path_is_refused(tmp_path: Path, tmp_path_factory) -> None:
    odd = tmp_path_factory.mktemp("a,b")
    with pytest.raises(ConfigError, match=r"--container: '.*a,b.*' can't be bound: its name has a comma or a colon"):
        make_script(request(tmp_path, config(tmp_path, runs_dir=str(odd)), container="image.sif"))
    with pytest.raises(ConfigError, match=r"--bind: /not/there doesn't exist"):
        make_script(request(tmp_path, container="image.sif", binds=(Path("/not/there"),)))
    with pytest.raises(ConfigError, match=r"--bind: there is no --container to bind it in"):
        make_script(request(tmp_path, binds=(tmp_path,)))


@pytest.mark.parametrize("container", ["image.sif", "nvcr.io/x:1"])
def test_shellcheck_finds_nothing_in_a_script_with_everything(tmp_path: Path, container: str) -> None:
    asked = request(tmp_path, config(tmp_path), config(tmp_path, "other"), container=container, setup=("module load cuda",),
                    launcher="torchrun", environment=("A=b",))  # fmt: skip
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", "-"], input=make_script(asked), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout


# What is asked of Slurm


def lines_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("changes", "is_whole"),
    [
        ({"gpus_per_node": 2}, False),
        ({"gpus_per_node": 8}, True),
        ({"gpus_per_node": 4, "gpu": find_gpu("gb200")}, True),
        ({"gpus_per_node": 2, "is_exclusive": True}, True),
        ({"gpus_per_node": 8, "is_exclusive": False}, False),
    ],
    ids=str,
)
def test_whole_nodes_are_taken_with_all_their_memory(tmp_path: Path, changes: dict[str, Any], is_whole: bool) -> None:
    script = make_script(request(tmp_path, **changes))
    assert ("--exclusive" in lines_of(script), "--mem=0" in lines_of(script)) == (is_whole, is_whole)
    assert ("--no-exclusive if yours have more" in script) is (is_whole and "is_exclusive" not in changes)


def test_the_type_of_gpu_is_asked_for_by_slurms_name(tmp_path: Path) -> None:
    assert "--gpus-per-node=nvidia_h100:2" in lines_of(make_script(request(tmp_path, gpu_type="nvidia_h100")))


@pytest.mark.parametrize(
    ("typed", "without"),
    [
        ("--gres=gpu:h100:2", "--gpus-per-node"),
        ("-G 6", "--gpus-per-node"),
        ("--gpus-per-node h100:2", "--gpus-per-node=2"),
        ("--mem=500G", "--mem="),
        ("--mem-per-gpu=60G", "--mem="),
        ("-t 1:00:00", "--time="),
        ("-pbig", "##SBATCH --partition"),
        ("--partition big", "##SBATCH --partition"),
        ("-A lab", "##SBATCH --account"),
        ("--output=log-%j.txt", "slurm-%j.out"),
        ("-J mine", "--job-name"),
        ("--no-requeue", "--requeue"),
        ("--signal=B:USR1@300", "--signal=USR1"),
        ("--oversubscribe", "--exclusive"),
    ],
)
def test_nothing_is_said_twice(tmp_path: Path, typed: str, without: str) -> None:
    plain = make_script(request(tmp_path, is_exclusive="oversub" in typed or None))
    found = make_script(
        request(tmp_path, is_exclusive=None, extra=(typed,), gpus_per_node=8 if "oversub" in typed else 2)
    )
    head, others = (script.partition("\nset -")[0] for script in (plain, found.replace(f"#SBATCH {typed}\n", "")))
    assert without in head and without not in others and others != found
    assert ("mkdir -p" in found) is ("output" not in typed)


def test_an_option_that_says_something_else_stands_beside_ours(tmp_path: Path) -> None:
    lines = lines_of(make_script(request(tmp_path, extra=("--gres=nvme:1", "-q high", "--exclude=gpu7"))))
    assert lines[-3:] == ["--gres=nvme:1", "-q high", "--exclude=gpu7"] and "--gpus-per-node=2" in lines


def test_a_time_limit_of_sbatch_shortens_the_notice_as_ours_does(tmp_path: Path) -> None:
    assert "--signal=USR1@30" in lines_of(make_script(request(tmp_path, extra=("--time=1",))))
    assert "--signal=USR1@30" in lines_of(make_script(request(tmp_path, time="1")))


def test_the_log_lies_in_the_runs_folder_which_submitting_makes(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{stubs.bin}:/usr/bin:/bin")
    stubs.write(stubs.bin / "sbatch", f'[[ -d "{stubs.folder}/new runs/it" ]] && echo 88')
    job = make_job(request(stubs.folder, config(stubs.folder, runs_dir=str(stubs.folder / "new runs"))))
    assert f'--output="{stubs.folder}/new runs/it/slurm-%j.out"' in lines_of(job.script)
    assert f"mkdir -p '{stubs.folder}/new runs/it'" in job.script
    assert submit(job) == "88"
    (stubs.folder / "file").touch()
    with pytest.raises(ConfigError, match=r"--submit: .*file/it, for the job's log, can't be made: Not a directory"):
        submit(make_job(request(stubs.folder, config(stubs.folder, runs_dir=str(stubs.folder / "file")))))


def test_the_log_of_an_arrays_task_is_linked_in_its_runs_folder(stubs: Stubs) -> None:
    other = config(stubs.folder, "other")
    stubs.python("exit 9")
    script = make_script(request(stubs.folder, config(stubs.folder), other))
    assert f'--output="{stubs.folder}/all runs/slurm-%x-%A_%a.out"' in lines_of(script)
    stubs.run(script, SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="1", SLURM_JOB_NAME="dist-lora")
    link = stubs.folder / "all runs" / "other" / "slurm-dist-lora-70_1.out"
    assert link.readlink() == (stubs.folder / "all runs" / "slurm-dist-lora-70_1.out").resolve()


def test_a_gpu_that_nobody_named_is_said_to_be_assumed(tmp_path: Path) -> None:
    assumed = make_script(request(tmp_path, gpu=None))
    assert "# Planned for 3 nodes x 2 x h100-80gb, a type of GPU that nobody named: give --gpu" in assumed
    assert "nobody named" not in make_script(request(tmp_path))


def test_memory_time_and_notice_are_the_plans(tmp_path: Path) -> None:
    path = config(tmp_path)
    told = CliRunner().invoke(app, ["plan", str(path), "--nodes", "3", "--gpus-per-node", "2", "--json"]).stdout
    plan = yaml.safe_load(told)
    script = make_script(request(tmp_path, path))
    memory = re.search(r"--mem=(\d+)G", script)
    limit = re.search(r"--time=(\d+):(\d\d):00", script)
    notice = re.search(r"--signal=USR1@(\d+)", script)
    assert memory and limit and notice
    # A fifth more than the plan's, and 4 GiB for each of two ranks' CUDA and NCCL; in whole GiB.
    assert 0 <= int(memory[1]) * 2**30 - (1.2 * plan["host_bytes_a_node"] + 2 * 4 * 2**30) < 2**30
    slowest_s = 1000 * plan["step_s"][1]
    assert slowest_s + 1800 <= 3600 * int(limit[1]) + 60 * int(limit[2]) <= slowest_s + 1800 + 900
    assert int(notice[1]) >= 120 + 2 * plan["step_s"][1]


@pytest.mark.parametrize(
    ("time_limit", "notice_s"),
    [
        (None, 500),
        ("1", 30),
        ("8:00", 120),
        ("8:00:00", 500),
        ("0-1", 500),
        ("1-00:00:00", 500),
        ("0:10:00", 150),
        ("20", 300),
    ],
)
def test_a_notice_is_a_quarter_of_a_short_job_at_most(time_limit: str | None, notice_s: int) -> None:
    assert _within(time_limit, 500) == notice_s


# What is wrong


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_nodes": 0}, "--nodes: found 0, expected 1 or more"),
        ({"gpus_per_node": 0, "cpus_per_gpu": 0}, "--gpus-per-node: found 0.*\n--cpus-per-gpu: found 0"),
        ({"time": "tomorrow"}, "--time: found 'tomorrow', expected minutes"),
        ({"environment": ("x",)}, "--env: found 'x', expected NAME=VALUE"),
        ({"environment": ("a b=x",)}, "--env: found 'a b=x'"),
        ({"partition": "a\n#SBATCH --x"}, "--partition: found .* expected one line"),
        ({"configs": ()}, "no config is given"),
        ({"gpu_type": "h100 80"}, "--gpu-type: found 'h100 80', expected a type as in sinfo's gres"),
        (
            {"setup": ("if true; then",)},
            "--setup: found 'if true; then', expected a whole command of bash, which says: ",
        ),
        ({"extra": ("qos=high",)}, "--sbatch: found 'qos=high', expected an option of sbatch, like --qos=high"),
        ({"extra": ("--nodes=3",)}, "--sbatch: --nodes=3 would contradict the script: use --nodes"),
        ({"extra": ("-n 3",)}, "--sbatch: -n 3 would contradict the script: it follows from --launcher"),
        ({"extra": ("-q a", "--qos=b")}, "--sbatch: --qos is given 2 times; give it once"),
        ({"extra": ("-t 5",), "time": "6"}, "--time and --sbatch -t 5: both set it; give one of them"),
        ({"extra": ("--gres=gpu:2",), "gpu_type": "h100"}, "--gpu-type and --sbatch --gres=gpu:2: both set it"),
        ({"extra": ("--time=tomorrow",)}, "--time: found 'tomorrow', expected minutes"),
        ({"python": "a\nb", "partition": 'x"y'}, "a line of #SBATCH can't hold 'x\"y'"),
    ],
)
def test_what_cannot_be_asked_for_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(told, re.DOTALL)):
        make_script(request(tmp_path, **changes))


def test_the_config_names_the_machines_that_are_not_typed(tmp_path: Path) -> None:
    named = {"gpu": "h200-141gb", "gpus_per_node": 4, "nodes": 5}
    asked = request(tmp_path, config(tmp_path, machine=named), num_nodes=None, gpus_per_node=None, gpu=None)
    script = make_script(asked)
    assert "#SBATCH --nodes=5\n" in script and "#SBATCH --gpus-per-node=4\n" in script
    assert "of 138.9 GiB per GPU" in script
    assert "#SBATCH --nodes=2\n" in make_script(replace(asked, num_nodes=2))
    two = config(tmp_path, run="two", machine=named | {"nodes": 6})
    both = replace(asked, configs=(*asked.configs, two))
    with pytest.raises(ConfigError, match=r"machine.nodes: the configs of one job have 5, 6; set one for all of them"):
        make_script(both)
    assert "#SBATCH --nodes=5\n" in make_script(replace(both, num_nodes=5))
    with pytest.raises(ConfigError, match=r"--nodes: not given, and machine.nodes of the config isn't set"):
        make_script(request(tmp_path, num_nodes=None))


def test_a_run_that_does_not_fit_gets_no_script(tmp_path: Path) -> None:
    big = config(tmp_path, model={"name": "3.1-405b", "quant": "nf4"})
    with pytest.raises(PlanError, match=r"it: 3\.1-405b needs .* GiB per GPU.* It would fit with"):
        make_script(request(tmp_path, big, gpu=find_gpu("a10g-24gb")))


def test_two_configs_of_one_run_are_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    with pytest.raises(ConfigError, match=r"both write to .*all runs/it; give each run its own name"):
        make_script(request(tmp_path, path, path))


def test_a_model_of_unknown_size_gets_a_script_without_a_plan(tmp_path: Path) -> None:
    script = make_script(request(tmp_path, config(tmp_path, model={"name": "someone/their-llama"})))
    assert "# it: not planned, since the sizes of someone/their-llama are on the hub" in script
    assert "#SBATCH --mem=0\n" in script and "\n##SBATCH --time=" in script


def test_submitting_hands_the_script_over(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(stubs.bin))
    with pytest.raises(ConfigError, match="no sbatch on the PATH"):
        submit(Job("text", ()))
    monkeypatch.setenv("PATH", f"{stubs.bin}:/usr/bin:/bin")
    stubs.write(stubs.bin / "sbatch", f'cat > "{stubs.folder}/got"; echo "88;cluster"')
    assert submit(Job("text", ())) == "88"
    assert (stubs.folder / "got").read_text() == "text"
    stubs.write(stubs.bin / "sbatch", 'echo "sbatch: error: invalid account" >&2; exit 1')
    with pytest.raises(DistLoraError, match="sbatch rejected the job: sbatch: error: invalid account"):
        submit(Job("text", ()))


def test_the_command_tells_configs_from_settings(tmp_path: Path) -> None:
    path = config(tmp_path)
    done = CliRunner().invoke(app, ["slurm", str(path), "--nodes", "1", "lora.rank=4", "--gpus-per-node", "1"])
    assert done.exit_code == 0, done.output
    assert "overrides=(lora.rank=4)" in done.stdout


# launch/slurm/


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_are_what_is_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (FOLDER / f"{name}.sbatch").read_text() == text_of(name)
    assert subprocess.run(["bash", "-n", FOLDER / f"{name}.sbatch"], check=False).returncode == 0


def test_there_is_no_other_template() -> None:
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(TEMPLATES)
