"""An adapter as a folder that PEFT and vLLM load: written without a network, read with every fault named.

The format is PEFT's own: `adapter_config.json`, and `adapter_model.safetensors` with two tensors a module,
`base_model.model.<module>.lora_A.weight` `(R, D_in)` and `lora_B` `(D_out, R)`. `dist_lora.json` beside them says
which base the adapter belongs to. In memory the keys are `<module>.lora_A` and `<module>.lora_B`, with modules as
`model.layers.0.self_attn.q_proj`. Letters: R LoRA rank, D_in and D_out the linear's widths.
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
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_lora.base.index import TensorOnDisk, first_few, hash_config, open_index
from dist_lora.base.stream import read_tensor
from dist_lora.errors import AdapterError, ConfigError, SaveError, WeightsError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "dist_lora.json"

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.([qkvo]_proj)|mlp\.((?:gate|up|down)_proj))")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")
_NOT_GATHERED = "not gathered: a process holds only its part of a sharded tensor"
_FORMAT = 1

# Settings of PEFT that make an adapter more than B A on a linear (PEFT 0.21.2's LoraConfig), and what they are.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the adapters",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "alphas that differ by layer",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed weights",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "repeated layers",
    "target_parameters": "adapters on bare parameters",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# These start from a base whose weights were changed too; PEFT writes `true` where it has converted them back.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class BaseIdentity:
    """Which model an adapter was trained on; what is not known is None.

    `name` is a member's name, a hub id or a folder's last component; the hashes are `WeightIndex.content_hash` and
    `hash_config`.
    """

    name: str | None
    revision: str | None = None
    content_hash: str | None = None
    config_hash: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: tensors `<module>.lora_A` `(R, D_in)` and `<module>.lora_B` `(D_out, R)`, fp32.

    `targets` are linears in the model's order, `layers` the layers that are adapted or None for all, and
    `scale` is what B A is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    scale: float
    base: BaseIdentity


@dataclass(frozen=True)
class AdapterOnDisk:
    """An adapter whose headers are checked and whose tensors are read one pair at a time; see `Adapter`."""

    folder: Path
    pairs: dict[str, tuple[TensorOnDisk, TensorOnDisk]]
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    scale: float
    base: BaseIdentity

    def read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A `(R, D_in)` and B `(D_out, R)` of a module, fp32, in host memory.

        Raises:
            AdapterError: the file cannot be read, or a value is NaN or infinite.
        """
        try:
            first, second = (read_tensor(half, dtype=torch.float32) for half in self.pairs[module])
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        self._refuse_infinite({f"{module}.lora_A": first, f"{module}.lora_B": second})
        return first, second

    def _refuse_infinite(self, tensors: Mapping[str, Tensor]) -> None:
        infinite = [_peft_key(key) for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if infinite:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} holds NaN or infinity in {first_few(infinite)}. The run that made it "
                "went wrong; take one of its earlier checkpoints."
            )


def identify_base(folder: Path, *, name: str | None = None, revision: str | None = None) -> BaseIdentity:
    """The identity of the base in `folder`, with both hashes.

    Local, reads headers and a few bytes of each tensor; call it on one rank.

    Args:
        name: a member's name or hub id. Without it: the hub id that config.json's `_name_or_path` gives, or the
            folder's last component.

    Raises:
        WeightsError: the folder is damaged.
    """
    config_hash = hash_config(folder)
    if name is None:
        noted = json.loads((folder / "config.json").read_bytes()).get("_name_or_path")
        is_hub_id = isinstance(noted, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", noted)
        name = noted if is_hub_id else folder.resolve().name
    return BaseIdentity(name, revision, open_index(folder).content_hash(), config_hash)


def open_adapter(folder: Path) -> AdapterOnDisk:
    """The adapter in `folder`, ours or PEFT's, with everything checked that its JSON and its header can tell.

    Raises:
        AdapterError: the folder is damaged, or is no plain LoRA on a Llama's seven linears with one rank and one
            alpha. Names the keys: the half of a pair that is missing, a key that has no place, a wrong rank, a
            zero-size or 1-D tensor.
    """
    config = _read_json(folder / CONFIG_FILE)
    _refuse_kinds(config, folder=folder)
    rank, alpha, dropout = _numbers(config, folder=folder)
    found = _headers(folder)
    keys = {name: match[1] if (match := _PEFT_KEY.fullmatch(name)) else name for name in found}
    shapes = {keys[name]: tensor.shape for name, tensor in found.items()}
    targets, layers = _coverage(config, shapes, folder=folder)
    faults = _faults(shapes, rank=rank, targets=targets, layers=layers, names=_peft_key)
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} does not hold the adapter that its {CONFIG_FILE} describes (r = {rank}):\n  "
            + "\n  ".join(faults)
        )
    by_key = {keys[name]: tensor for name, tensor in found.items()}
    modules = sorted({key.rpartition(".")[0] for key in by_key}, key=_module_order)
    pairs = {module: (by_key[f"{module}.lora_A"], by_key[f"{module}.lora_B"]) for module in modules}
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    base = _read_origin(folder, config)
    return AdapterOnDisk(folder, pairs, rank, alpha, dropout, targets, layers, scale, base)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, whole, in fp32 in host memory. Raises AdapterError as `open_adapter` and `read_pair`."""
    opened = open_adapter(folder)
    tensors: dict[str, Tensor] = {}
    for module in opened.pairs:
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = opened.read_pair(module)
    return Adapter(
        tensors,
        opened.rank,
        opened.alpha,
        opened.dropout,
        opened.targets,
        opened.layers,
        opened.scale,
        opened.base,
    )


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
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Writes the adapter folder, whole or not at all, replacing an adapter that lies there.

    Call it on one rank, with whole (gathered) tensors. No network. A killed writer leaves the former adapter, if
    need be under the name `.<folder>.replaced`, from where the next writer brings it back.

    Args:
        tensors: `<module>.lora_A` `(R, D_in)` and `<module>.lora_B` `(D_out, R)`, any float type and device.
        layers: the layers that are adapted; None means all of the model.
        base: paths in its name are cut to their last component, so that no file tells of this machine.

    Raises:
        AdapterError: a tensor is not whole ("not gathered"), not finite, has no place or lacks its other half;
            nothing is written.
        ConfigError: something that is no adapter lies at `folder`.
        SaveError: the system refuses to write.
    """
    chosen = None if layers is None else tuple(sorted(layers))
    _refuse_tensors(tensors, rank=rank, targets=targets, layers=chosen)
    if folder.exists() and not (folder / CONFIG_FILE).exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is no adapter (it has no {CONFIG_FILE}). Choose another place for it.")
    partial = folder.with_name(f".{folder.name}.partial")
    base = BaseIdentity(_public_name(base.name), base.revision, base.content_hash, base.config_hash)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        kept = torch.bfloat16 if dtype == "bf16" else torch.float32
        content = {_peft_key(key): tensor.detach().to("cpu", kept).contiguous() for key, tensor in tensors.items()}
        save_file(content, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _peft_config(rank, alpha, dropout, targets=targets, layers=chosen, base=base)
        _write_json(partial / CONFIG_FILE, config)
        _write_json(partial / ORIGIN_FILE, {"format": _FORMAT, "base": asdict(base), "software": _versions()})
        (partial / "README.md").write_text(_card(base, rank=rank, alpha=alpha, targets=targets))
        sync_folder(partial)
        _put_in_place(partial, folder)
    except OSError as error:
        raise SaveError(f"The adapter could not be written to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Brings the folder and the files directly in it from the page cache to the disk."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    former = folder.with_name(f".{folder.name}.replaced")
    if former.exists() and folder.exists():
        shutil.rmtree(former)
    if folder.exists():
        os.rename(folder, former)
    try:
        os.rename(partial, folder)
    except OSError:
        if former.exists():
            os.rename(former, folder)
        raise
    sync_folder(folder.parent) if False else _sync_one(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _refuse_tensors(
    tensors: Mapping[str, Tensor], *, rank: int, targets: Sequence[str], layers: tuple[int, ...] | None
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    faults = _faults(shapes, rank=rank, targets=targets, layers=layers, names=str)
    infinite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.detach()).all()]
    if infinite:
        faults.append(f"NaN or infinity in {first_few(infinite)}")
    if faults:
        raise AdapterError(f"The adapter cannot be written (rank {rank}):\n  " + "\n  ".join(faults))
