"""An adapter as a folder that PEFT and vLLM load: written without a network, read with every fault named.

The format is PEFT's own: `adapter_config.json`, and `adapter_model.safetensors` with two tensors a module,
`base_model.model.<module>.lora_A.weight` `(R, D_in)` and `lora_B` `(D_out, R)`. `dist_lora.json` beside them
says which base the adapter belongs to. A seal in the weights' metadata, which other programs pass over, holds a
checksum of the tensors and what the config said of them: a turned bit, or a file of another adapter, is found. In memory the keys are `<module>.lora_A` and `<module>.lora_B`, with
modules as `model.layers.0.self_attn.q_proj`. Letters: R LoRA rank, D_in and D_out the linear's widths.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import safetensors
import torch
import xxhash
from torch import Tensor

import dist_lora
from dist_lora.base.index import (
    TensorOnDisk,
    hash_config,
    is_there,
    links_out,
    open_index,
    open_weights,
    read_at_most,
    read_header,
    read_json,
    read_metadata,
)
from dist_lora.base.stream import SliceReader, read_tensor
from dist_lora.config.schema import LINEARS
from dist_lora.errors import AdapterError, ConfigError, SaveError, WeightsError
from dist_lora.herd.shape import module_path
from dist_lora.text import first_few

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "dist_lora.json"

# Three digits of layers: keys up to the highest layer are looked for one by one.
_MODULE = re.compile(r"model\.layers\.([0-9]{1,3})\.(?:self_attn\.([qkvo]_proj)|mlp\.((?:gate|up|down)_proj))")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")
_NOT_GATHERED = "not gathered: a process holds only its part of a sharded tensor"
_FORMAT = 1
_MAX_JSON_BYTES = 2**24
_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16"}
_SEAL = "dist_lora"  # its key in the metadata of the weights' file
# What of the config decides what the tensors mean; all else may be edited.
_SEALED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform")

# Settings that make an adapter more than B A on a linear (LoraConfig of PEFT 0.21.2), and what they are.
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

    `name` is a member's name, a hub id or a folder's last component; the hashes are those of
    `WeightIndex.content_hash` and `hash_config`.
    """

    name: str | None
    revision: str | None = None
    content_hash: str | None = None
    config_hash: str | None = None

    def differences(self, here: BaseIdentity) -> list[str]:
        """What of ``here`` is not this model's, hash by hash; where this one has no hash, nothing is known to differ."""
        pairs = (
            ("weights", self.content_hash, here.content_hash),
            ("config.json", self.config_hash, here.config_hash),
        )
        return [f"{what} {there}, here {found}" for what, there, found in pairs if there not in (None, found)]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What an adapter's JSON files tell of it.

    `targets` are linears in the model's order, `layers` the layers that are adapted or None for all, and
    `scale` is what B A is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    scale: float
    base: BaseIdentity


@dataclass(frozen=True, kw_only=True)
class Adapter(AdapterFacts):
    """An adapter in memory: tensors `<module>.lora_A` `(R, D_in)` and `<module>.lora_B` `(D_out, R)`, fp32."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterOnDisk(AdapterFacts):
    """An adapter whose headers are checked and whose tensors are read one pair at a time; see `Adapter`."""

    folder: Path
    pairs: dict[str, tuple[TensorOnDisk, TensorOnDisk]]
    checksum: str | None

    def verify(self) -> None:
        """Prove that the tensors are as they were written; of an adapter without a checksum (PEFT's) nothing is known.

        Reads every byte of them. Local: one rank calls it, before anything is loaded.

        Raises:
            AdapterError: they are not, or the file cannot be read.
        """
        if self.checksum is None:
            return
        try:
            found = _checksum_on_disk([half for pair in self.pairs.values() for half in pair])
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        if found != self.checksum:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} is damaged: its tensors have the checksum {found}, and {self.checksum} was "
                "written. Copy it again, or make it anew: dist-lora gather CHECKPOINT --out DIR"
            )

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
                f"{self.folder / WEIGHTS_FILE} holds NaN or infinity in {first_few(infinite)}. The run that "
                "made it went wrong; take one of its earlier checkpoints."
            )


def identify_base(folder: Path, *, name: str | None = None, revision: str | None = None) -> BaseIdentity:
    """The identity of the base in `folder`, with both hashes.

    Local, reads headers and a few bytes of each tensor; call it on one rank.

    Args:
        name: a member's name or hub id. Without it: the hub id that config.json's `_name_or_path` gives,
            or the folder's last component.

    Raises:
        WeightsError: the folder is damaged.
    """
    config_hash = hash_config(folder)
    if name is None:
        noted = read_json(folder / "config.json").get("_name_or_path")
        is_hub_id = isinstance(noted, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", noted)
        name = noted if is_hub_id else folder.resolve().name
    return BaseIdentity(name, revision, open_index(folder, allow_bytes=True).content_hash(), config_hash)


def open_adapter(folder: Path) -> AdapterOnDisk:
    """The adapter in `folder`, ours or PEFT's, with everything checked that its JSON and its header can tell.

    Raises:
        AdapterError: the folder is damaged, or is no plain LoRA on a Llama's seven linears with one rank and
            one alpha. Names the keys: the half of a pair that is missing, a key that has no place, a wrong
            rank, a zero-size or 1-D tensor.
    """
    _refuse_links(folder)
    config = _read_json(folder / CONFIG_FILE)
    _refuse_kinds(config, folder=folder)
    rank, alpha, dropout = _numbers(config, folder=folder)
    found = _headers(folder)
    keys = {name: match[1] if (match := _PEFT_KEY.fullmatch(name)) else name for name in found}
    spelled = {key: name for name, key in keys.items()}
    shapes = {keys[name]: tensor.shape for name, tensor in found.items()}
    targets, layers = _coverage(config, shapes, folder=folder)
    faults = _faults(
        shapes, rank=rank, targets=targets, layers=layers, names=lambda key: spelled.get(key) or _peft_key(key)
    )
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} does not hold the adapter of its {CONFIG_FILE} (r = {rank}):\n  "
            + "\n  ".join(faults)
        )
    by_key = {keys[name]: tensor for name, tensor in found.items()}
    modules = sorted({key.rpartition(".")[0] for key in by_key}, key=_module_order)
    pairs = {module: (by_key[f"{module}.lora_A"], by_key[f"{module}.lora_B"]) for module in modules}
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    seal = _read_seal(folder)
    base = _read_origin(folder, config, checksum=seal.get("checksum"))
    changed = [
        f"{key} is {config.get(key)!r}, and was {then!r}"
        for key, then in seal.get("config", {}).items()
        if config.get(key) != then or type(config.get(key)) is not type(then)
    ]
    if changed:
        raise AdapterError(
            f"{folder / CONFIG_FILE} is not as it was when {WEIGHTS_FILE} was written: {'; '.join(changed)}. It is damaged, "
            "of another adapter, or was changed by hand: put the former values back."
        )
    return AdapterOnDisk(
        folder=folder,
        pairs=pairs,
        checksum=seal.get("checksum"),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        layers=layers,
        scale=scale,
        base=base,
    )


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`, whole, fp32, in host memory, proven to be as it was written where it has a checksum.

    Raises what `open_adapter`, `verify` and `read_pair` raise.
    """
    opened = open_adapter(folder)
    opened.verify()
    tensors: dict[str, Tensor] = {}
    for module in opened.pairs:
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = opened.read_pair(module)
    facts = {field.name: getattr(opened, field.name) for field in fields(AdapterFacts)}
    return Adapter(tensors=tensors, **facts)


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

    Call it on one rank, with whole (gathered) tensors. No network. A writer that is killed leaves the former
    adapter; between its two last renames under the name `.<folder>.replaced`, until the next writer is done.

    Args:
        tensors: `<module>.lora_A` `(R, D_in)` and `<module>.lora_B` `(D_out, R)`, any float type and device.
        layers: the layers that are adapted; None means all of the model.
        base: paths in its name are cut to their last component, so that no file tells of this machine.

    Raises:
        AdapterError: a tensor is not whole ("not gathered"), not finite, has no place or lacks its other
            half; nothing is written.
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
        checksum = _checksum_of(content)
        config = _peft_config(rank, alpha, dropout, targets=targets, layers=chosen, base=base)
        seal = {"checksum": checksum, "config": {key: config[key] for key in _SEALED}}
        _write_weights(partial / WEIGHTS_FILE, content, seal=json.dumps(seal, sort_keys=True))
        _write_json(partial / CONFIG_FILE, config)
        origin = {"format": _FORMAT, "base": asdict(base), "software": _versions(), "weights": checksum}
        _write_json(partial / ORIGIN_FILE, origin | {"checksum": _own_checksum(origin)})
        (partial / "README.md").write_text(_card(base, rank=rank, alpha=alpha, targets=targets))
        sync_folder(partial)
        _put_in_place(partial, folder)
    except OSError as error:
        raise SaveError(f"The adapter could not be written to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_weights(file: Path, tensors: Mapping[str, Tensor], *, seal: str) -> None:
    """A safetensors file of CPU tensors of one type, the same bytes for the same content.

    The library (0.8) writes two entries of metadata in an order that changes from one process to the next.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _SEAL: seal}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _KINDS[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            opened.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """``xxh3_128:<hex>`` over name, type, shape and bytes of CPU tensors, by name."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(json.dumps([name, _KINDS[tensors[name].dtype], tensors[name].shape]).encode())
        digest.update(_bytes_of(tensors[name]))
    return f"xxh3_128:{digest.hexdigest()}"


def _checksum_on_disk(tensors: Sequence[TensorOnDisk]) -> str:
    """``_checksum_of`` the tensors of one file, read a slice at a time."""
    digest, reader = xxhash.xxh3_128(), SliceReader()
    by_name = sorted(tensors, key=lambda tensor: tensor.name)
    with open_weights(by_name[0].file) as descriptor:
        for tensor in by_name:
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for _, rows in reader.slices(tensor, descriptor=descriptor):
                digest.update(_bytes_of(rows))
    return f"xxh3_128:{digest.hexdigest()}"


def _own_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def sync_folder(folder: Path) -> None:
    """Brings the folder and the files directly in it from the page cache to the disk."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Brings one file, or the names in one folder, from the page cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    former = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)  # a writer was killed before it removed it
        os.rename(folder, former)
    try:
        os.rename(partial, folder)
    except OSError:
        if former.exists():
            os.rename(former, folder)
        raise
    sync_path(folder.parent)
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


def _faults(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    targets: Sequence[str],
    layers: tuple[int, ...] | None,
    names: Callable[[str], str],
) -> list[str]:
    """A line for each kind of fault among keys `<module>.lora_A` and `.lora_B`, which `names` spells."""
    known = {key: shape for key, shape in shapes.items() if _linear_of(key)}
    whole = {key: shape for key, shape in known.items() if len(shape) == 2 and min(shape) > 0}
    ranks = {key: shape[0 if key.endswith("A") else 1] for key, shape in whole.items()}
    modules = {key.rpartition(".")[0] for key in known}
    expected = _expected_modules(modules, targets=targets, layers=layers)
    halves = {f"{module}.lora_{half}" for module in modules | expected for half in "AB"}
    kinds = (
        ("no place in a Llama for", [names(key) for key in sorted(set(shapes) - set(known))]),
        (_NOT_GATHERED, [f"{names(key)} has shape {known[key]}" for key in sorted(set(known) - set(whole))]),
        (
            "wrong rank",
            [f"{names(key)} has rank {found}" for key, found in sorted(ranks.items()) if found != rank],
        ),
        (
            "not among the targets and layers that were named",
            [names(key) for key in sorted(known) if expected and key.rpartition(".")[0] not in expected],
        ),
        ("missing", [names(key) for key in sorted(halves - set(known))]),
    )
    faults = [f"{kind}: {first_few(keys)}" for kind, keys in kinds if keys]
    return faults or ([] if known else ["missing: there is no adapter in it at all"])


def _linear_of(key: str) -> tuple[int, str] | None:
    """Layer and linear of `<module>.lora_A` or `.lora_B`; None if it is no linear of a Llama."""
    module, _, half = key.rpartition(".")
    match = _MODULE.fullmatch(module)
    if match is None or half not in ("lora_A", "lora_B"):
        return None
    return int(match[1]), match[2] or match[3]


def _expected_modules(modules: Iterable[str], *, targets: Sequence[str], layers: tuple[int, ...] | None) -> set[str]:
    """All modules that targets and layers call for; without layers: those from 0 to the highest there is."""
    if layers is None:
        layers = tuple(range(1 + max((_module_order(module)[0] for module in modules), default=-1)))
    return {module_path(target, layer=layer) for layer in layers for target in targets}


def _module_order(module: str) -> tuple[int, int]:
    layer, linear = _linear_of(f"{module}.lora_A") or (0, LINEARS[0])
    return layer, LINEARS.index(linear)


def _peft_key(key: str) -> str:
    """The name of ``<module>.lora_A`` or ``.lora_B`` in PEFT's file."""
    return f"base_model.model.{key}.weight"


def _refuse_kinds(config: Mapping[str, Any], *, folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / CONFIG_FILE} describes an adapter of type {config.get('peft_type')!r}; only LORA is read."
        )
    told = [f"{key} ({what})" for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        told.append(f"bias: {config['bias']} (trained biases)")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        told.append(f"init_lora_weights: {start} (needs a changed base; let PEFT convert it at its save)")
    if told:
        raise AdapterError(
            f"{folder / CONFIG_FILE} asks for more than plain LoRA on the seven linears: {', '.join(told)}. "
            "Such an adapter cannot be read here."
        )


def _numbers(config: Mapping[str, Any], *, folder: Path) -> tuple[int, float, float]:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    # Bounds from both sides: Python's JSON has NaN and infinity.
    if not (
        type(rank) is int
        and 1 <= rank < 2**31
        and isinstance(alpha, int | float)
        and not isinstance(alpha, bool)
        and 0 < alpha < 2**63
        and isinstance(dropout, int | float)
        and not isinstance(dropout, bool)
        and 0 <= dropout <= 1
    ):
        raise AdapterError(
            f"{folder / CONFIG_FILE} has r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}; "
            "a whole number from 1, a number above 0 and one from 0 to 1 were expected. The file is damaged."
        )
    return rank, float(alpha), float(dropout)


def _refuse_links(folder: Path) -> None:
    leading = links_out(folder, (CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE))
    if leading:
        raise AdapterError(
            f"{folder} holds links that lead out of it: {first_few(leading)}. Nothing is read from there: put the files "
            "themselves into the folder, or give the folder that they lie in."
        )


def _read_seal(folder: Path) -> dict[str, Any]:
    """The seal of our own writer, checked to have its form; empty where another program wrote the weights."""
    file = folder / WEIGHTS_FILE
    try:
        written = read_metadata(file).get(_SEAL)
        seal = None if written is None else json.loads(written)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: {_SEAL} in its metadata is not JSON ({error}).") from error
    if seal is None:
        return {}
    is_ours = isinstance(seal, dict) and isinstance(seal.get("checksum"), str) and isinstance(seal.get("config"), dict)
    if not is_ours:
        raise AdapterError(f"{file} is damaged: {_SEAL} in its metadata lacks a checksum or the config.")
    return dict(seal)


def _headers(folder: Path) -> dict[str, TensorOnDisk]:
    file = folder / WEIGHTS_FILE
    if not is_there(file) and is_there(folder / "adapter_model.bin"):
        raise AdapterError(
            f"{folder} holds adapter_model.bin: pickled weights are never read, for they can run code. "
            "Save the adapter again with a PEFT that writes safetensors."
        )
    try:
        return {tensor.name: tensor for tensor in read_header(file)}
    except WeightsError as error:
        raise AdapterError(str(error)) from error


def _coverage(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, folder: Path
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Which linears of which layers there must be: by the config, or by the keys if it has a pattern."""
    named, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(named, str) or config.get("exclude_modules"):
        found = [place for key in shapes if (place := _linear_of(key))]
        in_file = {linear for _, linear in found}
        return tuple(linear for linear in LINEARS if linear in in_file), tuple(sorted({n for n, _ in found}))
    last_parts = [str(name).rpartition(".")[2] for name in named] if isinstance(named, list) else []
    foreign = [name for name in last_parts if name not in LINEARS]
    if foreign or not last_parts:
        raise AdapterError(
            f"{folder / CONFIG_FILE} names target_modules {first_few(foreign) or 'none'}; a list of a Llama's "
            f"linears ({' '.join(LINEARS)}) was expected."
        )
    targets = tuple(linear for linear in LINEARS if linear in last_parts)
    if type(layers) is int:
        layers = [layers]
    if layers and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise AdapterError(
            f"{folder / CONFIG_FILE} has layers_to_transform = {layers!r}; a list of layers' numbers was expected. The "
            "file is damaged."
        )
    return targets, tuple(sorted(layers)) if layers else None


def _read_origin(folder: Path, config: Mapping[str, Any], *, checksum: str | None) -> BaseIdentity:
    """Who the base is. ``checksum`` is that of the weights, which a file of our writer names too."""
    file = folder / ORIGIN_FILE
    if not is_there(file):
        return _identity(
            {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
            where=f"{folder / CONFIG_FILE}: base_model_name_or_path and revision",
        )
    origin = _read_json(file)
    base, own = origin.get("base"), origin.pop("checksum", None)
    if origin.get("format") != _FORMAT or not isinstance(base, dict):
        raise AdapterError(
            f"{file} has format {origin.get('format')!r}, and format {_FORMAT} is read. Update dist-lora."
        )
    if own is not None and own != _own_checksum(origin):
        raise AdapterError(f"{file} doesn't match its own checksum: it was damaged, or changed by hand.")
    if checksum is not None and origin.get("weights") not in (None, checksum):
        raise AdapterError(
            f"{file} was written with other weights ({origin.get('weights')}) than those of {WEIGHTS_FILE} ({checksum}): "
            "the files are of two adapters. Bring both from one."
        )
    return _identity(base, where=f"{file}: base")


def _identity(told: Mapping[str, Any], *, where: str) -> BaseIdentity:
    known = [told.get(field.name) for field in fields(BaseIdentity)]
    if not all(value is None or isinstance(value, str) for value in known):
        raise AdapterError(f"{where}: found {known!r}, expected texts or null. The file is damaged.")
    return BaseIdentity(*known)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_at_most(file, _MAX_JSON_BYTES)
        if len(content) > _MAX_JSON_BYTES:
            raise AdapterError(f"{file} is damaged: it is longer than {_MAX_JSON_BYTES:,} bytes.")
        value = json.loads(content)
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror or error}. An adapter folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} was expected."
        ) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file} is damaged: a JSON object was expected.")
    return value


def _peft_config(
    rank: int,
    alpha: float,
    dropout: float,
    *,
    targets: Sequence[str],
    layers: tuple[int, ...] | None,
    base: BaseIdentity,
) -> dict[str, Any]:
    # Only settings that PEFT has had since 0.9 and vLLM reads: an older PEFT refuses names it does not know,
    # and the newer ones that are left out mean "off".
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None if layers is None else "layers",
        "layers_to_transform": None if layers is None else list(layers),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": base.revision,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _card(base: BaseIdentity, *, rank: int, alpha: float, targets: Sequence[str]) -> str:
    hub_id = f"base_model: {base.name}\n" if base.name and "/" in base.name else ""
    return (
        f"---\nlibrary_name: peft\n{hub_id}tags:\n- lora\n- llama\n---\n\n"
        f"LoRA adapter of {base.name or 'a Llama'}: rank {rank}, alpha {alpha:g}, on {' '.join(targets)}. Made "
        "by dist_lora; loads in PEFT (`PeftModel.from_pretrained(model, folder)`) and vLLM (`--lora-modules`).\n"
        f"{ORIGIN_FILE} tells which weights it belongs to.\n"
    )


def _versions() -> dict[str, str]:
    return {
        "dist_lora": dist_lora.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def _public_name(name: str | None) -> str | None:
    """The name, or the last component of what is a path on this machine."""
    if name and (PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name[0] in "~."):
        return PureWindowsPath(name).name  # splits at both kinds of slash
    return name


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
