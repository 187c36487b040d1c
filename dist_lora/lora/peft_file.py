"""The adapter's folder as PEFT and vLLM load it: written by us, without a call to the hub, and read back with every check.

Beside PEFT's two files lies ``dist_lora.json``: which base the adapter was trained on.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_lora import __version__
from dist_lora.base.index import first_few, hash_config, open_index
from dist_lora.errors import AdapterError, SaveError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "dist_lora.json"
PREFIX = "base_model.model."

_KEY = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.\w+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class BaseIdentity:
    """Which model an adapter was trained on; what is not known is None.

    ``name`` is a hub id or a folder's last component; the hashes are ``WeightIndex.content_hash`` and ``hash_config``.
    """

    name: str | None
    revision: str | None = None
    content_hash: str | None = None
    config_hash: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: tensors ``<module>.lora_A`` ``(R, D_in)`` and ``<module>.lora_B`` ``(D_out, R)``, fp32.

    ``layers`` are the layers that are adapted, or None for all; ``scale`` is what B A is multiplied by: alpha / R, or
    alpha / sqrt(R) for rsLoRA.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    scale: float
    base: BaseIdentity


def identify_base(folder: Path, *, name: str | None = None, revision: str | None = None) -> BaseIdentity:
    """The identity of the base in ``folder``, with both hashes; reads headers and a few bytes of each tensor.

    Without ``name`` it is the hub id that config.json's ``_name_or_path`` gives, or the folder's last component.

    Raises:
        WeightsError: the folder is damaged.
    """
    config_hash = hash_config(folder)
    if name is None:
        noted = json.loads((folder / "config.json").read_bytes()).get("_name_or_path")
        is_hub_id = isinstance(noted, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", noted)
        name = noted if is_hub_id else folder.resolve().name
    return BaseIdentity(name, revision, open_index(folder).content_hash(), config_hash)


def write_adapter(
    folder: Path,
    *,
    tensors: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    layers: Sequence[int] | None,
    base: BaseIdentity,
) -> None:
    """Write the adapter's folder aside and rename it into place; one that is there is replaced.

    Args:
        tensors: ``<module>.lora_A`` ``(rank, D_in)`` and ``<module>.lora_B`` ``(D_out, rank)``, whole.

    Raises:
        AdapterError: a tensor is not whole, has not this rank, lacks its other half, or is not finite; nothing is written.
        SaveError: the disk refuses.
    """
    faults = _faults({name: tuple(t.shape) for name, t in tensors.items()}, rank=rank)
    faults += [f"{name} is not finite" for name, t in tensors.items() if not torch.isfinite(t).all()]
    if faults:
        raise AdapterError(f"{folder} is not written: {'; '.join(faults[:5])}{_more(faults)}")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        named = {_peft_key(name): t.detach().contiguous().cpu() for name, t in sorted(tensors.items())}
        save_file(named, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _peft_config(rank, alpha, dropout, targets, layers, base)
        _write_json(partial / CONFIG_FILE, config)
        _write_json(partial / BASE_FILE, {"format": 1, "dist_lora": __version__, "base": asdict(base)})
        (partial / "README.md").write_text(_card(rank, alpha, targets, base))
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        _put_in_place(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{folder}: the adapter can't be written: {error.strerror or error}") from error


def read_adapter(folder: Path) -> Adapter:
    """The adapter in ``folder``, ours or PEFT's.

    Raises:
        AdapterError: a file is missing or damaged; it is of a kind that can't be read here (DoRA, trained embeddings,
            biases, ranks that differ); or keys are lacking, unknown, of another rank, or not finite.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        found: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise AdapterError(
            f"{folder} has no {WEIGHTS_FILE}: it is not an adapter's folder, or a copy broke off"
        ) from error
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}. Gather it from its checkpoint again") from error
    strange = [key for key in found if not _KEY.fullmatch(key)]
    if strange:
        raise AdapterError(
            f"{path} holds {len(strange)} keys that are no adapter of a Llama's linear: {first_few(strange)}; "
            f"expected {PREFIX}model.layers.N.self_attn.q_proj.lora_A.weight and the like"
        )
    tensors = {key.removeprefix(PREFIX).removesuffix(".weight"): t.float() for key, t in found.items()}
    rank = config["r"]
    faults = _faults({name: tuple(t.shape) for name, t in tensors.items()}, rank=rank)
    faults += [f"{name} is not finite" for name, t in tensors.items() if not torch.isfinite(t).all()]
    targets = tuple(sorted({name.split(".")[-2] for name in tensors}))
    named = config["target_modules"]
    if isinstance(named, list) and set(named) != set(targets):
        faults.append(f"{CONFIG_FILE} names the targets {sorted(named)} and the file holds {list(targets)}")
    if faults:
        raise AdapterError(f"{path}: {'; '.join(faults[:5])}{_more(faults)}")
    layers = config.get("layers_to_transform")
    return Adapter(
        tensors=tensors,
        rank=rank,
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=targets,
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        scale=config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank),
        base=_read_base(folder, config),
    )


def _faults(shapes: Mapping[str, tuple[int, ...]], *, rank: int) -> list[str]:
    """What keeps these tensors from being whole pairs of this rank."""
    if not shapes:
        return ["it holds no tensor"]
    faults = []
    for name, shape in shapes.items():
        other = name[:-1] + ("B" if name.endswith("lora_A") else "A")
        if other not in shapes:
            faults.append(f"{name} is there and {other} is not")
        if len(shape) != 2 or 0 in shape:
            faults.append(f"{name} has shape {shape}: it was not gathered from the ranks")
        elif shape[0 if name.endswith("lora_A") else 1] != rank:
            faults.append(f"{name} has shape {shape} and the rank is {rank}")
    return faults


def _more(faults: Sequence[str]) -> str:
    return f"; and {len(faults) - 5} more" if len(faults) > 5 else ""


def _peft_key(name: str) -> str:
    return f"{PREFIX}{name}.weight"


def _peft_config(
    rank: int, alpha: float, dropout: float, targets: Sequence[str], layers: Sequence[int] | None, base: BaseIdentity
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": None if layers is None else "layers",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} has no {CONFIG_FILE}: it is not an adapter's folder") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from error
    needed: dict[str, type | tuple[type, ...]] = {
        "peft_type": str,
        "r": int,
        "lora_alpha": (int, float),
        "target_modules": (list, str),
    }
    wrong = [
        key for key, kind in needed.items() if not isinstance(config, dict) or not isinstance(config.get(key), kind)
    ]
    if wrong:
        raise AdapterError(f"{path}: {', '.join(wrong)}: missing or of another type than PEFT writes")
    refused = {
        "its type is not LORA": config["peft_type"] != "LORA",
        "r is below 1": config["r"] < 1,
        "it is a DoRA (use_dora)": config.get("use_dora"),
        "it trains whole modules too (modules_to_save)": config.get("modules_to_save"),
        "it trains biases": config.get("bias", "none") != "none",
        "its ranks differ by layer (rank_pattern)": config.get("rank_pattern"),
        "its alphas differ by layer (alpha_pattern)": config.get("alpha_pattern"),
    }
    reasons = [reason for reason, is_so in refused.items() if is_so]
    if reasons:
        raise AdapterError(f"{path}: can't be used here: {'; '.join(reasons)}")
    return dict(config)


def _read_base(folder: Path, config: Mapping[str, Any]) -> BaseIdentity:
    path = folder / BASE_FILE
    if not path.exists():  # PEFT's own folder
        return BaseIdentity(config.get("base_model_name_or_path"), config.get("revision"))
    try:
        return BaseIdentity(**json.loads(path.read_bytes())["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} can't be read: {error}. Gather the adapter again") from error


def _card(rank: int, alpha: float, targets: Sequence[str], base: BaseIdentity) -> str:
    return (
        f"---\nbase_model: {base.name}\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora]\n---\n\n"
        f"A LoRA adapter of rank {rank}, alpha {alpha:g}, beside {', '.join(targets)} of {base.name}, "
        f"trained with dist_lora {__version__}.\n"
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; a folder can't be renamed over another, so the old one goes aside first."""
    old = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
