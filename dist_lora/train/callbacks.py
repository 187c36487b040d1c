"""Callbacks: what a user's own code is told of a run while it trains. Needs no torch.

Hooks are called on the first rank alone, in the thread that trains, while the others go on to their next step and wait there.
So a hook must not communicate with other ranks, and one that takes longer than ``parallel.hang_timeout`` ends the run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lora.checkpoint.folders import step_of
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, OwnCodeError
from dist_lora.own_code import OwnCode, all_of, check_arguments, load_code
from dist_lora.text import nearest

if TYPE_CHECKING:
    from dist_lora.world.world import World

SETTING = "train.callbacks"
HOOKS: Mapping[str, tuple[str, ...]] = {
    "on_start": ("run",),
    "on_step": ("line",),
    "on_evaluation": ("line",),
    "on_save": ("step", "folder"),
    "on_end": ("summary",),
}
"""The arguments of each hook."""


@dataclass(frozen=True)
class StartedRun:
    """What ``on_start`` is told: the settings, the run's folder, and which steps are to be done."""

    config: Config
    folder: Path
    first_step: int
    num_steps: int


class Callback:
    """Hooks that do nothing: inherit from it, or write a class that has some of them. Each is called on the first rank alone.

    A run that fails calls no further hook; one that is stopped on request still calls ``on_save`` for its last checkpoint.
    """

    def on_start(self, run: StartedRun) -> None:
        """Before the first step of this start of the run, which may be a resumption."""

    def on_step(self, line: dict[str, Any]) -> None:
        """After each step, with its line of metrics.jsonl."""

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """After each evaluation, with its line of evaluations.jsonl."""

    def on_save(self, step: int, folder: Path) -> None:
        """Once a checkpoint is complete: noticed after the step in which it became so."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """After the last step, when the adapter is written, with the content of summary.json."""


def class_of_callback(path: str) -> OwnCode:
    """A class that ``train.callbacks`` names, imported and not made yet.

    Raises:
        ConfigError: it can't be imported, is no class, or ``check_hooks`` has something against it.
    """
    code = load_code(path, setting=SETTING)
    if not isinstance(code.value, type):
        raise ConfigError(f"{SETTING}: {path} is a {type(code.value).__name__}; a class with hooks is expected")
    check_arguments(code, code.value, arguments=[])
    check_hooks(code)
    return code


def code_of_object(callback: object) -> OwnCode:
    """A callback that a script has made, as if a setting had named its class; its source isn't hashed."""
    kind = type(callback)
    try:
        file = Path(inspect.getfile(kind))
    except (OSError, TypeError):
        file = Path()
    return OwnCode("callbacks", f"{kind.__module__}:{kind.__qualname__}", kind, file, "")


def check_hooks(code: OwnCode) -> None:
    """Raise ``ConfigError`` unless a class has a hook, no method that looks like one and isn't, and takes their arguments."""
    names = [name for name in dir(code.value) if name.startswith("on_")]
    faults = []
    for name in names:
        if name not in HOOKS:
            near = nearest(name, HOOKS)
            faults.append(f"{name} is no hook" + (f" (nearest: {near})" if near else f" ({', '.join(HOOKS)})"))
            continue
        # Without self, which is given where the hook of an object is called.
        is_plain = inspect.isfunction(inspect.getattr_static(code.value, name))
        arguments = ["self", *HOOKS[name]] if is_plain else HOOKS[name]
        try:
            check_arguments(code, getattr(code.value, name), arguments=arguments, what=f".{name}")
        except ConfigError as error:
            faults.append(str(error).removeprefix(f"{code.setting}: {code.path}"))
    if not names:
        faults.append(f"it has none of the hooks {', '.join(HOOKS)}")
    if faults:
        raise ConfigError("\n".join(f"{code.setting}: {code.path}: {fault.lstrip('.')}" for fault in faults))


class Callbacks:
    """All callbacks of a run, on the first rank; their hooks are called in the order in which they are named.

    Every method raises ``OwnCodeError`` if a hook does, whatever it is: the run then ends on all ranks.
    """

    def __init__(self, callbacks: Sequence[tuple[OwnCode, Any]], world: World) -> None:
        self._callbacks, self._world = callbacks, world
        self._last_saved: Path | None = None

    @staticmethod
    def of(config: Config, given: Sequence[Any], world: World) -> Callbacks:
        """Those that ``train.callbacks`` names, made now, and then the objects in ``given``.

        Raises:
            OwnCodeError: one can't be made.
        """
        made = []
        for code in own_callbacks(config):
            with told_as_own(code, ".__init__"):
                made.append((code, code.value()))
        return Callbacks([*made, *((code_of_object(callback), callback) for callback in given)], world)

    def start(self, run: StartedRun, *, last_saved: Path | None) -> None:
        """Call ``on_start``. ``last_saved``: the checkpoint that the run resumes from."""
        self._last_saved = last_saved
        self._call("on_start", run)

    def step(self, line: Mapping[str, Any]) -> None:
        """Call ``on_step``."""
        self._call("on_step", dict(line))

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """Call ``on_evaluation``."""
        self._call("on_evaluation", dict(line))

    def look_at(self, newest: Path | None) -> None:
        """Call ``on_save`` if the newest complete checkpoint is another one than before."""
        if newest is not None and newest != self._last_saved:
            self._last_saved = newest
            self._call("on_save", step_of(newest), newest)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Call ``on_end``."""
        self._call("on_end", dict(summary))

    def _call(self, hook: str, *arguments: Any) -> None:
        for code, callback in self._callbacks:
            function = getattr(callback, hook, None)
            if function is not None:
                phase = self._world.progress.phase(f"callback {code.path}.{hook}", kind="host")
                with phase, told_as_own(code, f".{hook}"):
                    function(*arguments)


@contextmanager
def told_as_own(code: OwnCode, what: str = "") -> Iterator[None]:
    """Inside the ``with`` an error of the user's own code becomes one that names it."""
    try:
        yield
    except Exception as error:
        raise OwnCodeError(f"{code.setting}: {code.raised(error, what)}") from error


def own_callbacks(config: Config) -> list[OwnCode]:
    """The classes that ``train.callbacks`` names, imported.

    Raises:
        ConfigError: see ``class_of_callback``; all faults.
    """
    return all_of([functools.partial(class_of_callback, path) for path in config.train.callbacks])
