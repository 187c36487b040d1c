"""From which checkpoint a run goes on, and whether what it is given now is still the same run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_lora.checkpoint.manifest import Manifest, read_manifest
from dist_lora.checkpoint.read import newest_whole, verify
from dist_lora.checkpoint.write import versions_here
from dist_lora.config.changes import Change, changes, rule_of
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config, OptimSection
from dist_lora.errors import CheckpointError, ConfigError
from dist_lora.lora.origin import BaseIdentity
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    path: Path
    manifest: Manifest


def find_checkpoint(config: Config, folder: Path, world: World) -> Found | None:
    """The newest whole checkpoint of a run, or what ``checkpoint.resume`` names, verified; None if there is none.

    All ranks call it, before they load anything.

    Raises:
        CheckpointError: what is named is damaged, or none of the run's is whole.
        ConfigError: the config gives settings otherwise that may not change (see ``config.changes``).
    """
    path = _path_of(config, folder, world)
    if path is None:
        return None

    def read() -> Found:
        found = Found(path, read_manifest(path))
        _check_changes(config, found, is_to_tell=world.is_first)
        return found

    return world.agree_on("the checkpoint", read)


def _path_of(config: Config, folder: Path, world: World) -> Path | None:
    wanted, root = config.checkpoint.resume, folder / "checkpoints"
    world.progress.now("looking for a checkpoint", kind="long")
    if wanted == "auto":
        return newest_whole(root, world)
    if wanted == "never":
        leftover = next(root.glob("step-*"), None) if world.is_first else None
        if leftover is not None:
            log.warning(f"checkpoint.resume: never: beginning anew beside {leftover}")
        return None
    world.on_first("checkpoint.resume", lambda: verify(wanted))
    return wanted


def check_same_run(found: Found, *, base: BaseIdentity, data: str, world: World) -> None:
    """Raise on all ranks where a checkpoint was trained beside other weights or on other samples than there are now.

    Args:
        data: the fingerprint of the training set; only the first rank's counts.

    Raises:
        ConfigError: naming both.
    """

    def check() -> None:
        try:
            then = BaseIdentity(**found.manifest.base)
        except TypeError as error:
            raise CheckpointError(f"{found.path}: what its manifest says of the base can't be read: {error}") from error
        other = then.differences(base)
        if other:
            raise ConfigError(f"model.name: {found.path} was trained beside another base: {'; '.join(other)}. {_AGAIN}")
        trained_on = found.manifest.progress.get("data")
        if trained_on not in (None, data):
            raise ConfigError(
                f"data.train: {found.path} was trained on other samples: their fingerprint is {data} now and was "
                f"{trained_on}: a file was edited, or the tokenizer, its template or a rule of data is another. {_AGAIN}"
            )

    world.on_first("the base and the data of the checkpoint", check)


_AGAIN = "Bring back what it began with, name another run (run=NAME), or begin anew with checkpoint.resume=never."


def _check_changes(config: Config, found: Found, *, is_to_tell: bool) -> None:
    """Raise where settings changed that may not, and say which changed that may but count."""
    try:
        before = yaml.safe_load(found.manifest.config)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{found.path}: the config in its manifest is not YAML: {error}") from error
    if not isinstance(before, Mapping):
        raise CheckpointError(f"{found.path}: the config in its manifest is no tree of settings")
    by_effect: dict[str, list[Change]] = {"free": [], "logged": [], "refused": []}
    for change in changes(before, yaml.safe_load(dump_config(config))):
        rule = rule_of(change.name)
        by_effect[rule.effect if rule else "refused"].append(change)
    if by_effect["refused"]:
        told = "".join(
            f"\n  {c.name}: the run has {c.before!r}, the config says {c.now!r}" for c in by_effect["refused"]
        )
        raise ConfigError(f"{found.path} is of a run with other settings:{told}\n{_AGAIN}")
    if by_effect["logged"] and is_to_tell:
        log.warning(f"{found.path} goes on with other settings: {'; '.join(map(str, by_effect['logged']))}")


def best_of(found: Found) -> tuple[int | None, float]:
    """Step and held-out loss of the best evaluation so far; None and infinity where there was none.

    Raises:
        CheckpointError: the manifest says neither.
    """
    step, loss = (found.manifest.progress.get(name) for name in ("best_step", "best_loss"))
    if step is None and loss is None:
        return None, math.inf
    if not isinstance(step, int) or not isinstance(loss, int | float):
        raise CheckpointError(
            f"{found.path}: its manifest has best_step {step!r} and best_loss {loss!r}, expected numbers"
        )
    return step, float(loss)


def last_evaluated(found: Found) -> int:
    """The step of the last evaluation, 0 before the first; the checkpoint's own where it doesn't say."""
    step = found.manifest.progress.get("evaluated_step", found.manifest.step)
    return step if isinstance(step, int) else 0


def warn_of_other_lr(found: Found, config: Config, *, num_steps: int) -> None:
    """Say so where the next step's learning rate is not the one that the run would have had."""
    step = found.manifest.step + 1
    try:
        section = OptimSection.model_validate(yaml.safe_load(found.manifest.config)["optim"])
        before = lr_at(step, section=section, num_steps=int(found.manifest.progress["num_steps"]))
    except (KeyError, TypeError, ValueError):
        return  # of a version that wrote it otherwise: what it would have been is not known
    now = lr_at(step, section=config.optim, num_steps=num_steps)
    if now != before:
        log.warning(f"the learning rate of step {step} is {now:.4g}, and was to be {before:.4g}")


def warn_of_versions(path: Path, then: Mapping[str, str]) -> None:
    """Say so where what computes a run is of another minor version than when it was saved."""
    now = versions_here()
    others = [
        f"{name} {then[name]} then, {now[name]} now"
        for name in ("torch", "transformers")
        if name in then and then[name].split(".")[:2] != now[name].split(".")[:2]
    ]
    if others:
        log.warning(
            f"{path} was saved by other versions: {'; '.join(others)}. The run goes on, and its losses may not be "
            "those it would have had"
        )
