"""Writing the trained state: each rank writes its part, all of them or none; and deleting old checkpoints.

No collective is used, only the world's store, so that a slow disk triggers no watchdog. Until the last rename nothing
that a resume looks at has changed, so a save may be killed at any instant.
"""

from __future__ import annotations

import errno
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dist_lora import __version__
from dist_lora.base.safetensors import write_safetensors
from dist_lora.checkpoint.folders import step_folder, step_folders
from dist_lora.checkpoint.manifest import (
    FORMAT_VERSION,
    ITEM_BYTES,
    FileEntry,
    Manifest,
    TensorSpec,
    entry_from_bytes,
    entry_to_bytes,
    rank_file,
    write_manifest,
)
from dist_lora.checkpoint.read import verify
from dist_lora.errors import CheckpointError, DistLoraError, PlanError, SaveError
from dist_lora.files import swap_in, sync
from dist_lora.lora.state import KINDS, Piece

if TYPE_CHECKING:
    from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

Result = TypeVar("Result")

_HEADER_BYTES_PER_TENSOR = 1000  # of all kinds, in header and manifest: names of 60 characters take 700
_FOLDER_BYTES = 65_536  # blocks of the folder, the manifest's head


@dataclass(frozen=True)
class _SaveFolders:
    """The folders of a save: ``partial`` until all is written, then ``final``; a former one becomes ``replaced``."""

    root: Path
    step: int
    needed_bytes: int

    @property
    def partial(self) -> Path:
        return self.root / f".{step_folder(self.step)}.partial"

    @property
    def final(self) -> Path:
        return self.root / step_folder(self.step)

    @property
    def replaced(self) -> Path:
        return self.root / f".{step_folder(self.step)}.deleted"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    share: Mapping[Piece, Tensor],
    specs: Sequence[TensorSpec],
    world: World,
    progress: Mapping[str, Any],
    config: str,
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
) -> Path:
    """The published checkpoint ``root/step-########`` of all ranks' shares. All ranks call it; no collective.

    Existing checkpoints of later steps belong to a history that this run has left: they are renamed, not deleted.

    Args:
        share: what this rank holds, 1-D fp32 CPU tensors; empty ones are left out. All ranks' shares together must be
            every element of ``specs`` once in each kind. They must not change before this returns.
        specs: all trained tensors in their order, the same on all ranks.
        progress, config, base, adapter: see ``Manifest``; only the first rank's are used.

    Raises:
        SaveError: on a rank that couldn't write, ``RankError`` on the others: nothing is published, the partial folder
            is deleted, and the former checkpoints are as they were.
        CheckpointError: likewise, if the shares are not every element once.
    """
    key = world.fresh_key(f"save/{step}")
    folders = _SaveFolders(root, step, checkpoint_bytes(specs))
    try:
        _on_all_ranks(world, f"checkpoint of step {step}", lambda: _begin(folders) if world.is_first else None)
        own = _on_all_ranks(world, f"checkpoint of step {step}", lambda: _write_share(folders, share, world, key))

        def publish() -> None:
            others = [entry_from_bytes(world.fetch(f"{key}/{rank}")) for rank in range(1, world.world_size)]
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                step=step,
                world_size=world.world_size,
                tensors=tuple(specs),
                files=(own, *others),
                progress=dict(progress),
                config=config,
                base=dict(base),
                adapter=dict(adapter),
                versions=versions_here(),
            )
            _publish(folders, manifest)

        _on_all_ranks(world, f"checkpoint of step {step}", lambda: publish() if world.is_first else None)
    except Exception:
        if world.is_first:
            shutil.rmtree(folders.partial, ignore_errors=True)
        raise
    return folders.final


def checkpoint_bytes(specs: Sequence[TensorSpec]) -> int:
    """The most bytes that a checkpoint of these trained tensors takes, all ranks' files and the manifest."""
    return sum(len(KINDS) * ITEM_BYTES * s.num_elements + _HEADER_BYTES_PER_TENSOR for s in specs) + _FOLDER_BYTES


def check_room(root: Path, specs: Sequence[TensorSpec], *, num_kept: int) -> None:
    """Raise if the disk can't hold the checkpoints to be kept and the one being written.

    Existing ones will be deleted in time: their bytes count as available. One rank calls it.

    Raises:
        PlanError: with both numbers.
    """
    existing = next(folder for folder in (root, *root.parents) if folder.is_dir())
    try:
        free_bytes = shutil.disk_usage(existing).free
        taken_bytes = sum(f.stat().st_size for path in step_folders(root).values() for f in path.iterdir())
    except OSError:
        return  # the save itself will raise
    one_bytes = checkpoint_bytes(specs)
    if free_bytes + taken_bytes < (num_kept + 1) * one_bytes:
        raise PlanError(
            f"{root}: {num_kept + 1} checkpoints of {one_bytes:,} bytes ({num_kept} to keep and one being written) "
            f"need {(num_kept + 1) * one_bytes:,} bytes, and {free_bytes + taken_bytes:,} are available: "
            f"{free_bytes:,} free and {taken_bytes:,} in older ones. Free disk space, set checkpoint.keep lower, or "
            "set runs_dir elsewhere."
        )


def _on_all_ranks(world: World, stage: str, action: Callable[[], Result]) -> Result:
    """What ``action`` returns on this rank, once it has succeeded on all; if it fails on any, all raise."""
    error, result = None, None
    try:
        with world.progress.phase(f"saving the {stage}", kind="long"):
            result = action()
    except Exception as caught:
        error = caught
    world.agree(stage, error)
    return result  # type: ignore[return-value]  # an error was raised by agree


def versions_here() -> dict[str, str]:
    """The versions of the libraries that train and save in this process, by name."""
    return {
        "dist_lora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
    }


def _begin(folders: _SaveFolders) -> None:
    """Make an empty partial folder, and check that the disk has room for the checkpoint."""
    with _as_save_error(folders, folders.partial):
        folders.root.mkdir(parents=True, exist_ok=True)
        if folders.partial.exists():
            shutil.rmtree(folders.partial)
        folders.partial.mkdir()
        free_bytes = shutil.disk_usage(folders.root).free
    if free_bytes < folders.needed_bytes:
        raise SaveError(
            f"{folders.root}: the checkpoint of step {folders.step} needs {folders.needed_bytes:,} bytes and "
            f"{free_bytes:,} are free. {_WHAT_TO_DO}"
        )


_WHAT_TO_DO = (
    "No part of it was kept, and the former checkpoints are as they were: "
    "free disk space (or set runs_dir elsewhere), and the same command resumes from the newest."
)


@contextmanager
def _as_save_error(folders: _SaveFolders, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``SaveError`` with path, errno, and needed and free bytes."""
    try:
        yield
    except DistLoraError:
        raise
    except OSError as error:
        free = "an unknown number of"
        with suppress(OSError):
            free = f"{shutil.disk_usage(folders.root).free:,}"
        name = errno.errorcode.get(error.errno or 0, "no errno")
        raise SaveError(
            f"{error.filename or path}: {error.strerror or error} ({name}) while saving the checkpoint of "
            f"step {folders.step}, which needs {folders.needed_bytes:,} bytes in total; {free} bytes are free. "
            f"{_WHAT_TO_DO}"
        ) from error


def _write_share(folders: _SaveFolders, share: Mapping[Piece, Tensor], world: World, key: str) -> FileEntry:
    """Write this rank's file, fsynced, and report it to the first rank."""
    path = folders.partial / rank_file(world.world_rank, world.world_size)
    with _as_save_error(folders, path):
        held = {piece: t for piece, t in share.items() if piece.num_elements}
        entry = _write_file(path, held, folders.step, on_progress=world.progress.advance)
    if not world.is_first:
        world.share(f"{key}/{world.world_rank}", entry_to_bytes(entry))
    return entry


def _write_file(path: Path, share: Mapping[Piece, Tensor], step: int, *, on_progress: Callable[[], None]) -> FileEntry:
    """One safetensors file, hashed while it is written; ``on_progress`` is called after each piece."""
    for piece, values in share.items():
        assert values.dtype == torch.float32 and values.shape == (piece.num_elements,), (piece, values.shape)
    num_bytes, checksum = write_safetensors(
        path,
        {piece.key: values for piece, values in share.items()},
        metadata={"step": str(step), "file": path.name},
        on_progress=on_progress,
    )
    return FileEntry(path.name, num_bytes, checksum, tuple(share))


def _publish(folders: _SaveFolders, manifest: Manifest) -> None:
    """Manifest, sync, rename, sync: there is no checkpoint before the rename and a complete one after it."""
    with _as_save_error(folders, folders.final):
        for entry in manifest.files:
            _expect_visible(folders.partial / entry.name, entry)
        write_manifest(folders.partial, manifest)
        sync(folders.partial)
        swap_in(folders.partial, folders.final, former=folders.replaced)
    set_aside(folders.root, above=folders.step)


def _expect_visible(path: Path, entry: FileEntry) -> None:
    num_bytes = path.stat().st_size if path.exists() else None
    if num_bytes != entry.num_bytes:
        seen = "missing" if num_bytes is None else f"{num_bytes} bytes long"
        raise SaveError(
            f"{path}: its rank wrote {entry.num_bytes} bytes, and on the first rank it is {seen}. "
            "Is this folder on a file system that all nodes share? Set runs_dir to one that is."
        )


def set_aside(root: Path, *, above: int) -> list[Path]:
    """Rename the checkpoints of steps later than ``above``, so that no resume or rotation sees them; returns new paths.

    They belong to a history that a run has left by resuming from an earlier step. They stay complete, as
    ``aside-step-########``, and are never deleted. One rank calls it. What can't be renamed is logged as a warning.
    """
    renamed = []
    for path in [path for step, path in _listed(root).items() if step > above]:
        number, aside = 1, path.with_name(f"aside-{path.name}")
        while aside.exists():
            number, aside = number + 1, path.with_name(f"aside-{path.name}.{number + 1}")
        try:
            path.rename(aside)
        except OSError as error:
            log.warning(f"{path} is of a later step than {above} and can't be renamed: {error}")
        else:
            renamed.append(aside)
            log.warning(f"{path} is of a later step than {above}, from which this run resumes: renamed to {aside.name}")
    return renamed


def rotate(root: Path, *, keep: int, best: int | None) -> list[Path]:
    """Delete all but the newest ``keep`` complete checkpoints and that of step ``best``; returns what was removed.

    Complete means here: a valid manifest, and files of the right sizes. A damaged one is deleted once there are ``keep``
    newer complete ones; while none is complete, nothing is. Leftovers of killed saves and deletions are deleted too.
    One rank calls it, while no save is in flight. What can't be deleted is logged as a warning and doesn't end the run.
    """
    assert keep >= 1, keep
    folders = _listed(root)
    complete = [step for step, path in folders.items() if _is_complete(path)]
    for leftover in [*root.glob(".step-*.partial"), *root.glob(".step-*.deleted")]:
        _delete(leftover)
    kept = {*complete[:keep], best}
    old = [step for step in folders if complete and step < complete[:keep][-1] and step not in kept]
    removed = []
    for step in old:
        doomed = root / f".{step_folder(step)}.deleted"
        try:
            folders[step].rename(doomed)
        except OSError as error:
            log.warning(f"{folders[step]} can't be deleted: {error.strerror or error}. It is kept")
            continue
        _delete(doomed)
        removed.append(folders[step])
    return removed


def _listed(root: Path) -> dict[int, Path]:
    """``step_folders``; none, with a warning, where they can't be listed: after a save that has gone well."""
    try:
        return step_folders(root)
    except CheckpointError as error:
        log.warning(f"{error}. Nothing is deleted or renamed there")
        return {}


def _is_complete(path: Path) -> bool:
    try:
        verify(path, checksums=False)
    except CheckpointError:
        return False
    return True


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning(f"{folder} can't be deleted: {error.strerror or error}. It takes disk space until it is deleted")
