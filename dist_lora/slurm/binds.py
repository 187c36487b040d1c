"""The folders outside the submit folder that a container must see, by the paths that configs name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.files import file_exists


def bound_folders(config_files: Iterable[Path], runs: Sequence[Config], extra: Iterable[Path]) -> list[Path]:
    """Absolute folders to bind, none within another one or within the working folder, which is bound anyway.

    All that the configs name and that exists: the model's folder, data, templates, adapters; and where runs and token
    caches are written. Of symbolic links both ends: a link leads nowhere in a container that lacks its target. The files of
    a model that the hub's client has downloaded are links to a folder beside it.

    Raises:
        ConfigError: a folder's name has a comma or a colon, which containers' options can't express; or an extra one
            doesn't exist.
    """
    for path in extra:
        try:
            is_there = file_exists(path.expanduser())
        except RuntimeError as error:  # of pathlib: no such user
            raise ConfigError(f"--bind: {path}: {error}") from None
        if not is_there:
            raise ConfigError(
                f"--bind: {path} doesn't exist, or isn't this user's to see; expected a folder or a file that all nodes see"
            )
    named = [*config_files, *extra, *(path for config in runs for path in _paths_of(config))]
    folders = {folder for path in named for folder in _folders_of(path.expanduser())}
    outside = sorted(folder for folder in folders if not folder.is_relative_to(Path.cwd()))
    least = [folder for folder in outside if not any(other in folder.parents for other in outside)]
    for folder in least:
        if set(",:\n") & set(str(folder)):
            raise ConfigError(
                f"--container: {str(folder)!r} can't be bound: its name has a comma or a colon. Link to it by another name"
            )
    return least


def _paths_of(config: Config) -> Iterator[Path]:
    yield config.runs_dir
    if config.data.cache_dir is not None:
        yield config.data.cache_dir
    for text in _texts(config.model_dump(mode="json")):
        path = Path(text)
        try:
            if path.expanduser().exists():
                yield path
        except (OSError, ValueError, RuntimeError):  # too long, with NUL, or the home of an unknown user
            continue


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for entry in tree:
            yield from _texts(entry)
    elif isinstance(tree, str) and tree:
        yield tree


def _folders_of(path: Path) -> Iterator[Path]:
    """The folder that a path is or lies in, as named and without links; of a folder also where its links lead."""
    for location in {Path(os.path.abspath(path)), path.resolve()}:
        is_in_folder = location.is_file() and location.parent != Path("/")
        yield location.parent if is_in_folder else location
    if path.is_dir():
        for entry in path.iterdir():
            if entry.is_symlink() and entry.exists():
                target = entry.resolve()
                yield target if target.is_dir() else target.parent
