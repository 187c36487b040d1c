"""Functions and classes of a user's own, by the Python path that a config names: ``my_pkg.my_mod:my_format``.

A module is imported only because a setting names it: never since a checkpoint, an adapter or a data file does. Of each the
source is hashed, so that a run can say by which code it was made. Only the file of the named module counts, not what it imports.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.errors import ConfigError
from dist_lora.text import nearest


@dataclass(frozen=True)
class OwnCode:
    """What a setting names: ``path`` as it is written, the object itself, and the file of its module with its SHA-256."""

    setting: str
    path: str
    value: Any
    file: Path
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the path: the name of the function or class."""
        return self.path.rpartition(":")[2].rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.setting}: {self.path}, of {self.file} (SHA-256 {self.sha256[:12]})"

    def raised(self, error: BaseException, what: str = "") -> str:
        """What to say of an error that this code raised: its kind, its text and the last line of the user's that it left."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == self.file] or frames[-1:]
        at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        return f"{self.path}{what} raised {type(error).__name__}: {error}{at}"


def is_own(name: str) -> bool:
    """Whether a setting's value is the path of a user's own code, not a word of ours."""
    return ":" in name


def load_code(path: str, *, setting: str) -> OwnCode:
    """The function or class at ``module:name``, imported if it isn't yet.

    The module is looked for where Python looks, and last in the current folder.

    Raises:
        ConfigError: there is no such module or name, its import fails, it has no source file, or it can't be called.
    """
    module_name, _, name = path.partition(":")
    file, sha256 = _source_of(module_name, setting=setting, path=path)
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        told = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{setting}: {path}: importing {module_name} failed: {type(error).__name__}: {error} "
            f"({told.filename}:{told.lineno})"
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = nearest(part, [known for known in dir(value) if not known.startswith("_")])
            hint = f" (nearest: {near})" if near else ""
            raise ConfigError(f"{setting}: {path}: {file} has no {name}{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(f"{setting}: {path} is a {type(value).__name__}; a function or a class is expected")
    return OwnCode(setting, path, value, file, sha256)


def hash_of(path: str, *, setting: str) -> str:
    """SHA-256 of the source file of the module in ``module:name``, which isn't imported (but for the packages around it).

    Raises:
        ConfigError: see ``load_code``.
    """
    return _source_of(path.partition(":")[0], setting=setting, path=path)[1]


def check_arguments(code: OwnCode, function: Callable[..., Any], *, arguments: Sequence[str], what: str = "") -> None:
    """Check that ``function`` can be called with so many positional arguments.

    Raises:
        ConfigError: it can't; shows what it takes and what it is called with.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of a class or function in C, which doesn't say
    try:
        signature.bind(*arguments)
    except TypeError:
        called = f"({', '.join(arguments)})"
        raise ConfigError(
            f"{code.setting}: {code.path}{what} takes {signature}, and it is called with {called}"
        ) from None


def all_of(loads: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of ``loads`` returns.

    Raises:
        ConfigError: some of them did; has the texts of all.
    """
    loaded, faults = [], []
    for load in loads:
        try:
            loaded.append(load())
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return loaded


def _source_of(module: str, *, setting: str, path: str) -> tuple[Path, str]:
    """The source file of a module, and its SHA-256.

    Python's own modules are refused: a function like ``subprocess.call`` would take a text of the data for a command.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{setting}: {path}: {module} is a module of Python's own; a module of yours is expected")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that nothing there hides an installed package
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # of a package around it, which is imported to look inside
        raise ConfigError(f"{setting}: {path}: module {module} can't be found: {error}. {_WHERE}") from error
    if spec is None:
        raise ConfigError(f"{setting}: {path}: there is no module {module}. {_WHERE}")
    if spec.origin is None or not spec.has_location or not os.path.isfile(spec.origin):
        raise ConfigError(f"{setting}: {path}: module {module} has no source file, whose hash a run records")
    try:
        content = Path(spec.origin).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {spec.origin} can't be read: {error.strerror or error}") from error
    return Path(spec.origin), hashlib.sha256(content).hexdigest()


_WHERE = "Install it, or set PYTHONPATH to its folder, or start in it"
