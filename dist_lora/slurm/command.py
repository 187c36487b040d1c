"""The work behind ``dist-lora slurm``."""

from __future__ import annotations

import shutil
import subprocess

from dist_lora.errors import ConfigError, DistLoraError
from dist_lora.slurm.job import Request, needs_of, runs_of
from dist_lora.slurm.script import script_of


def make_script(request: Request) -> str:
    """The batch script for a request.

    Raises:
        ConfigError, PlanError: see ``job``.
    """
    runs = runs_of(request)
    return script_of(request, runs, needs_of(request, runs))


def submit(script: str) -> str:
    """Submit a script with sbatch from the working folder; returns the job ID.

    Raises:
        ConfigError: sbatch isn't installed.
        DistLoraError: sbatch rejects the job, with its message.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: no sbatch on the PATH: leave --submit out, and submit the script where there is one"
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistLoraError(f"--submit: sbatch rejected the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
