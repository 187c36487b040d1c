"""Whether a path that a user has given as an adapter is an adapter's folder, and what it is otherwise. Needs no torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from dist_lora.errors import ConfigError
from dist_lora.files import NO_SUCH_FOLDER, file_exists, no_folder
from dist_lora.lora.origin import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE
from dist_lora.text import first_few, nearest

# A folder with one of these was meant to be an adapter's: if it lacks another, it is damaged.
_OF_ADAPTERS = (CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE, "adapter_model.bin")
# Of what is no adapter's: weights, states of training, folders.
_STATES = (".safetensors", ".bin", ".pt", ".pth")
_MAY_BE_REPLACED = (WEIGHTS_FILE, "adapter_model.bin", "additional_chat_templates")  # the last a tokenizer's
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_STEP = "step-*"  # the folders of checkpoints


def is_adapter_folder(path: Path) -> bool:
    """Whether a path is an adapter's folder, or was meant to be one: if it lacks a file, it is damaged."""
    return any(file_exists(path / name) for name in _OF_ADAPTERS)


def adapter_in(path: Path) -> Path:
    """The adapter's folder that a path stands for: itself, or the one in a run's folder.

    Raises:
        ConfigError: it is neither; see ``check_adapter_folder``.
    """
    of_run = path / "adapter"
    if not is_adapter_folder(path) and is_adapter_folder(of_run):
        return of_run
    check_adapter_folder(path)
    return path


def check_adapter_folder(path: Path) -> None:
    """Raise ``ConfigError`` if a path is no adapter's folder: mistyped, moved, or what an adapter is yet to be made from.

    The files inside aren't read. Local; costs a look into the folder.
    """
    if is_adapter_folder(path):
        return
    problem = no_folder(path)
    if problem is not None:
        hint = _hub_hint(path) if problem == NO_SUCH_FOLDER else ""
        raise ConfigError(f"{str(path)[:300]}: {problem}{hint or _expected(path)}")
    inside = sorted(os.listdir(path))
    raise ConfigError(f"{path}: {_what_it_is(path, inside)}")


def check_out(out: Path) -> None:
    """Raise ``ConfigError`` unless a new adapter's folder may take the place of ``out``: what is there would be deleted."""
    try:
        is_here, names = os.path.samefile(out, os.curdir), sorted(os.listdir(out))
    except (OSError, ValueError):  # there is none; or it can't be read, which the writer will say
        return
    if is_here:
        raise ConfigError(f"--out: {out} is the folder that this runs in, which can't be replaced; name one in it")
    others = [name for name in names if name not in _MAY_BE_REPLACED and not name.startswith(".")]
    others = [name for name in others if os.path.isdir(out / name) or Path(name).suffix in _STATES]
    if others:
        raise ConfigError(
            f"--out: {out} has more than an adapter in it, which would be deleted: {first_few(others)}. Name another folder"
        )


def _hub_hint(path: Path) -> str:
    """How to get an adapter of the hub, where a folder that doesn't exist could be the name of one."""
    name = str(path)
    if not _HUB_ID.fullmatch(name) or path.parent.exists():
        return ""
    return (
        f". If it is an adapter on the hub, download it first, and name the folder: "
        f"hf download {name} --local-dir {path.name}"
    )


def _expected(path: Path) -> str:
    """What should be there, and the folder that a typo may have meant."""
    near = None
    with suppress(OSError, ValueError):
        near = nearest(path.name, sorted(os.listdir(path.parent)))
    hint = f" (nearest: {path.parent / near})" if near not in (None, path.name) else ""
    return f"; expected an adapter's folder, with {CONFIG_FILE} and {WEIGHTS_FILE}{hint}"


def _what_it_is(path: Path, inside: list[str]) -> str:
    """What a folder is that isn't an adapter's, and what to do with it."""
    if "manifest.json" in inside:
        return f"a checkpoint, not an adapter. Gather it first: dist-lora gather {path} --out DIR, then name DIR"
    is_run = "checkpoints" in inside and any((path / "checkpoints").glob(_STEP))
    if file_exists(path / "adapter" / WEIGHTS_FILE):
        return f"a run's folder. Its adapter is {path / 'adapter'}"
    if is_run or any(path.glob(_STEP)):
        return (
            f"a folder of checkpoints, not an adapter. Gather the newest first: dist-lora gather {path} --out DIR, "
            "then name DIR"
        )
    if "config.json" in inside:
        return "a model's folder, without an adapter in it: it can be the base (--base, model.name)"
    return f"{f'holds {first_few(inside)}' if inside else 'is empty'}{_expected(path)}"
