"""Gathers the ranks' shards into one adapter folder, on any CPU: no process group, no GPU, no base model."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from dist_lora.base.hub import cached_model
from dist_lora.base.tokenizer_files import hash_tokenizer_files
from dist_lora.checkpoint.folders import step_folders, step_of
from dist_lora.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from dist_lora.checkpoint.read import load_pieces, newest_intact_here, verify
from dist_lora.config.schema import ModuleAdapter
from dist_lora.errors import EXIT_USER, CheckpointError, ConfigError, exit_code_of
from dist_lora.files import no_folder
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.learned import Size
from dist_lora.lora.origin import BaseIdentity, RunOrigin
from dist_lora.lora.run_facts import RunFacts, SetFacts, names_in, shown_settings, tree_of, validated
from dist_lora.lora.state import Piece
from dist_lora.text import count

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class _AdapterFacts:
    """A manifest's ``adapter``. Any other key belongs to a kind of adapter that this version can't write."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rank: Annotated[int, Field(ge=1)]
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    num_layers: int
    modules: tuple[ModuleAdapter, ...] | None = None  # where ranks, alphas or targets differ by layer
    train_tokens: tuple[int, ...] = ()  # ids, ascending
    unfrozen: tuple[str, ...] = ()  # linears and norms that are trained themselves


_FACTS = TypeAdapter(_AdapterFacts)
_BASE = TypeAdapter(BaseIdentity)
_NORMS = TypeAdapter(dict[str, Size])


def gather_adapter(
    checkpoint: Path, *, out: Path, verify: bool = True, tokenizer: Path | None = None, has_learned: bool = True
) -> Path:
    """The folder ``out`` with the adapter of a checkpoint, as PEFT and vLLM load it; returns ``out``.

    Reads the adapter's bytes only (and with ``verify`` every byte once, for the checksums). Local: one process.

    Args:
        checkpoint: a folder ``step-########``; or a run's folder or its ``checkpoints``, of which the newest intact
            checkpoint is taken, verified in any case.
        tokenizer: the base's folder; None takes the one that the run recorded, if it is here (one of the
            hub: in the hub's cache) and its tokenizer unchanged.
        has_learned: also compute and record what was learned (``learned.json``).

    Raises:
        ConfigError: there is none.
        CheckpointError: it is damaged; names the file.
        AdapterError, SaveError: see ``write_adapter``.
    """
    folder = _checkpoint_folder(checkpoint, verify)
    manifest = read_manifest(folder)
    facts, base = _facts(folder, manifest)
    run = RunOrigin.of_json(manifest.progress.get("origin"), where=f"{folder / MANIFEST_FILE}: progress.origin")
    write_adapter(
        out,
        tensors=_whole_tensors(folder, manifest),
        rank=facts.rank,
        alpha=facts.alpha,
        dropout=facts.dropout,
        targets=facts.targets,
        layers=None if set(facts.layers) == set(range(facts.num_layers)) else facts.layers,
        base=base,
        run=run,
        tokenizer=tokenizer or _tokenizer_of(run, out),
        modules=facts.modules,
        facts=replace(run_facts(folder, manifest), num_layers=facts.num_layers),
        weight_norms=_weight_norms(folder, manifest) if has_learned else None,
        tokens=facts.train_tokens,
        unfrozen=facts.unfrozen,
    )
    return out


def _weight_norms(folder: Path, manifest: Manifest) -> dict[str, float]:
    """Those that the run summed while it loaded its base; none of an older version."""
    return validated(
        _NORMS,
        manifest.progress.get("weight_norms") or {},
        where=f"{folder / MANIFEST_FILE}: progress.weight_norms",
    )


def run_facts(folder: Path, manifest: Manifest) -> RunFacts:
    """What a checkpoint's manifest knows about its run, for the model card; of an older version less.

    Raises:
        AdapterError: ``progress.card`` is damaged.
    """
    progress = manifest.progress
    recorded = RunFacts.of_json(progress.get("card"), where=f"{folder / MANIFEST_FILE}: progress.card")
    num_steps, best_loss = progress.get("num_steps"), progress.get("best_loss")
    if not recorded.evaluation and progress.get("best_step") == manifest.step and isinstance(best_loss, float):
        recorded = replace(recorded, evaluation={"eval_loss": best_loss}, evaluated_step=manifest.step)
    return replace(
        recorded,
        step=manifest.step,
        num_steps=num_steps if isinstance(num_steps, int) else None,
        train=recorded.train or _named(manifest.config, "train"),
        held_out=recorded.held_out or _named(manifest.config, "eval"),
        settings=shown_settings(manifest.config),
        versions=manifest.versions,
    )


def _named(config: str, which: str) -> SetFacts | None:
    """A data set of which an older version recorded the name alone."""
    section = tree_of(config).get("data")
    names = names_in(section.get(which)) if isinstance(section, Mapping) else ()
    return SetFacts(names) if names else None


def _tokenizer_of(run: RunOrigin, out: Path) -> Path | None:
    """The folder that the tokenizer is copied from, if it is here; else a warning says what lacks."""
    if run.model is None:
        return None  # of a version that didn't record it
    own = Path(run.model)
    folder = own if own.is_absolute() else cached_model(run.model, revision=run.revision)
    with contextlib.suppress(OSError):
        if folder is not None and no_folder(folder) is None and hash_tokenizer_files(folder) == run.tokenizer:
            return folder
    where = "a folder here" if own.is_absolute() else "the hub's cache here"
    log.warning(
        f"{out} is written without its tokenizer: the base's ({run.model}) is not in {where}, or has changed. The "
        "commands of dist-lora take it from the base; for others copy the base's tokenizer files beside the adapter"
    )
    return None


def verify_checkpoints(path: Path, *, report: Callable[[str], None]) -> None:
    """Read every byte of a checkpoint, or of all of a run, and ``report`` in one line each whether it is intact.

    Writes nothing. Local: one process.

    Args:
        path: what ``gather_adapter`` takes for ``checkpoint``.

    Raises:
        ConfigError: there is none.
        CheckpointError: some are damaged: how many, after all are reported.
    """
    _refuse_missing(path)
    folders = [path] if _is_checkpoint(path) else list(step_folders(_root(path)).values())
    if not folders:
        raise ConfigError(_none_in(path))
    num_damaged = 0
    for folder in folders:
        try:
            manifest = verify(folder)
        except CheckpointError as error:
            if exit_code_of(error) == EXIT_USER:
                raise
            num_damaged += 1
            message = str(error)
            names_folder = message.startswith(f"{folder} is damaged: ")
            report(message if names_folder else f"{folder} is damaged: {message}")
        else:
            num_bytes = sum(entry.num_bytes for entry in manifest.files)
            num_files = count(len(manifest.files), "rank's file", "ranks' files")
            report(f"{folder} is intact: step {manifest.step}, {num_files}, {num_bytes:,} bytes")
    if num_damaged:
        raise CheckpointError(
            f"{path}: {num_damaged} of {count(len(folders), 'checkpoint')} {'is' if num_damaged == 1 else 'are'} damaged, see the lines above"
        )


def _checkpoint_folder(path: Path, has_checksums: bool) -> Path:
    """The checkpoint that a path stands for, verified."""
    _refuse_missing(path)
    if _is_checkpoint(path):
        verify(path, checksums=has_checksums)
        return path
    newest = newest_intact_here(_root(path))
    if newest is None:
        raise ConfigError(_none_in(path))
    return newest


def _refuse_missing(path: Path) -> None:
    problem = no_folder(path)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}. {_EXPECTED}")


def _is_checkpoint(path: Path) -> bool:
    return step_of(path) is not None or (path / MANIFEST_FILE).exists()


def _root(path: Path) -> Path:
    """The folder of checkpoints of a run's folder, or that folder itself."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() and not step_folders(path) else path


def _none_in(path: Path) -> str:
    return f"{path} holds no checkpoint. {_EXPECTED}"


_EXPECTED = "Give a run's folder, its checkpoints folder, or a folder step-######## in it"


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
