"""The work behind ``dist-lora slurm``."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dist_lora.errors import ConfigError, DistLoraError
from dist_lora.slurm.job import Request, needs_of, runs_of
from dist_lora.slurm.script import log_folders, script_of


@dataclass(frozen=True)
class Job:
    """A batch script, and the folders that must exist when it is submitted."""

    script: str
    log_folders: tuple[Path, ...]


def make_job(request: Request) -> Job:
    """The batch script for a request.

    Raises:
        ConfigError, PlanError: see ``job``.
    """
    runs = runs_of(request)
    return Job(script_of(request, runs, needs_of(request, runs)), tuple(log_folders(request, runs)))


def make_script(request: Request) -> str:
    """The text of ``make_job``."""
    return make_job(request).script


def submit(job: Job) -> str:
    """Submit a job with sbatch from the working folder, after making the folders of its log; returns the job ID.

    Raises:
        ConfigError: sbatch isn't installed, or a folder can't be made.
        DistLoraError: sbatch rejects the job, with its message.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: no sbatch on the PATH: leave --submit out, and submit the script where there is one"
        )
    for folder in job.log_folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--submit: {folder}, for the job's log, can't be made: {error.strerror or error}. Set runs_dir to a writable folder"
            ) from None
    done = subprocess.run(["sbatch", "--parsable"], input=job.script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistLoraError(f"--submit: sbatch rejected the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
