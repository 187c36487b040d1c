"""The code of a user's own that a run's config names: all of it checked at the start, and its hashes kept with the run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.data.own_format import own_format
from dist_lora.evaluation.own_metrics import own_metrics
from dist_lora.own_code import all_of, hash_of, is_own, load_code
from dist_lora.train.callbacks import check_hooks, code_of_object, own_callbacks
from dist_lora.train.resume import VerifiedCheckpoint
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


def check_own_code(config: Config, world: World, *, is_training: bool = True, callbacks: Sequence[Any] = ()) -> None:
    """Import the user's own code that a config names, before minutes of loading. All ranks call it.

    Args:
        is_training: else ``train.callbacks`` are left alone.
        callbacks: objects with hooks that a script has made.

    Raises:
        ConfigError: some of it can't be used; names all faults.
    """

    def check() -> None:
        loads: list[Callable[[], Any]] = [lambda: own_format(config.data.format), lambda: own_metrics(config)]
        if is_training:
            loads.append(lambda: own_callbacks(config))
        all_of([*loads, *(functools.partial(check_hooks, code_of_object(callback)) for callback in callbacks)])

    named = [(setting, path) for setting, path in _named(config) if is_training or setting != "train.callbacks"]
    if named or callbacks:
        world.progress.now("importing code of your own", kind="unseen")
        world.agree_on("code of your own", check)
        if world.is_first:
            for setting, path in named:
                log.info(str(load_code(path, setting=setting)))


def _named(config: Config) -> list[tuple[str, str]]:
    """(setting, path) of each code of the user's own that a config names."""
    paths = [("data.format", config.data.format)] if is_own(config.data.format) else []
    paths += [("eval.metrics", path) for path in config.eval.metrics]
    return paths + [("train.callbacks", path) for path in config.train.callbacks]


def own_code_facts(config: Config) -> dict[str, dict[str, str]]:
    """``own_code``: SHA-256 of the module's file of each code that a config names, as it is now; empty where it names none.

    Raises:
        ConfigError: a module isn't there.
    """
    hashes = {f"{setting} {path}": hash_of(path, setting=setting) for setting, path in _named(config)}
    return {"own_code": hashes} if hashes else {}


def warn_of_other_code(checkpoint: VerifiedCheckpoint, config: Config) -> None:
    """Warn if a module that the config names has another source than when the checkpoint was saved."""
    then, now = checkpoint.manifest.progress.get("own_code"), own_code_facts(config).get("own_code", {})
    if not isinstance(then, Mapping):
        return  # nothing was named, or another version has written it
    changed = [
        f"{name} ({str(then[name])[:12]} then, {now[name][:12]} now)"
        for name in now
        if then.get(name, now[name]) != now[name]
    ]
    if changed:
        log.warning(f"{checkpoint.path} was saved with other code of your own, by its SHA-256: {'; '.join(changed)}")
