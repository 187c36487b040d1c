"""The tensors of a model folder: name, dtype, shape and offset of each, from the files' headers alone.

A safetensors file is 8 bytes (little-endian length N), N bytes of JSON, then the tensors' bytes without a gap
(format: github.com/huggingface/safetensors). Nothing here reads more than a header and, for the content hash,
256 bytes of each tensor, so that the 405B's 812 GB are indexed in a moment.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from dist_lora.errors import WeightsError
from dist_lora.files import file_exists, links_out, parse_json, read_at_most, read_json
from dist_lora.text import MAX_NAMED, count, first_few

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
FLOAT_TYPES = ("BF16", "F16", "F32")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_SIZE = 2**63  # of a dim or an offset: the limit of the library and of torch
_MAX_DIMS = 64  # of a torch tensor
_SAMPLE_BYTES = 256
_LFS_MARK = b"version https://git-lfs"
_INCOMPLETE = "The download is incomplete; fetch that file again."


@dataclass(frozen=True)
class TensorOnDisk:
    """One tensor of a safetensors file: ``start`` is its byte offset from the beginning of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class WeightIndex:
    """All tensors of a model folder by name. Made by ``open_index``; holds no open file."""

    folder: Path
    tensors: dict[str, TensorOnDisk]

    def to_json(self) -> bytes:
        """Serialized for another process on this node, which then reads no headers; see ``from_json``."""
        tensors = [
            (
                tensor.name,
                str(tensor.file.relative_to(self.folder)),
                tensor.dtype,
                tensor.shape,
                tensor.start,
                tensor.num_bytes,
            )
            for tensor in self.tensors.values()
        ]
        return json.dumps(tensors).encode()

    @staticmethod
    def from_json(folder: Path, text: bytes) -> WeightIndex:
        """The index that ``to_json`` serialized, for a process that sees the same folder; not checked again."""
        tensors = [
            TensorOnDisk(name, folder / file, dtype, tuple(shape), start, num_bytes)
            for name, file, dtype, shape, start, num_bytes in json.loads(text)
        ]
        return WeightIndex(folder, {tensor.name: tensor for tensor in tensors})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the folder holds exactly these tensors, each with this shape.

        ``lm_head.weight`` may be there although ``shapes`` lacks it (tied embeddings: some files repeat it), and
        ``...rotary_emb.inv_freq``, which old files have, is ignored.

        Raises:
            WeightsError: some are missing, unexpected or have another shape; names up to five of each.
        """
        ignored = {name for name in self.tensors if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
        missing = [name for name in shapes if name not in self.tensors]
        unexpected = [name for name in self.tensors if name not in shapes and name not in ignored]
        differing = [
            f"{name} (found {self.tensors[name].shape}, expected {tuple(shape)})"
            for name, shape in shapes.items()
            if name in self.tensors and self.tensors[name].shape != tuple(shape)
        ]
        faults = [("missing", missing), ("of another shape", differing), ("unexpected", unexpected)]
        lines = [f"  {count(len(names), 'tensor')} {kind}: {first_few(names)}" for kind, names in faults if names]
        if lines:
            raise WeightsError(
                f"The weights in {self.folder} are not those of the model that its config.json describes "
                f"({count(len(shapes), 'tensor')}):\n"
                + "\n".join(lines)
                + "\nFetch config.json and the weights again from the same model."
            )

    def content_hash(self) -> str:
        """What identifies the weights: xxh3_128 of names, types, shapes and a sample of each tensor, in hex.

        The sample is the 256 bytes in the middle of each tensor, which distinguishes a fine-tuned model from its base,
        whose headers are the same. How the tensors are split over files doesn't matter. Costs one short read per
        tensor; call it on one rank.

        Raises:
            WeightsError: a file can't be read or was truncated.
        """
        digest = xxhash.xxh3_128()
        samples: dict[str, bytes] = {}
        for file, tensors in by_file(self.tensors.values()):
            with open_weights(file) as descriptor:
                samples |= {tensor.name: _sample(descriptor, tensor) for tensor in tensors}
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode() + samples[name])
        return digest.hexdigest()


@contextmanager
def open_weights(file: Path) -> Iterator[int]:
    """A descriptor for reading ``file`` within ``with``.

    Raises:
        WeightsError: the file can't be opened.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def by_file(tensors: Iterable[TensorOnDisk]) -> Iterator[tuple[Path, list[TensorOnDisk]]]:
    """The tensors of each file, files by name and tensors by offset, so that each file is read forward and once."""
    groups: dict[Path, list[TensorOnDisk]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.file, []).append(tensor)
    for file in sorted(groups):
        yield file, sorted(groups[file], key=lambda tensor: (tensor.start, tensor.num_bytes))


def open_index(folder: Path, *, allow_bytes: bool = False) -> WeightIndex:
    """The tensors of a model folder: of ``model.safetensors``, or of the files that its index names.

    Reads headers only, and checks all that they allow: every file exists and has the length that its header implies,
    dtypes are BF16, F16 or F32, tensors have no gap or overlap, and ``model.safetensors.index.json`` names the tensors
    that the files have. Where both exist, the single file is used, as in transformers. With ``allow_bytes`` U8 tensors
    are accepted too, for callers that read weights quantized on disk.

    Raises:
        WeightsError: a check failed; reports all damaged files at once.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; a folder with config.json and *.safetensors was expected.")
    if (folder / SINGLE_FILE).exists():
        refuse_links(folder, [SINGLE_FILE])
        return WeightIndex(
            folder, {tensor.name: tensor for tensor in read_header(folder / SINGLE_FILE, allow_bytes=allow_bytes)}
        )
    if not (folder / INDEX_FILE).exists():
        raise WeightsError(_why_no_weights(folder))
    weight_map = _read_weight_map(folder)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not file_exists(folder / file)]
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing):,} of the {count(len(files), 'file')} that {INDEX_FILE} names: "
            f"{first_few(missing)}. The download is incomplete; fetch them."
        )
    refuse_links(folder, files)
    tensors_of, errors = _read_headers(folder, files, allow_bytes=allow_bytes)
    faults = [str(error) for error in errors] or _disagreements(weight_map, tensors_of)
    if faults:
        heading = "" if len(faults) == 1 else f"{len(faults):,} faults in {folder}:\n  "
        # The cause tells files that this user may not read from damaged ones.
        raise WeightsError(heading + "\n  ".join(faults[:MAX_NAMED]) + _and_more(faults)) from next(iter(errors), None)
    return WeightIndex(folder, {tensor.name: tensor for tensors in tensors_of.values() for tensor in tensors})


def hash_config(folder: Path) -> str:
    """What identifies a model's config.json, 32 hex digits: xxh3_128 of its settings in sorted order.

    ``_name_or_path`` and ``transformers_version`` are left out: where a copy is and what wrote it don't matter.

    Raises:
        WeightsError: config.json is missing or is not a JSON object.
    """
    config = read_model_json(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return xxhash.xxh3_128(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_header(file: Path, *, allow_bytes: bool = False) -> tuple[TensorOnDisk, ...]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        WeightsError: it can't be read, is a git-lfs pointer, truncated or too long, its header is damaged, or
            a tensor's dtype is none of BF16, F16, F32 (nor U8, with ``allow_bytes``).
    """
    tensors, _ = _read_whole_header(file, allow_bytes=allow_bytes)
    return tensors


def read_metadata(file: Path) -> dict[str, Any]:
    """The metadata in the header of a safetensors file; empty if it has none.

    Raises:
        WeightsError: see ``read_header``.
    """
    _, metadata = _read_whole_header(file, allow_bytes=True)
    return metadata


def _read_whole_header(file: Path, *, allow_bytes: bool) -> tuple[tuple[TensorOnDisk, ...], dict[str, Any]]:
    with open_weights(file) as descriptor:
        file_bytes = os.fstat(descriptor).st_size
        beginning = _read_at(descriptor, len(_LFS_MARK), 0, file=file)
        _refuse_lfs_pointer(beginning, file=file)
        header_bytes = int.from_bytes(beginning[:8], "little") if len(beginning) >= 8 else 0
        if file_bytes < 8 or header_bytes > file_bytes - 8:
            raise WeightsError(
                f"{file} is {file_bytes:,} bytes long and its header alone would take {8 + header_bytes:,}. "
                + _INCOMPLETE
            )
        if header_bytes > _MAX_HEADER_BYTES:
            raise WeightsError(_damaged(file, f"its header claims {header_bytes:,} bytes"))
        try:
            header = parse_json(_read_at(descriptor, header_bytes, 8, file=file), what="its header")
        except ValueError as error:
            raise WeightsError(_damaged(file, str(error))) from error
    metadata = header.pop("__metadata__", None)
    tensors = sorted(
        (_entry(name, value, file=file, data_start=8 + header_bytes) for name, value in header.items()),
        key=lambda tensor: (tensor.start, tensor.num_bytes),
    )
    check_types(tensors, where=file, allowed=(*FLOAT_TYPES, "U8") if allow_bytes else FLOAT_TYPES)
    _check_offsets(tensors, file=file, data_start=8 + header_bytes, file_bytes=file_bytes)
    return tuple(tensors), metadata if isinstance(metadata, dict) else {}


def _entry(name: str, value: Any, *, file: Path, data_start: int) -> TensorOnDisk:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(number) is int and 0 <= number < _MAX_SIZE for number in (*shape, begin, end))
        if not (isinstance(dtype, str) and whole and begin <= end and len(shape) <= _MAX_DIMS):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(_damaged(file, f"the entry of {name} in its header is invalid")) from error
    return TensorOnDisk(name, file, dtype, shape, data_start + begin, end - begin)


def check_types(tensors: Iterable[TensorOnDisk], *, where: Path, allowed: Sequence[str] = FLOAT_TYPES) -> None:
    """Refuses tensors of another dtype.

    Raises:
        WeightsError: there are some; names up to five.
    """
    foreign = [tensor for tensor in tensors if tensor.dtype not in allowed]
    if foreign:
        raise WeightsError(
            f"{where} holds {count(len(foreign), 'tensor')} of a dtype other than BF16, F16 and F32: "
            f"{first_few([f'{tensor.name} ({tensor.dtype})' for tensor in foreign])}. 8-bit dtypes "
            "mean that the model is quantized already: use the unquantized one."
        )


def _check_offsets(tensors: Sequence[TensorOnDisk], *, file: Path, data_start: int, file_bytes: int) -> None:
    expected = data_start
    for tensor in tensors:
        needed = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if tensor.num_bytes != needed:
            kind = f"{tensor.dtype} {tensor.shape}"
            problem = f"{tensor.name}, {kind}, takes {needed:,} bytes and has {tensor.num_bytes:,}"
            raise WeightsError(_damaged(file, problem))
        if tensor.start != expected:
            raise WeightsError(
                _damaged(
                    file,
                    f"{tensor.name} begins at byte {tensor.start:,} and the one before ends at {expected:,}",
                )
            )
        expected += tensor.num_bytes
    if file_bytes < expected:
        raise WeightsError(f"{file} is {file_bytes:,} bytes long and its header describes {expected:,}. {_INCOMPLETE}")
    if file_bytes > expected:
        raise WeightsError(_damaged(file, f"it is {file_bytes:,} bytes long and its header describes {expected:,}"))


def _read_headers(
    folder: Path, files: Sequence[str], *, allow_bytes: bool
) -> tuple[dict[str, tuple[TensorOnDisk, ...]], list[WeightsError]]:
    tensors_of: dict[str, tuple[TensorOnDisk, ...]] = {}
    errors: list[WeightsError] = []
    for file in files:
        try:
            tensors_of[file] = read_header(folder / file, allow_bytes=allow_bytes)
        except WeightsError as error:
            errors.append(error)
    return tensors_of, errors


def _disagreements(weight_map: Mapping[str, str], tensors_of: Mapping[str, Sequence[TensorOnDisk]]) -> list[str]:
    holders: dict[str, list[str]] = {}
    for file, tensors in tensors_of.items():
        for tensor in tensors:
            holders.setdefault(tensor.name, []).append(file)
    twice = [
        f"{name} is in {len(files)} files: {first_few(files)}. They are from different models; fetch them again."
        for name, files in holders.items()
        if len(files) > 1
    ]
    lacking = [
        f"{file} lacks {name}, which the index lists in this file. {_INCOMPLETE}"
        for name, file in weight_map.items()
        if file not in holders.get(name, [])
    ]
    unnamed = [
        f"{files[0]} holds {name}, which {INDEX_FILE} doesn't name. Fetch both again, from the same model."
        for name, files in holders.items()
        if name not in weight_map
    ]
    return twice + lacking + unnamed


def _read_weight_map(folder: Path) -> dict[str, str]:
    file = folder / INDEX_FILE
    weight_map = read_model_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise WeightsError(_damaged(file, "it has no weight_map from tensor names to file names"))
    outside = sorted({value for value in weight_map.values() if not _stays_inside(value)})
    if outside:
        raise WeightsError(
            f"{file} names files outside of its folder: {first_few(outside)}. Nothing is read from there."
        )
    return weight_map


def _stays_inside(file_name: str) -> bool:
    path = PurePosixPath(file_name)
    unsafe = {"..", "\\", "\0"} & {*path.parts, *file_name}
    return path.suffix == ".safetensors" and not path.is_absolute() and not unsafe


def refuse_links(folder: Path, files: Sequence[str]) -> None:
    """Raise ``WeightsError``, naming them, where files of a model folder link to outside of it; see ``links_out``."""
    outside = links_out(folder, files)
    if outside:
        raise WeightsError(
            f"{folder} has links that point outside of it: {first_few(outside)}. Nothing is read from there: put the "
            "files themselves into the folder, or name the folder that they are in."
        )


def _why_no_weights(folder: Path) -> str:
    convert = "convert it with transformers (from_pretrained, then save_pretrained), which writes safetensors."
    inside = {path.name for path in folder.iterdir()} | {path.name for path in folder.glob("original/*")}
    for ending, description in (
        (
            ".pth",
            "Meta's own format (consolidated.*.pth), whose names and q/k rows differ from Hugging Face's",
        ),
        (".bin", "pickled weights (*.bin), which are never read because they can run code"),
        (".gguf", "a GGUF file, which is quantized"),
    ):
        found = sorted(name for name in inside if name.endswith(ending))
        if found and not any(name.endswith(".safetensors") for name in inside):
            return f"{folder} holds {description}: {first_few(found)}. Use the model's safetensors files, or {convert}"
    shards = sorted(name for name in inside if name.endswith(".safetensors"))
    if shards:
        return (
            f"{folder} holds {first_few(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}, so they may be "
            "incomplete. Fetch the index too."
        )
    return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Fetch the model's safetensors files."


def read_model_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        WeightsError: the file can't be read, is a git-lfs pointer, or holds no JSON object.
    """
    try:
        _refuse_lfs_pointer(read_at_most(file, len(_LFS_MARK)), file=file)
        return read_json(file)
    except WeightsError:
        raise
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise WeightsError(_damaged(file, str(error))) from error


def _sample(descriptor: int, tensor: TensorOnDisk) -> bytes:
    count = min(_SAMPLE_BYTES, tensor.num_bytes)
    sample = _read_at(descriptor, count, tensor.start + (tensor.num_bytes - count) // 2, file=tensor.file)
    if len(sample) < count:
        raise WeightsError(f"{tensor.file} ends within {tensor.name}: it was truncated. {_INCOMPLETE}")
    return sample


def _read_at(descriptor: int, count: int, offset: int, *, file: Path) -> bytes:
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise unreadable(file, error) from error


def _refuse_lfs_pointer(beginning: bytes, *, file: Path) -> None:
    if beginning.startswith(_LFS_MARK):
        raise WeightsError(f"{file} is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder.")


def _damaged(file: Path, problem: str) -> str:
    return f"{file} is damaged: {problem}. Fetch it again."


def _and_more(faults: Sequence[str]) -> str:
    return "" if len(faults) <= MAX_NAMED else f"\n  and {len(faults) - MAX_NAMED:,} more"


def unreadable(file: Path, error: OSError, *, tensor_name: str = "") -> WeightsError:
    """The error for a file that the system refuses to open or read."""
    within = f" within {tensor_name}" if tensor_name else ""
    return WeightsError(f"{file} can't be read{within}: {error.strerror or error}.")
