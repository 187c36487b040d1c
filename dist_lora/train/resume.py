"""Which checkpoint a run resumes from, and whether the config, base and data are still those of the same run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_lora.checkpoint.folders import step_of
from dist_lora.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from dist_lora.checkpoint.read import newest_intact, newest_intact_here, verify
from dist_lora.checkpoint.write import versions_here
from dist_lora.config.changes import Change, changes, rule_of, short
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config, OptimSection
from dist_lora.errors import CheckpointError, ConfigError
from dist_lora.files import file_exists, no_folder
from dist_lora.lora.origin import BaseIdentity, RunOrigin
from dist_lora.run_folder.status import job_of
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

NOT_EVALUATED = -1
"""The step of the last evaluation where there was none yet: one may be before the first step."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint that was verified as intact."""

    path: Path
    manifest: Manifest


def find_checkpoint(config: Config, folder: Path, world: World) -> VerifiedCheckpoint | None:
    """The newest intact checkpoint of a run, or what ``checkpoint.resume`` names, verified; None if there is none.

    All ranks call it, before they load anything.

    Raises:
        CheckpointError: the named one is damaged, or none of the run's is intact.
        ConfigError: the named one doesn't exist, or the config changes settings that must not change (see ``config.changes``).
    """
    path = _path_of(config, folder, world)
    if path is None:
        return None

    def read() -> VerifiedCheckpoint:
        checkpoint = VerifiedCheckpoint(path, read_manifest(path))
        _check_changes(config, checkpoint, is_to_log=world.is_first)
        return checkpoint

    return world.agree_on("the checkpoint", read)


def _path_of(config: Config, folder: Path, world: World) -> Path | None:
    wanted, root = config.checkpoint.resume, folder / "checkpoints"
    world.progress.now("looking for a checkpoint", kind="long")
    if wanted != "auto":
        own = world.once("checkpoint.resume", lambda: _own_of_job(root, wanted).encode()).decode()
        if own:
            return Path(own)
    if wanted == "auto":
        return newest_intact(root, world)
    if wanted == "never":
        leftover = next(root.glob("step-*"), None) if world.is_first else None
        if leftover is not None:
            log.warning(f"checkpoint.resume: never: starting over, although {leftover} exists")
        return None
    world.on_first("checkpoint.resume", lambda: _verify_named(wanted))
    return wanted


def _own_of_job(root: Path, wanted: str | Path) -> str:
    """The newest intact checkpoint, if an earlier start of this job saved it after it began as ``wanted`` asks; "" if not."""
    job, is_restarted = job_of(os.environ)
    if not is_restarted:
        return ""
    try:
        path = newest_intact_here(root)
        begun_by = None if path is None else read_manifest(path).progress.get("begun_by")
    except CheckpointError:  # of checkpoints that aren't asked for
        return ""
    return str(path) if begun_by == [job, str(wanted)] else ""


def _verify_named(path: Path) -> None:
    """Verify the checkpoint that ``checkpoint.resume`` names.

    Raises:
        ConfigError: it isn't one.
        CheckpointError: it is damaged.
    """
    problem = no_folder(path)
    if problem is None and step_of(path) is None and not file_exists(path / MANIFEST_FILE):
        problem = f"holds no {MANIFEST_FILE}"
    if problem is not None:
        raise ConfigError(
            f"checkpoint.resume: {path}: {problem}; expected a checkpoint's folder, like "
            "runs/NAME/checkpoints/step-00000200, or auto or never"
        )
    verify(path)


def check_same_run(
    checkpoint: VerifiedCheckpoint, *, base: BaseIdentity, folder: Path, data: str, world: World
) -> None:
    """Raise on all ranks if a checkpoint was trained on another base or tokenizer, or on other samples, than now.

    Args:
        folder: of the base, with its tokenizer.
        data: the fingerprint of the training set; only the first rank's is used.

    Raises:
        ConfigError: they differ; names both.
    """

    def check() -> None:
        try:
            then = BaseIdentity(**checkpoint.manifest.base)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.path}: the base in its manifest can't be read: {error}") from error
        differences = then.differences(base)
        if differences:
            raise ConfigError(
                f"model.name: {checkpoint.path} was trained on another base: {'; '.join(differences)}. {_WHAT_TO_DO}"
            )
        manifest = f"{checkpoint.path / MANIFEST_FILE}: progress.origin"
        origin = RunOrigin.of_json(checkpoint.manifest.progress.get("origin"), where=manifest)
        if other := origin.other_vocabulary(folder):
            raise ConfigError(f"model.name: {checkpoint.path} was trained {other}. {_WHAT_TO_DO}")
        trained_on = checkpoint.manifest.progress.get("data")
        if trained_on not in (None, data):
            raise ConfigError(
                f"data.train: {checkpoint.path} was trained on other samples: their fingerprint is {data} now and was "
                f"{trained_on}: a file was edited, or the tokenizer, its template, a setting of data or a weight of its sets changed. {_WHAT_TO_DO}"
            )

    world.on_first("the base and the data of the checkpoint", check)


_WHAT_TO_DO = "Restore what it started with, name another run (run=NAME), or start over with checkpoint.resume=never."


def _check_changes(config: Config, checkpoint: VerifiedCheckpoint, *, is_to_log: bool) -> None:
    """Raise if settings changed that must not, and log those that may change but affect the run."""
    try:
        before = yaml.safe_load(checkpoint.manifest.config)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{checkpoint.path}: the config in its manifest is not YAML: {error}") from error
    if not isinstance(before, Mapping):
        raise CheckpointError(f"{checkpoint.path}: the config in its manifest is not a mapping of settings")
    by_effect: dict[str, list[Change]] = {"free": [], "logged": [], "refused": []}
    for change in changes(before, yaml.safe_load(dump_config(config))):
        rule = rule_of(change.name)
        by_effect[rule.effect if rule else "refused"].append(change)
    if by_effect["refused"]:
        lines = "".join(
            f"\n  {c.name}: the run has {short(c.before)}, the config says {short(c.now)}" for c in by_effect["refused"]
        )
        raise ConfigError(f"{checkpoint.path} is of a run with other settings:{lines}\n{_WHAT_TO_DO}")
    if by_effect["logged"] and is_to_log:
        log.warning(f"resuming {checkpoint.path} with other settings: {'; '.join(map(str, by_effect['logged']))}")


def best_of(checkpoint: VerifiedCheckpoint) -> tuple[int | None, float]:
    """Step and held-out loss of the best evaluation so far; None and infinity if there was none.

    Raises:
        CheckpointError: the manifest's values are of another type.
    """
    step, loss = (checkpoint.manifest.progress.get(name) for name in ("best_step", "best_loss"))
    if step is None and loss is None:
        return None, math.inf
    if not isinstance(step, int) or not isinstance(loss, int | float):
        raise CheckpointError(
            f"{checkpoint.path}: its manifest has best_step {step!r} and best_loss {loss!r}, expected numbers"
        )
    return step, float(loss)


def last_evaluated(checkpoint: VerifiedCheckpoint) -> int:
    """The step of the last evaluation, ``NOT_EVALUATED`` before the first; the checkpoint's own if it isn't recorded."""
    step = checkpoint.manifest.progress.get("evaluated_step", checkpoint.manifest.step)
    return step if isinstance(step, int) else NOT_EVALUATED


def why_other_best(checkpoint: VerifiedCheckpoint, config: Config, held_out: Mapping[str, str]) -> str:
    """Why a checkpoint's best loss can't be compared with those to come, in words; "" if it can.

    Args:
        held_out: the fingerprints of the held-out sets by name, of those that are files of their own.
    """
    progress = checkpoint.manifest.progress
    if progress.get("best_set") != config.eval.best_set:
        return "eval.best_set is another one than before"
    before = progress.get("held_out")  # not recorded by an earlier version
    if isinstance(before, Mapping) and dict(before) != dict(held_out):
        return "data.eval has other samples than before"
    return ""


def stale_evaluations(checkpoint: VerifiedCheckpoint, config: Config, held_out: Mapping[str, str]) -> int:
    """How many evaluations in a row had no lower loss than the best; 0 where that isn't recorded, or can't be compared."""
    number = checkpoint.manifest.progress.get("stale_evaluations", 0)
    return number if isinstance(number, int) and not why_other_best(checkpoint, config, held_out) else 0


def warn_of_other_lr(checkpoint: VerifiedCheckpoint, config: Config, *, num_steps: int) -> None:
    """Warn if the next step's learning rate is not the one that the run would have had."""
    step = checkpoint.manifest.step + 1
    try:
        section = OptimSection.model_validate(yaml.safe_load(checkpoint.manifest.config)["optim"])
        before = lr_at(step, section=section, num_steps=int(checkpoint.manifest.progress["num_steps"]))
    except (KeyError, TypeError, ValueError):
        return  # written by another version: the former learning rate is not known
    now = lr_at(step, section=config.optim, num_steps=num_steps)
    if now != before:
        log.warning(f"the learning rate of step {step} is {now:.4g}, and would have been {before:.4g}")


def warn_of_versions(path: Path, then: Mapping[str, str]) -> None:
    """Warn if a library that computes the run has another minor version than when it was saved."""
    now = versions_here()
    changed = [
        f"{name} {then[name]} then, {now[name]} now"
        for name in ("torch", "transformers")
        if name in then and then[name].split(".")[:2] != now[name].split(".")[:2]
    ]
    if changed:
        log.warning(
            f"{path} was saved by other versions: {'; '.join(changed)}. The run continues, and its losses may "
            "differ from those it would have had"
        )
