"""A model folder that is written here: whole or not at all, with the files that belong to a model beside its weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_lora.errors import ConfigError, DistLoraError, SaveError, cannot_write
from dist_lora.files import file_exists, lock, sync, sync_folder
from dist_lora.text import gib

QUANTIZED_FROM_FILE = "quantized_from.json"
"""Which model a folder is a quantized copy of; it describes that folder's weights and no others."""

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_WRITTEN_ANEW = ("config.json", "generation_config.json", QUANTIZED_FROM_FILE)
# transformers would load an adapter with the weights.
_OF_ADAPTERS = ("adapter_config.json", "dist_lora.json", "learned.json")


def refuse_existing(out: Path, *, what: str) -> None:
    """Raise ``ConfigError`` if ``out`` exists; ``what`` is to be written there ("merged model")."""
    if file_exists(out):
        raise ConfigError(f"{out} exists already. Name a new folder for the {what}, or remove that one.")


@contextmanager
def new_model_folder(out: Path, *, what: str) -> Iterator[Path]:
    """An empty folder ``<out>.partial`` that no other process writes to; fsynced and renamed to ``out`` at the end.

    It is removed after any error. What a killed process left there is removed first.

    Raises:
        ConfigError: ``out`` exists or is being written.
        SaveError: the system refuses to write, here or in the block.
    """
    try:
        with _partial_of(out, what=what) as partial:
            yield partial
            sync_folder(partial)
            os.rename(partial, out)
            sync(out.parent)
    except OSError as error:
        if isinstance(error, DistLoraError):
            raise
        raise cannot_write(f"The {what} can't be written to {out}: {error.strerror or error}.", error) from error


@contextmanager
def _partial_of(out: Path, *, what: str) -> Iterator[Path]:
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        # Not every network file system has locks; there, two writers of one folder go unnoticed.
        with suppress(OSError):
            try:
                lock(descriptor)
            except BlockingIOError as error:
                raise ConfigError(f"{out} is being written by another process. Wait for it, or stop it.") from error
        refuse_existing(out, what=what)  # the other one may have just ended
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def check_space(partial: Path, *, needed: int, what: str) -> None:
    """Raise ``SaveError`` unless ``needed`` bytes are free where ``partial`` is."""
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise SaveError(
            f"The {what} needs {gib(needed)}, and {gib(free)} are free in {partial.parent}. Free some space, or choose "
            "another folder."
        )


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that are copied as they are: tokenizer, templates, licence; never weights."""
    candidates = [path for path in [*folder.iterdir(), *folder.glob("*/*.jinja")] if path.is_file()]
    return sorted(
        path
        for path in candidates
        if (path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_NAMES))
        and path.name not in (*_WRITTEN_ANEW, *_OF_ADAPTERS)
        and not path.name.endswith(".index.json")
    )


def copy_into(partial: Path, path: Path, *, folder: Path) -> None:
    """Copy one file of ``folder`` to the same place in ``partial``."""
    target = partial / path.relative_to(folder)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file of JSON as model folders have them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
