"""A program on a leash: its exit code, its output, and that it ends with all that it has started when it has to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_lora.supervision.leash import Ended, run_leashed, without_launcher

# A program that has started another one, which writes both their numbers and deafens itself to a kind end.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
child = "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \\
    "pathlib.Path(sys.argv[1] + '.new').write_text(f'{os.getppid()} {os.getpid()}'); " \\
    "os.rename(sys.argv[1] + '.new', sys.argv[1]); time.sleep(600)"
subprocess.run([sys.executable, "-c", child, sys.argv[1]])
"""
# A rank that waits for it.
RANK = """
import pathlib, sys
from dist_lora.supervision.leash import run_leashed
here = pathlib.Path(sys.argv[1])
run_leashed([sys.executable, "-c", sys.argv[2], str(here / "numbers")], environment={}, stdout=here / "out", stderr=here / "err",
            timeout_s=600, is_to_stop=lambda: False)
"""
DEADLINE_S = 60.0


def leashed(
    folder: Path,
    *words: str,
    timeout_s: float = DEADLINE_S,
    is_to_stop: Callable[[], bool] = lambda: False,
    **environment: str,
) -> Ended:
    return run_leashed(
        words,
        environment=environment,
        stdout=folder / "out",
        stderr=folder / "err",
        timeout_s=timeout_s,
        is_to_stop=is_to_stop,
    )


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("code", "ended"), [("print(1)", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_program_ends_with_its_exit_code_and_its_output_is_in_files(tmp_path, code: str, ended: int) -> None:
    assert leashed(tmp_path, sys.executable, "-c", code) == ended
    assert (tmp_path / "out").read_text() == ("1\n" if ended == 0 else "")


def test_no_shell_reads_the_words_and_the_environment_is_the_given_one(tmp_path) -> None:
    shown = "import os, sys; print(sys.argv[1:], os.environ.get('OURS'), os.environ.get('HOME'), sys.stdin.read())"
    assert leashed(tmp_path, sys.executable, "-c", shown, "a b", "$HOME; *", OURS="7") == 0
    assert (tmp_path / "out").read_text() == "['a b', '$HOME; *'] 7 None \n"


def test_what_can_not_be_started_is_told(tmp_path) -> None:
    assert leashed(tmp_path, str(tmp_path / "nowhere")) == 127
    assert (tmp_path / "err").read_text() == f"{tmp_path / 'nowhere'}: can't be started: No such file or directory\n"


@pytest.mark.parametrize("cause", ["timeout", "stopped", "an error"])
def test_it_is_killed_with_what_it_has_started(tmp_path, cause: str) -> None:
    numbers = tmp_path / "numbers"

    def is_to_stop() -> bool:
        if not numbers.exists() or cause == "timeout":
            return False
        if cause == "an error":
            raise InterruptedError("another rank has failed")
        return True

    def run() -> Ended:
        # A time limit that is over once the family is complete, on a machine of any speed.
        return leashed(tmp_path, sys.executable, "-c", FAMILY, str(numbers), timeout_s=limit_s, is_to_stop=is_to_stop)

    limit_s = DEADLINE_S
    if cause == "timeout":
        limit_s = 0.3
        assert run() == "timeout"
        return
    if cause == "an error":
        with pytest.raises(InterruptedError):
            run()
    else:
        assert run() == "stopped"
    wait_until(lambda: not any(is_there(int(number)) for number in numbers.read_text().split()))


def test_it_ends_with_a_process_that_was_killed(tmp_path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), FAMILY])
    try:
        wait_until((tmp_path / "numbers").exists)
        family = [int(number) for number in (tmp_path / "numbers").read_text().split()]
        assert all(map(is_there, family))
    finally:
        os.kill(rank.pid, signal.SIGKILL)
        rank.wait()
    wait_until(lambda: not any(map(is_there, family)))


def test_launchers_are_left_out_of_an_environment() -> None:
    told = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "GROUP_RANK": "0",
        "DIST_LORA_PARENT": "3", "DIST_LORA_RENDEZVOUS": "f", "PMI_RANK": "0",
    }  # fmt: skip
    kept = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "SLURM_JOB_ID": "7",
        "HF_HOME": "/h",
        "DIST_LORA_CACHE": "/c",
        "PYTHONPATH": ".",
    }
    assert without_launcher(told | kept) == kept
