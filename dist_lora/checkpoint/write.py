"""Writing the trained state: each rank its share, all of them together or not at all; and dropping old
checkpoints.

No collective is used, only the world's store: a slow disk stops nobody's watchdog. Until the last rename
nothing that a resume would look at has changed, so a save may die at any instant.
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

_HEADER_BYTES_A_TENSOR = 1000  # of all kinds, in header and manifest: names of 60 characters take 700
_FOLDER_BYTES = 65_536  # blocks of the folder, the manifest's head


@dataclass(frozen=True)
class _Place:
    """Where a save goes: ``partial`` until all is written, then ``final``, for a former one, ``replaced``."""

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

    Checkpoints of later steps that lie there belong to a past this run has left: they are set aside, not
    deleted.

    Args:
        share: what this rank holds, 1-D fp32 CPU tensors; empty ones are left out. All ranks' shares
        together must
            be every element of ``specs`` once in each kind. They must not change before this returns.
        specs: all trained tensors in their order, the same on all ranks.
        progress, config, base, adapter: see ``Manifest``; only the first rank's count.

    Raises:
        SaveError: on a rank whose disk refused, ``RankError`` on the others: nothing is published, the
        partial folder
            is gone, and the former checkpoints are as they were.
        CheckpointError: likewise, where the shares are not every element once.
    """
    key = world.fresh_key(f"save/{step}")
    place = _Place(root, step, checkpoint_bytes(specs))
    try:
        _together(world, f"checkpoint of step {step}", lambda: _begin(place) if world.is_first else None)
        own = _together(world, f"checkpoint of step {step}", lambda: _write_share(place, share, world, key))

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
            _publish(place, manifest)

        _together(world, f"checkpoint of step {step}", lambda: publish() if world.is_first else None)
    except Exception:
        if world.is_first:
            shutil.rmtree(place.partial, ignore_errors=True)
        raise
    return place.final


def checkpoint_bytes(specs: Sequence[TensorSpec]) -> int:
    """What a checkpoint of these trained tensors takes at most, all ranks' files and the manifest."""
    return sum(len(KINDS) * ITEM_BYTES * s.num_elements + _HEADER_BYTES_A_TENSOR for s in specs) + _FOLDER_BYTES


def check_room(root: Path, specs: Sequence[TensorSpec], *, num_kept: int) -> None:
    """Raise where the disk can't hold the checkpoints that are to be kept and the one that is being written.

    Those that lie there already are rotated away in time: they count as room. One rank calls it.

    Raises:
        PlanError: with both numbers.
    """
    place = next(folder for folder in (root, *root.parents) if folder.is_dir())
    try:
        free_bytes = shutil.disk_usage(place).free
        taken_bytes = sum(f.stat().st_size for path in step_folders(root).values() for f in path.iterdir())
    except OSError:
        return  # the save itself will tell
    one_bytes = checkpoint_bytes(specs)
    if free_bytes + taken_bytes < (num_kept + 1) * one_bytes:
        raise PlanError(
            f"{root}: {num_kept + 1} checkpoints of {one_bytes:,} bytes ({num_kept} that are kept and one that is being "
            f"written) need {(num_kept + 1) * one_bytes:,} bytes, and {free_bytes + taken_bytes:,} are there: "
            f"{free_bytes:,} free and {taken_bytes:,} in older ones. Make room, set checkpoint.keep lower, or runs_dir "
            "elsewhere."
        )


def _together(world: World, stage: str, action: Callable[[], Result]) -> Result:
    """What ``action`` gives here, once it has succeeded on all ranks; where it fails on any, all raise."""
    error, result = None, None
    try:
        with world.progress.phase(f"saving the {stage}", kind="long"):
            result = action()
    except Exception as caught:
        error = caught
    world.agree(stage, error)
    return result  # type: ignore[return-value]  # an error was raised by agree


def versions_here() -> dict[str, str]:
    """The versions of what trains and saves in this process, by name."""
    return {
        "dist_lora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
    }


def _begin(place: _Place) -> None:
    """An empty partial folder, and the certainty that the disk has room for what comes."""
    with _telling(place, place.partial):
        place.root.mkdir(parents=True, exist_ok=True)
        if place.partial.exists():
            shutil.rmtree(place.partial)
        place.partial.mkdir()
        free_bytes = shutil.disk_usage(place.root).free
    if free_bytes < place.needed_bytes:
        raise SaveError(
            f"{place.root}: the checkpoint of step {place.step} needs {place.needed_bytes:,} bytes and "
            f"{free_bytes:,} are free. {_WHAT_TO_DO}"
        )


_WHAT_TO_DO = (
    "Nothing of it was kept and the former checkpoints are as they were: "
    "make room (or set runs_dir elsewhere), and the same command goes on from the newest."
)


@contextmanager
def _telling(place: _Place, path: Path) -> Iterator[None]:
    """An ``OSError`` within becomes a ``SaveError`` with path, errno, and needed and free bytes."""
    try:
        yield
    except DistLoraError:
        raise
    except OSError as error:
        free = "an unknown number of"
        with suppress(OSError):
            free = f"{shutil.disk_usage(place.root).free:,}"
        name = errno.errorcode.get(error.errno or 0, "no errno")
        raise SaveError(
            f"{error.filename or path}: {error.strerror or error} ({name}) while saving the checkpoint of "
            f"step {place.step}, which needs {place.needed_bytes:,} bytes in all; {free} bytes are free. "
            f"{_WHAT_TO_DO}"
        ) from error


def _write_share(place: _Place, share: Mapping[Piece, Tensor], world: World, key: str) -> FileEntry:
    """Write this rank's file, fsynced, and report it to the first rank."""
    path = place.partial / rank_file(world.world_rank, world.world_size)
    with _telling(place, path):
        held = {piece: t for piece, t in share.items() if piece.num_elements}
        entry = _write_file(path, held, place.step, on_progress=world.progress.advance)
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


def _publish(place: _Place, manifest: Manifest) -> None:
    """Manifest, sync, rename, sync: there is no checkpoint before the rename and a whole one after it."""
    with _telling(place, place.final):
        for entry in manifest.files:
            _expect_visible(place.partial / entry.name, entry)
        write_manifest(place.partial, manifest)
        sync(place.partial)
        swap_in(place.partial, place.final, former=place.replaced)
    set_aside(place.root, above=place.step)


def _expect_visible(path: Path, entry: FileEntry) -> None:
    num_bytes = path.stat().st_size if path.exists() else None
    if num_bytes != entry.num_bytes:
        found = "not there" if num_bytes is None else f"{num_bytes} bytes long"
        raise SaveError(
            f"{path}: its rank wrote {entry.num_bytes} bytes and seen from the first rank it is {found}. "
            "Does this folder lie on a file system that all nodes share? Set runs_dir to one that does."
        )


def set_aside(root: Path, *, above: int) -> list[Path]:
    """Rename the checkpoints of steps later than ``above``, so that no resume or rotation sees them; the new paths.

    They belong to a past that a run has left by going on from an earlier step. They are whole as they were, under
    ``aside-step-########``, and are never deleted by us. One rank calls it. What can't be renamed is a warning.
    """
    renamed = []
    for path in [path for step, path in step_folders(root).items() if step > above]:
        number, aside = 1, path.with_name(f"aside-{path.name}")
        while aside.exists():
            number, aside = number + 1, path.with_name(f"aside-{path.name}.{number + 1}")
        try:
            path.rename(aside)
        except OSError as error:
            log.warning(f"{path} is of a later step than {above} and can't be renamed: {error}")
        else:
            renamed.append(aside)
            log.warning(f"{path} is of a later step than {above}, from which this run goes on: now {aside.name}")
    return renamed


def rotate(root: Path, *, keep: int, best: int | None) -> list[Path]:
    """Delete all but the newest ``keep`` whole checkpoints and that of step ``best``; returns what was
    removed.

    Whole means here: a sound manifest, and files of the right sizes. A damaged one goes once ``keep`` newer
    whole ones are there; while none is whole, nothing goes. Leftovers of killed saves and deletions go too.
    One rank calls it, while no save is under way. What can't be deleted is a warning: a run doesn't end by
    it.
    """
    assert keep >= 1, keep
    folders = step_folders(root)
    whole = [step for step, path in folders.items() if _is_whole(path)]
    for leftover in [*root.glob(".step-*.partial"), *root.glob(".step-*.deleted")]:
        _delete(leftover)
    kept = {*whole[:keep], best}
    old = [step for step in folders if whole and step < whole[:keep][-1] and step not in kept]
    removed = []
    for step in old:
        doomed = root / f".{step_folder(step)}.deleted"
        try:
            folders[step].rename(doomed)
        except OSError as error:
            log.warning(f"{folders[step]} can't be deleted: {error.strerror or error}. It stays")
            continue
        _delete(doomed)
        removed.append(folders[step])
    return removed


def _is_whole(path: Path) -> bool:
    try:
        verify(path, checksums=False)
    except CheckpointError:
        return False
    return True


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning(f"{folder} can't be deleted: {error.strerror or error}. It takes room until someone does")
