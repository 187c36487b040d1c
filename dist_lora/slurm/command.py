"""The work behind ``dist-lora slurm``."""

from __future__ import annotations

import shutil
import subprocess

from dist_lora.errors import ConfigError, DistLoraError
from dist_lora.slurm.job import Request, needs_of, runs_of
from dist_lora.slurm.script import script_of


def make_script(request: Request) -> str:
    """The script of a request.

    Raises:
        ConfigError, PlanError: see ``job``.
    """
    runs = runs_of(request)
    return script_of(request, runs, needs_of(request, runs))


def submit(script: str) -> str:
    """Hand a script to sbatch, as if it lay in the working folder; returns the job's number.

    Raises:
        ConfigError: there is no sbatch here.
        DistLoraError: sbatch refuses, with what it says.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: no sbatch on the PATH: leave --submit out, and hand the script to it where there is one"
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistLoraError(f"--submit: sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
