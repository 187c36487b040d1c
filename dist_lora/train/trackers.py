"""The experiment trackers of a run, by accelerate: their options, and one run in each through all restarts."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_lora.errors import ConfigError
from dist_lora.files import read_json, write_whole
from dist_lora.run_folder.attempt import TRACKERS_FILE

Options = Mapping[str, Mapping[str, Any]]
"""``log.tracker_options``: by the tracker's name."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` naming the trackers whose packages are not installed, before minutes of loading."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]  # each is named like its package
    if missing:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)}: not installed here. Install {'it' if len(missing) == 1 else 'them'} "
            f"(pip install {' '.join(name.replace('_', '-') for name in missing)}), or leave it out: log.trackers=[]"
        )


def start_tracker(
    name: str, folder: Path, settings: Mapping[str, Any], *, options: Mapping[str, Any], first_step: int
) -> Any:
    """One of accelerate's trackers, by accelerate's name for it, started.

    wandb and mlflow continue the run whose id is in the run's folder (``trackers.json``); tensorboard goes on in its
    own folder there. For the others each start is a run of its own.

    Raises:
        ConfigError: it couldn't be started; its own message is in the error's.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    _init_accelerate_alone()
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    try:
        if name == "tensorboard":
            # Its own folder is RUN/tensorboard. What a killed process wrote of later steps is purged.
            tracker = kind("tensorboard", purge_step=first_step, **place, **options)
            tracker.start()
            _silence_writers()
        elif name == "wandb":
            tracker = _start_wandb(kind, folder, options)
            tracker.store_init_configuration(dict(settings))
        elif name == "mlflow":
            tracker = _start_mlflow(kind, folder, settings, options)
        else:
            tracker = kind(folder.name, **place, **options)
            tracker.start()
            tracker.store_init_configuration(dict(settings))
    except Exception as error:  # each has its own exceptions: not logged in, no server, a missing package
        raise ConfigError(
            f"log.trackers: {name} couldn't be started: {type(error).__name__}: {error}. Fix that, or leave it out"
        ) from error
    return tracker


def _start_wandb(kind: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """W&B's run of this run: its project and its name are the run's, unless the options say otherwise."""
    more = {"name": folder.name, **options}
    project = more.pop("project", folder.name)
    run_id = _ids(folder).get("wandb")
    if run_id is None:
        run_id = uuid.uuid4().hex[:16]
        _keep_id(folder, "wandb", run_id)  # before it exists there: a start that is killed leaves no second run
    tracker = kind(project, id=run_id, resume="allow", **more)
    tracker.start()
    return tracker


def _start_mlflow(kind: Any, folder: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """MLflow's run of this run; its server chooses the id."""
    run_id = _ids(folder).get("mlflow")
    tracker = kind(**{"experiment_name": folder.name, "run_name": folder.name, "run_id": run_id, **options})
    tracker.start()
    if run_id is None:  # MLflow refuses parameters that differ from those that a run has already
        _keep_id(folder, "mlflow", str(tracker.tracker.info.run_id))
        tracker.store_init_configuration(dict(settings))
    return tracker


def _ids(folder: Path) -> dict[str, str]:
    try:
        content = read_json(folder / TRACKERS_FILE)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, str)}


def _keep_id(folder: Path, name: str, run_id: str) -> None:
    write_whole(folder / TRACKERS_FILE, json.dumps(_ids(folder) | {name: run_id}) + "\n")


def _silence_writers() -> None:
    """Keep TensorBoard's writing thread from printing the error that its next ``log`` raises too."""
    before = threading.excepthook

    def hook(uncaught: threading.ExceptHookArgs) -> None:
        if not type(uncaught.thread).__module__.startswith("tensorboard."):
            before(uncaught)

    threading.excepthook = hook


def _init_accelerate_alone() -> None:
    """Initialize accelerate's state without a launcher's variables, with which it would open a process group."""
    from accelerate import PartialState

    hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        PartialState()
    finally:
        os.environ |= hidden
