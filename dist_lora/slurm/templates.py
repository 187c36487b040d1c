"""The scripts of ``launch/slurm/``: what ``dist-lora slurm`` prints for some of ``configs/``, as examples.

``python -m dist_lora.slurm.templates --write`` regenerates them; a test checks that they are current.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from dist_lora.plan.hardware import find_gpu
from dist_lora.slurm.command import make_script
from dist_lora.slurm.job import Request

FOLDER = Path(__file__).parents[2] / "launch" / "slurm"
_ONE = Request(
    configs=(Path("configs/3.1-8b-instruct_lora_8x80gb.yaml"),),
    overrides=(),
    num_nodes=1,
    gpus_per_node=8,
    gpu=find_gpu("h100-80gb"),
    python="python",
)
_MANY = replace(_ONE, configs=(Path("configs/3.1-70b-instruct_lora_4x8x80gb.yaml"),), num_nodes=4)
_ARRAY = ("3.1-8b-instruct_lora_8x80gb", "guard-3-8b_lora_8x80gb")
TEMPLATES = {
    "one-node": _ONE,
    "many-nodes": _MANY,
    "many-nodes-torchrun": replace(_MANY, launcher="torchrun"),
    "405b": replace(_MANY, configs=(Path("configs/3.1-405b-instruct_lora_4x8x80gb.yaml"),)),
    "array": replace(_ONE, configs=tuple(Path("configs", f"{name}.yaml") for name in _ARRAY)),
}


def text_of(name: str) -> str:
    """The content of a template; called from the folder that contains ``configs/``."""
    request = TEMPLATES[name]
    typed = [*map(str, request.configs), "--nodes", str(request.num_nodes), "--python", request.python]
    if request.launcher != "srun":
        typed += ["--launcher", request.launcher]
    first, rest = make_script(request).split("\n", 1)
    return f"{first}\n# What `dist-lora slurm {' '.join(typed)}` prints.\n{rest}"


def main(arguments: list[str]) -> None:
    """The command: see the top of this file."""
    if arguments != ["--write"]:
        sys.exit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    for name in TEMPLATES:
        (FOLDER / f"{name}.sbatch").write_text(text_of(name))


if __name__ == "__main__":
    main(sys.argv[1:])
