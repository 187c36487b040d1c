"""From the ranks' shards to one adapter folder, on any CPU: no process group, no GPU, no base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from dist_lora.checkpoint.folders import step_folders, step_of
from dist_lora.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from dist_lora.checkpoint.read import load_pieces, newest_whole_here, verify
from dist_lora.errors import CheckpointError
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity
from dist_lora.lora.state import Piece


@dataclass(frozen=True)
class _AdapterFacts:
    """A manifest's ``adapter``. Any other key is of a kind of adapter that this version can't write."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rank: Annotated[int, Field(ge=1)]
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    num_layers: int


_FACTS = TypeAdapter(_AdapterFacts)
_BASE = TypeAdapter(BaseIdentity)


def gather_adapter(checkpoint: Path, *, out: Path, verify: bool = True) -> Path:
    """The folder ``out`` with the adapter of a checkpoint, as PEFT and vLLM load it; returns ``out``.

    Reads the adapter's bytes only (and with ``verify`` every byte once, for the checksums). Local: one
    process.

    Args:
        checkpoint: a folder ``step-########``; or a run's folder or its ``checkpoints``, of which the
        newest whole
            checkpoint is taken, verified in any case.

    Raises:
        CheckpointError: there is none, or it is damaged: naming the file.
        AdapterError, SaveError: see ``write_adapter``.
    """
    folder = _checkpoint_folder(checkpoint, verify)
    manifest = read_manifest(folder)
    facts, base = _facts(folder, manifest)
    write_adapter(
        out,
        tensors=_whole_tensors(folder, manifest),
        rank=facts.rank,
        alpha=facts.alpha,
        dropout=facts.dropout,
        targets=facts.targets,
        layers=None if set(facts.layers) == set(range(facts.num_layers)) else facts.layers,
        base=base,
    )
    return out


def verify_checkpoints(given: Path, *, tell: Callable[[str], None]) -> None:
    """Read every byte of a checkpoint, or of all of a run, and ``tell`` of each in one line whether it is whole.

    Nothing is made. Local: one process.

    Args:
        given: what ``gather_adapter`` takes for ``checkpoint``.

    Raises:
        CheckpointError: some are damaged: how many, after all are told; or there is none.
    """
    folders = [given] if _is_checkpoint(given) else list(step_folders(_root(given)).values())
    if not folders:
        raise CheckpointError(_none_in(given))
    num_damaged = 0
    for folder in folders:
        try:
            manifest = verify(folder)
        except CheckpointError as error:
            num_damaged += 1
            words = str(error)
            tell(words if words.startswith(f"{folder} is damaged: ") else f"{folder} is damaged: {words}")
        else:
            num_bytes = sum(entry.num_bytes for entry in manifest.files)
            tell(f"{folder} is whole: step {manifest.step}, {len(manifest.files)} ranks' files, {num_bytes:,} bytes")
    if num_damaged:
        raise CheckpointError(f"{given}: {num_damaged} of {len(folders)} checkpoints damaged, as told line by line")


def _checkpoint_folder(given: Path, is_to_verify: bool) -> Path:
    """The one checkpoint that a path means, verified."""
    if _is_checkpoint(given):
        verify(given, checksums=is_to_verify)
        return given
    newest = newest_whole_here(_root(given))
    if newest is None:
        raise CheckpointError(_none_in(given))
    return newest


def _is_checkpoint(given: Path) -> bool:
    return step_of(given) is not None or (given / MANIFEST_FILE).exists()


def _root(given: Path) -> Path:
    """The folder of checkpoints that a run's folder, or that folder itself, means."""
    return given / "checkpoints" if (given / "checkpoints").is_dir() and not step_folders(given) else given


def _none_in(given: Path) -> str:
    return f"{given} holds no checkpoint. Give a run's folder, its checkpoints folder, or a folder step-######## in it"


def _facts(folder: Path, manifest: Manifest) -> tuple[_AdapterFacts, BaseIdentity]:
    part, content = "adapter", manifest.adapter
    try:
        facts = _FACTS.validate_json(json.dumps(content), strict=True)
        part, content = "base", manifest.base
        return facts, _BASE.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{part}.{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: {faults}. Use the version of dist_lora that wrote it, "
            f"{manifest.versions.get('dist_lora', 'unknown')}"
        ) from error


def _whole_tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    pieces = [Piece(spec.name, "adapter", 0, spec.num_elements) for spec in manifest.tensors]
    loaded = load_pieces(folder, manifest, pieces)
    return {spec.name: loaded[piece].view(spec.shape) for spec, piece in zip(manifest.tensors, pieces, strict=True)}
