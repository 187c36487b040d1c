"""Writing an adapter as a folder that PEFT and vLLM load, whole or not at all; ``adapter_reader`` has the format."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

import dist_lora
from dist_lora.base.safetensors import TYPE_NAMES, bytes_of, write_safetensors
from dist_lora.base.tokenizer_files import copy_tokenizer, set_template
from dist_lora.config.schema import ModuleAdapter
from dist_lora.errors import AdapterError, ConfigError, cannot_write
from dist_lora.files import file_exists, is_empty_folder, swap_in, sync_folder
from dist_lora.herd.shape import module_path
from dist_lora.lora.adapter_reader import (
    SEAL,
    SEALED,
    faults_of,
    layer_of,
    peft_key,
    rows_faults,
    unfrozen_of,
    weights_faults,
)
from dist_lora.lora.card import CARD_FILE, Recipe, card
from dist_lora.lora.learned import learned_from, write_learned
from dist_lora.lora.origin import (
    CONFIG_FILE,
    FORMAT,
    ORIGIN_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    RunOrigin,
    own_checksum,
)
from dist_lora.lora.peft_config import NO_TARGETS
from dist_lora.lora.run_facts import RunFacts, public_name
from dist_lora.lora.spectrum import spectra
from dist_lora.lora.tokens import EMBEDDING_ROWS, HEAD_ROWS
from dist_lora.text import first_few


def write_adapter(
    folder: Path,
    *,
    tensors: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    base: BaseIdentity,
    layers: Sequence[int] | None = None,
    run: RunOrigin | None = None,
    tokenizer: Path | None = None,
    modules: Sequence[ModuleAdapter] | None = None,
    facts: RunFacts | None = None,
    weight_norms: Mapping[str, float] | None = None,
    tokens: Sequence[int] = (),
    unfrozen: Sequence[str] = (),
) -> None:
    """Writes the adapter folder, whole or not at all, replacing an adapter that is there.

    Call it on one rank, with whole (gathered) tensors. No network. A writer that is killed leaves the former
    adapter; between its two last renames under the name ``.<folder>.replaced``, until the next writer is done.

    Args:
        tensors: ``<module>.lora_A`` ``(R, D_in)`` and ``<module>.lora_B`` ``(D_out, R)``, any float type and device.
        layers: the layers that are adapted; None means all of the model.
        base: a path in its name is reduced to its last component: where the base lies is in ``run``.
        run: what its run decided, and a folder with it needs nothing else to be answered as it was trained.
        tokenizer: the base's folder, from which the tokenizer is copied, with the run's chat template.
        modules: the adapted linears where ``targets`` in ``layers`` don't say all, each with its own rank and alpha.
        facts: what the run knows about itself, for the model card; no path may be in it.
        weight_norms: Frobenius norms of the base's weights by module, as far as they are known, for ``learned.json``; without
            it that isn't written.
        tokens: ids, ascending, whose rows ``(N, D)`` are among the tensors: ``model.embed_tokens.token_rows``, and
            ``lm_head.token_rows`` of a head of its own.
        unfrozen: linears and norms whose whole weights ``<module>.weight`` are among the tensors.

    Raises:
        AdapterError: a tensor is not whole ("not gathered"), not finite, unexpected or lacks its other
            half; nothing is written.
        ConfigError: ``folder`` exists and is not an adapter.
        SaveError: the system refuses to write.
    """
    chosen = None if layers is None else tuple(sorted(layers))
    _refuse_tensors(
        tensors, rank=rank, targets=targets, layers=chosen, modules=modules, tokens=tokens, unfrozen=unfrozen
    )
    if file_exists(folder) and not file_exists(folder / CONFIG_FILE) and not is_empty_folder(folder):
        raise ConfigError(f"{folder} exists and isn't an adapter (it has no {CONFIG_FILE}). Choose another folder.")
    partial = folder.with_name(f".{folder.name}.partial")
    base = BaseIdentity(public_name(base.name), base.revision, base.content_hash, base.config_hash)
    run, facts = run or RunOrigin(), facts or RunFacts()
    config = _peft_config(rank, alpha, dropout, targets=targets, layers=chosen, base=base, run=run)
    if modules is not None:
        config |= _patterns(modules, rank=rank, alpha=alpha)
    if tokens:
        config["trainable_token_indices"] = _token_indices(tensors, tokens)
    if unfrozen:
        config["modules_to_save"] = list(unfrozen)
    adapters = _adapters(tensors, modules, rank=rank, alpha=alpha)
    recipe = Recipe.of(adapters, dropout=dropout, layers=chosen, tokens=tokens, unfrozen=unfrozen)
    text = card("adapter", base=base, recipe=recipe, origin=run, facts=facts, software=_versions())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        checksum = _write_files(partial, tensors, config, base=base, run=run, facts=facts)
        if weight_norms is not None and adapters:
            record = learned_from(spectra(tensors, adapters), weight_norms, adapters)
            write_learned(partial, record, weights=checksum)
        (partial / CARD_FILE).write_text(text, encoding="utf-8")
        _write_tokenizer(partial, tokenizer, chat_template=run.chat_template)
        sync_folder(partial)
        swap_in(partial, folder, former=folder.with_name(f".{folder.name}.replaced"))
    except OSError as error:
        raise cannot_write(f"The adapter can't be written to {folder}: {error.strerror or error}.", error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tokenizer(partial: Path, tokenizer: Path | None, *, chat_template: str | None) -> None:
    if tokenizer is not None:
        copy_tokenizer(tokenizer, partial, chat_template=chat_template)
    elif chat_template is not None:
        set_template(partial, chat_template)


def _write_files(
    partial: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    base: BaseIdentity,
    run: RunOrigin,
    facts: RunFacts,
) -> str:
    """PEFT's two files, the weights with the seal that binds them to their settings, and ``dist_lora.json``.

    Returns the weights' checksum.
    """
    content = {peft_key(key): tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    checksum = _checksum_of(content)
    seal = {"checksum": checksum, "config": {key: config[key] for key in SEALED if key in config}}
    write_safetensors(
        partial / WEIGHTS_FILE,
        {name: content[name] for name in sorted(content)},
        metadata={SEAL: json.dumps(seal, sort_keys=True)},
    )
    _write_json(partial / CONFIG_FILE, config)
    origin = {"format": FORMAT, "base": asdict(base), "software": _versions(), "weights": checksum}
    if run != RunOrigin():
        origin["run"] = run.to_json()
    if facts != RunFacts():
        origin["training"] = facts.to_json()
    _write_json(partial / ORIGIN_FILE, origin | {"checksum": own_checksum(origin)})
    return checksum


def _adapters(
    tensors: Mapping[str, Tensor], modules: Sequence[ModuleAdapter] | None, *, rank: int, alpha: float
) -> list[ModuleAdapter]:
    """Every adapted linear with its rank and alpha."""
    if modules is not None:
        return list(modules)
    names = sorted({key.rpartition(".")[0] for key in tensors if layer_of(key) is not None})
    return [ModuleAdapter(name=name, rank=rank, alpha=alpha) for name in names]


def _refuse_tensors(
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    targets: Sequence[str],
    layers: tuple[int, ...] | None,
    modules: Sequence[ModuleAdapter] | None,
    tokens: Sequence[int],
    unfrozen: Sequence[str],
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    whole = {key: shapes.pop(key) for key in list(shapes) if unfrozen_of(key) is not None}
    rows = {key: shapes.pop(key) for key in (EMBEDDING_ROWS, HEAD_ROWS) if key in shapes}
    if layers is None:
        layers = tuple(range(1 + max((layer for key in shapes if (layer := layer_of(key)) is not None), default=-1)))
    ranks = {module_path(target, layer=layer): rank for layer in layers for target in targets}
    if modules is not None:
        ranks = {module.name: module.rank for module in modules}
    faults = faults_of(shapes, ranks=ranks, names=str) if shapes or ranks or not (unfrozen or tokens) else []
    faults += rows_faults(rows, num_tokens=len(tokens)) + weights_faults(whole, unfrozen)
    infinite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.detach()).all()]
    if infinite:
        faults.append(f"NaN or infinity in {first_few(infinite)}")
    if faults:
        raise AdapterError(f"The adapter can't be written (rank {rank}):\n  " + "\n  ".join(faults))


def _patterns(modules: Sequence[ModuleAdapter], *, rank: int, alpha: float) -> dict[str, Any]:
    """PEFT's settings for adapters that differ by linear: each linear by its full name."""
    return {
        "alpha_pattern": {module.name: _whole(module.alpha) for module in modules if module.alpha != alpha},
        "layers_pattern": None,
        "layers_to_transform": None,
        "rank_pattern": {module.name: module.rank for module in modules if module.rank != rank},
        "target_modules": sorted(module.name for module in modules) or NO_TARGETS,
    }


def _token_indices(tensors: Mapping[str, Tensor], tokens: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """PEFT's setting: ids alone are of the embedding, and of a head that is tied to it."""
    ids = list(tokens)
    return {"embed_tokens": ids, "lm_head": ids} if HEAD_ROWS in tensors else ids


def _whole(number: float) -> float:
    """As a whole number where it is one: vLLM's PEFTHelper says int."""
    return int(number) if float(number).is_integer() else number


def _checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """``xxh3_128:<hex>`` over name, type, shape and bytes of CPU tensors, by name."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(json.dumps([name, TYPE_NAMES[tensors[name].dtype], tensors[name].shape]).encode())
        digest.update(bytes_of(tensors[name]))
    return f"xxh3_128:{digest.hexdigest()}"


def _peft_config(
    rank: int,
    alpha: float,
    dropout: float,
    *,
    targets: Sequence[str],
    layers: tuple[int, ...] | None,
    base: BaseIdentity,
    run: RunOrigin,
) -> dict[str, Any]:
    # Only settings that PEFT has had since 0.9 and vLLM reads: an older PEFT refuses names that it doesn't know,
    # and leaving out the newer ones means "off".
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": run.model or base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None if layers is None else "layers",
        "layers_to_transform": None if layers is None else list(layers),
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": run.revision if run.model else base.revision,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _versions() -> dict[str, str]:
    return {
        "dist_lora": dist_lora.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
