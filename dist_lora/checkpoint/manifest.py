"""A checkpoint's manifest: its tensors, files, ranges, checksums, and the progress of the run.

A checkpoint is a folder ``step-00000200`` with one safetensors file per rank and ``manifest.json``, which is written
last: a resume ignores a folder without it. Nothing in it is trusted: ``read_manifest`` returns a manifest in which
every element of the trained state is in exactly one file of this folder, or raises an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import xxhash
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError

from dist_lora.errors import CheckpointError
from dist_lora.files import links_out, new_file, read_at_most
from dist_lora.lora.state import KINDS, Piece

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ITEM_BYTES = 4  # all trained state is fp32
MAX_MANIFEST_BYTES = 2**28  # 405B on 4,096 ranks: 6 MB

_STRICT = ConfigDict(extra="forbid", strict=True)
_MAX_NAMED = 5
_TENSOR_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.]{0,499}"
_KEY = re.compile(rf"({'|'.join(KINDS)})/({_TENSOR_NAME})/([0-9]{{1,18}})-([0-9]{{1,18}})")
_Dim = Annotated[int, Field(ge=1, lt=2**48)]


@dataclass(frozen=True)
class TensorSpec:
    """A trained tensor by its full name (``model.layers.0.self_attn.q_proj.lora_A``) and whole shape."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: Annotated[str, Field(pattern=rf"^{_TENSOR_NAME}\z")]
    shape: Annotated[tuple[_Dim, ...], Field(min_length=1, max_length=8)]

    @property
    def num_elements(self) -> int:
        """How many elements the whole tensor has."""
        return math.prod(self.shape)


def _piece_of_key(key: object) -> object:
    """The piece that a key names; a piece is returned as it is. Raises ``ValueError`` with the expected form."""
    if isinstance(key, Piece):
        return key
    parts = _KEY.fullmatch(key) if isinstance(key, str) else None
    if parts is None:
        raise ValueError("expected KIND/TENSOR/START-STOP")
    kind = next(k for k in KINDS if k == parts[1])
    return Piece(parts[2], kind, int(parts[3]), int(parts[4]))


PieceKey = Annotated[Piece, BeforeValidator(_piece_of_key), PlainSerializer(lambda piece: piece.key)]


@dataclass(frozen=True)
class FileEntry:
    """What one rank wrote: its file's name, size, checksum (``xxh3_128:<hex>``) and pieces in order."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    num_bytes: Annotated[int, Field(ge=0, lt=2**60)]
    checksum: Annotated[str, Field(pattern=r"^xxh3_128:[0-9a-f]{32}\z")]
    pieces: tuple[PieceKey, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a resume or ``gather`` needs besides the tensors themselves.

    ``progress`` is the run's own (data position, best loss, RNG numbers): plain JSON. ``config`` is the resolved YAML,
    ``base`` identifies the frozen model, ``adapter`` holds rank, alpha, dropout, targets and layers, ``versions`` those
    of the libraries that wrote it. ``files[i]`` is rank i's, ``world_size`` of them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    format_version: int
    step: Annotated[int, Field(ge=0, le=99_999_999)]
    world_size: Annotated[int, Field(ge=1)]
    tensors: tuple[TensorSpec, ...]
    files: tuple[FileEntry, ...]
    progress: dict[str, Any]
    config: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    versions: dict[str, str]


_MANIFEST = TypeAdapter(Manifest)
_ENTRY = TypeAdapter(FileEntry)


def rank_file(world_rank: int, world_size: int) -> str:
    """The name of a rank's file; no other names are read."""
    return f"rank-{world_rank:05d}-of-{world_size:05d}.safetensors"


def entry_to_bytes(entry: FileEntry) -> bytes:
    """A file's entry, serialized for sending to the first rank."""
    return _ENTRY.dump_json(entry)


def entry_from_bytes(data: bytes) -> FileEntry:
    """The inverse of ``entry_to_bytes``."""
    return _ENTRY.validate_json(data)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, fsynced, after the checks of ``read_manifest``.

    Raises:
        CheckpointError: it could not be read back: an element in no file or in two.
        ValueError, TypeError: ``progress``, ``base`` or ``adapter`` is not plain JSON, or holds a NaN.
        OSError: it can't be written.
    """
    path = folder / MANIFEST_FILE
    _raise_if_any(path, _faults(manifest))
    # Through JSON and back, so that the hash is of what will be read: no tuples, only string keys, no NaN.
    content = json.loads(json.dumps(_MANIFEST.dump_python(manifest), allow_nan=False))
    text = json.dumps(content | {"checksum": _own_checksum(content)}, indent=1, allow_nan=False)
    with new_file(path) as append:
        append(text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, checked as far as possible without opening the ranks' files.

    Raises:
        CheckpointError: names what is wrong: no manifest, not JSON, another format, changed since it was written, a
            field of another type, a file name that is not this folder's, an element in no file or in two.
    """
    path = folder / MANIFEST_FILE
    try:
        data = read_at_most(path, MAX_MANIFEST_BYTES)
        if len(data) > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is longer than {MAX_MANIFEST_BYTES:,} bytes: it is not a manifest")
        if links_out(folder, [MANIFEST_FILE]):
            raise CheckpointError(f"{path} is a link that leads out of its folder: nothing is read from there")
        content = json.loads(data, parse_constant=_refuse_constant)
        checksum = content.pop("checksum", None) if isinstance(content, dict) else None
        expected_checksum = _own_checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is not a complete checkpoint") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{path}: format_version is {_short(version)} and this program reads {FORMAT_VERSION}: "
            "use the version of dist_lora that wrote it"
        )
    if checksum != expected_checksum:
        raise CheckpointError(f"{path} doesn't match its own checksum: it was damaged, or changed by hand")
    try:
        manifest = _MANIFEST.validate_json(json.dumps(content))
    except ValidationError as error:
        _raise_if_any(path, _type_faults(error))
    _raise_if_any(path, _faults(manifest))
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _own_checksum(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _type_faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        yield f"{where}: {fault['msg']} (found {_short(fault['input'])})"


def _raise_if_any(path: Path, faults: Iterable[str]) -> None:
    messages = list(faults)
    if messages:
        rest = f"; and {len(messages) - _MAX_NAMED} more" if len(messages) > _MAX_NAMED else ""
        raise CheckpointError(f"{path}: {'; '.join(messages[:_MAX_NAMED])}{rest}")


def _faults(manifest: Manifest) -> Iterator[str]:
    """All contradictions in a manifest of the right types."""
    if len(manifest.files) != manifest.world_size:
        yield f"world_size is {manifest.world_size}, files are {len(manifest.files)}: expected one per rank"
    for rank, file in enumerate(manifest.files):
        expected = rank_file(rank, manifest.world_size)
        if file.name != expected:
            yield f"files[{rank}].name: {_short(file.name)} is not the name of rank {rank}'s file, {expected}"
        least_bytes = ITEM_BYTES * sum(piece.num_elements for piece in file.pieces)
        if file.num_bytes < least_bytes:
            yield f"{_short(file.name)}: {file.num_bytes} bytes can't hold its pieces of {least_bytes} bytes"
    yield from _coverage_faults(manifest)


def _coverage_faults(manifest: Manifest) -> Iterator[str]:
    """Each element of every tensor and kind that is in no file, in two, or in a file but not in a tensor."""
    specs = {spec.name: spec for spec in manifest.tensors}
    if len(specs) != len(manifest.tensors):
        yield f"tensors: {len(manifest.tensors) - len(specs)} names are listed twice"
    held: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for file in manifest.files:
        for piece in file.pieces:
            spec = specs.get(piece.name)
            if spec is None:
                yield f"{_short(file.name)}: {piece.key}: there is no tensor of this name"
            elif not 0 <= piece.start < piece.stop <= spec.num_elements:
                yield f"{_short(file.name)}: {piece.key}: not a range of its {spec.num_elements} elements"
            else:
                held.setdefault((piece.kind, piece.name), []).append((piece.start, piece.stop, file.name))
    for name, spec in specs.items():
        for kind in KINDS:
            yield from _range_faults(f"{kind} of {name}", sorted(held.get((kind, name), ())), spec.num_elements)


def _range_faults(tensor: str, ranges: list[tuple[int, int, str]], num_elements: int) -> Iterator[str]:
    if not ranges:
        yield f"{tensor} is missing: no file holds any of its {num_elements} elements"
        return
    end, holder = 0, ""
    for start, stop, file in ranges:
        if start > end:
            yield f"{tensor}: elements {end}-{start} are in no file"
        elif start < end:
            twice = f"elements {start}-{min(end, stop)} are stored twice"
            yield f"{tensor}: {twice}, in {_short(holder)} and {_short(file)}"
        if stop > end:
            end, holder = stop, file
    if end < num_elements:
        yield f"{tensor}: elements {end}-{num_elements} are in no file"
