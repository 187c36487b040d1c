"""The peers' own virtual environment, with the versions of constraints.txt wherever that names them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "peers"
CONSTRAINTS = ROOT / "constraints.txt"
# In this order: torch first, which others are built beside; deepspeed has no wheel. torchtune's last release is older than
# torch 2.13, and works with this torchao.
STEPS = (
    ("torch==2.13.0", "numpy", "setuptools", "wheel", "ninja"),
    ("transformers", "peft", "accelerate", "bitsandbytes", "trl==1.16.0", "torchtune==0.6.1", "torchao==0.16.0"),
    ("--no-build-isolation", "deepspeed"),
)


def peers_python() -> Path:
    """The environment's Python; it is made at the first call, by pip's configured index.

    Raises:
        SystemExit: pip fails.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "made"
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + repr(STEPS).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {FOLDER}", file=sys.stderr)
    venv.create(FOLDER, clear=True, symlinks=True, with_pip=True)
    for packages in STEPS:
        command = [str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), *packages]
        if subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=False).returncode:
            sys.exit(f"{' '.join(command)}: pip failed; see its message above")
    stamp.write_text(wanted)
    return python
