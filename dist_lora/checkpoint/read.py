"""Finding an intact checkpoint, and reading any part of the trained state from it.

Which ranks wrote it and how the tensors were sharded doesn't matter: a wanted range is assembled from whatever pieces
the files hold, and only its bytes are read.
"""

from __future__ import annotations

import bisect
import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lora.checkpoint.folders import step_folders, step_of
from dist_lora.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    read_manifest,
)
from dist_lora.errors import EXIT_USER, CheckpointError, exit_code_of
from dist_lora.files import links_out
from dist_lora.lora.state import Piece
from dist_lora.text import first_few

if TYPE_CHECKING:
    from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

_BUFFER_BYTES = 16 * 2**20


def verify(folder: Path, *, checksums: bool = True) -> Manifest:
    """The manifest of a checkpoint, verified by each file's presence, size and checksum.

    Reads every byte; without ``checksums`` only the manifest and the sizes. Local: one rank calls it.

    Raises:
        CheckpointError: names the folder and every file that differs from the manifest, or one that this user may not read.
    """
    manifest = read_manifest(folder)
    step = step_of(folder)
    faults = [fault for entry in manifest.files if (fault := _file_fault(folder, entry, checksums)) is not None]
    if step is not None and step != manifest.step:
        faults.insert(0, f"{MANIFEST_FILE} is that of step {manifest.step}")
    if faults:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults)}")
    return manifest


def _file_fault(folder: Path, entry: FileEntry, checksums: bool) -> str | None:
    path = folder / entry.name
    try:
        if links_out(folder, [entry.name]):
            return f"{entry.name} is a link that leads out of the folder, and nothing is read from there"
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            return f"{entry.name} is not a file"
        if info.st_size != entry.num_bytes:
            return f"{entry.name} has {info.st_size} bytes, {entry.num_bytes} were written{_lacking(path, entry)}"
        if checksums and (checksum := checksum_of(path)) != entry.checksum:
            return f"{entry.name} has the checksum {checksum}, {entry.checksum} was written{_lacking(path, entry)}"
    except FileNotFoundError:
        return f"{entry.name} is missing"
    except PermissionError as error:  # nothing is damaged, and no older checkpoint may be taken instead
        raise CheckpointError(
            f"{path} can't be read by this user: {error.strerror or error}. Set its permissions, or start as the user who wrote it"
        ) from error
    except OSError as error:
        return f"{entry.name} can't be read: {error.strerror or error}"
    return None


def _lacking(path: Path, entry: FileEntry) -> str:
    """What a damaged file lacks, as far as its header can still be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError):
        return ""
    lacking = [_describe(piece) for piece in entry.pieces if piece.key not in keys]
    return f"; it lacks {first_few(lacking)}" if lacking else ""


def _describe(piece: Piece) -> str:
    return f"{piece.kind} of {piece.name} (elements {piece.start}-{piece.stop})"


def checksum_of(path: Path) -> str:
    """``xxh3_128:<hex>`` of a file's bytes, read once in order."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(buffer[:num_bytes])
    return f"xxh3_128:{digest.hexdigest()}"


def newest_intact_here(root: Path) -> Path | None:
    """The newest intact checkpoint of ``root``, verified, or None where there is no checkpoint at all. Local.

    Damaged newer ones are logged in one warning.

    Raises:
        CheckpointError: there are checkpoints, but none is intact; or one can't be read by this user.
    """
    faults: list[str] = []
    for path in step_folders(root).values():
        try:
            verify(path)
        except CheckpointError as error:
            if exit_code_of(error) == EXIT_USER:
                raise
            faults.append(str(error))
            continue
        if faults:
            log.warning(f"{'; '.join(faults)}. Using the one before: {path}")
        return path
    if faults:
        raise CheckpointError(
            f"no checkpoint of {root} is intact: {'; '.join(faults)}. "
            "Restore an intact one, or start over with checkpoint.resume=never"
        )
    return None


def newest_intact(root: Path, world: World) -> Path | None:
    """``newest_intact_here`` of the first rank, on all ranks. All ranks call it; no collective.

    Raises:
        CheckpointError: on the first rank, ``RankError`` on the others: none is intact.
    """

    def look() -> bytes:
        newest = newest_intact_here(root)
        return newest.name.encode() if newest else b""

    name = world.once("looking for the newest intact checkpoint", look).decode()
    return root / name if name else None


@dataclass(frozen=True)
class _StoredPiece:
    """A piece and the file that holds it."""

    piece: Piece
    entry: FileEntry


def load_pieces(folder: Path, manifest: Manifest, wanted: Sequence[Piece]) -> dict[Piece, Tensor]:
    """The wanted ranges, each a 1-D fp32 CPU tensor, assembled from the files' pieces. Local: any rank, any ranges.

    Reads the wanted bytes and the files' headers only; checksums are left to ``verify``.

    Raises:
        CheckpointError: names a wanted range that the manifest doesn't hold, or the file that lacks a piece, has
            another size or can't be read.
    """
    held = _held_by_tensor(manifest)
    parts: dict[str, list[tuple[Piece, Piece]]] = {}
    for piece in wanted:
        for holder in _overlapping(held.get((piece.kind, piece.name), []), piece, folder):
            parts.setdefault(holder.entry.name, []).append((piece, holder.piece))
    faults = [f for e in manifest.files if e.name in parts and (f := _file_fault(folder, e, False)) is not None]
    if faults:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults)}")
    for name, pairs in parts.items():
        _check_parts(folder / name, pairs)
    loaded = {piece: torch.empty(piece.num_elements) for piece in wanted}
    for name, pairs in parts.items():
        _read_parts(folder / name, pairs, loaded)
    return loaded


def _held_by_tensor(manifest: Manifest) -> Mapping[tuple[str, str], list[_StoredPiece]]:
    held: dict[tuple[str, str], list[_StoredPiece]] = {}
    for entry in manifest.files:
        for piece in entry.pieces:
            held.setdefault((piece.kind, piece.name), []).append(_StoredPiece(piece, entry))
    for pieces in held.values():
        pieces.sort(key=lambda h: h.piece.start)
    return held


def _overlapping(held: list[_StoredPiece], wanted: Piece, folder: Path) -> Iterator[_StoredPiece]:
    """The stored pieces that cover a wanted one, in order and without gaps."""
    if not held or not 0 <= wanted.start <= wanted.stop <= held[-1].piece.stop:
        stored = f"{held[-1].piece.stop} elements are stored" if held else "no file holds any of it"
        raise CheckpointError(
            f"{folder}: {wanted.kind} of {wanted.name}, elements {wanted.start}-{wanted.stop}: {stored}. "
            "The checkpoint is another run's, or damaged"
        )
    first = bisect.bisect_right(held, wanted.start, key=lambda h: h.piece.stop)
    for holder in held[first:]:
        if holder.piece.start >= wanted.stop or wanted.start == wanted.stop:
            return
        yield holder


def _check_parts(path: Path, pairs: list[tuple[Piece, Piece]]) -> None:
    """Check in a file's header that it holds what will be read from it, before memory is allocated for that."""
    with _opened(path) as file:
        for _, held in pairs:
            _slice_of(file, held, path)


def _read_parts(path: Path, pairs: list[tuple[Piece, Piece]], loaded: dict[Piece, Tensor]) -> None:
    with _opened(path) as file:
        for wanted, held in pairs:
            start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
            values = _slice_of(file, held, path)[start - held.start : stop - held.start]
            loaded[wanted][start - wanted.start : stop - wanted.start].copy_(values)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error


def _slice_of(file: Any, held: Piece, path: Path) -> Any:
    try:
        stored = file.get_slice(held.key)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} lacks {held.kind} of {held.name}, elements {held.start}-{held.stop}, "
            "which the manifest lists in this file"
        ) from error
    if stored.get_dtype() != "F32" or stored.get_shape() != [held.num_elements]:
        raise CheckpointError(
            f"{path}: {held.key} is {stored.get_dtype()} {stored.get_shape()}, expected F32 [{held.num_elements}]"
        )
    return stored
