"""Python imports this at its start where this folder is on PYTHONPATH: it lets a fault into each rank of a run."""

import os

if {"RANK", "SLURM_STEP_ID"} & set(os.environ) and "DIST_LORA_FAULT" in os.environ:
    from tests.e2e import faults

    getattr(faults, os.environ["DIST_LORA_FAULT"])()
