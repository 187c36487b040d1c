"""The folders of a run's checkpoints by their names; needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from dist_lora.errors import CheckpointError

_STEP = re.compile(r"step-([0-9]{8})")


def step_folder(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is not the name of one."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> dict[int, Path]:
    """All folders ``step-########`` of ``root`` by step, newest first, complete or not; none if ``root`` doesn't exist.

    Raises:
        CheckpointError: ``root`` can't be listed.
    """
    try:
        folders = {step: path for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{root} can't be listed for checkpoints: {error.strerror or error}") from error
    return dict(sorted(folders.items(), reverse=True))
