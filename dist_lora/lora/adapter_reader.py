"""Reading an adapter's folder, ours or PEFT's, with every fault named.

The format is PEFT's own: ``adapter_config.json``, and ``adapter_model.safetensors`` with two tensors per module,
``base_model.model.<module>.lora_A.weight`` ``(R, D_in)`` and ``lora_B`` ``(D_out, R)``. ``dist_lora.json`` in the same
folder names the base that the adapter belongs to. A seal in the weights' metadata, which other programs ignore, holds a
checksum of the tensors and the settings that they depend on, so that a flipped bit or a file of another adapter is
detected. In memory the keys are ``<module>.lora_A`` and ``<module>.lora_B``, with modules as
``model.layers.0.self_attn.q_proj``. Letters: R LoRA rank, D_in and D_out the linear's widths.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dist_lora.base.index import TensorOnDisk, open_weights, read_header, read_metadata
from dist_lora.base.safetensors import bytes_of
from dist_lora.base.stream import SliceReader, read_tensor
from dist_lora.config.schema import LINEARS
from dist_lora.errors import AdapterError, WeightsError
from dist_lora.files import file_exists, links_out
from dist_lora.herd.shape import module_path
from dist_lora.lora.adapter_folder import check_adapter_folder
from dist_lora.lora.origin import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE, BaseIdentity, read_adapter_json, read_origin
from dist_lora.text import first_few

# At most three digits of layers: every key up to the highest layer is checked.
_MODULE = re.compile(r"model\.layers\.([0-9]{1,3})\.(?:self_attn\.([qkvo]_proj)|mlp\.((?:gate|up|down)_proj))")
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")
_NOT_GATHERED = "not gathered: a process holds only its shard of a tensor"
SEAL = "dist_lora"  # its key in the metadata of the weights' file
# The settings that the tensors depend on; all others may be edited.
SEALED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform")
# Settings that make an adapter more than B A on a linear (LoraConfig of PEFT 0.21.2), and what they are.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
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
# These change the base's weights too; PEFT writes `true` where it has converted the adapter back.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """An adapter's settings and base, from its JSON files.

    ``targets`` are linears in the model's order, ``layers`` the layers that are adapted or None for all, and
    ``scale`` is what B A is multiplied by: alpha / R, or alpha / sqrt(R) for rsLoRA.
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
    """An adapter in memory: tensors ``<module>.lora_A`` ``(R, D_in)`` and ``<module>.lora_B`` ``(D_out, R)``, fp32."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterOnDisk(AdapterFacts):
    """An adapter with checked headers, whose tensors are read one pair at a time; see ``Adapter``."""

    folder: Path
    pairs: dict[str, tuple[TensorOnDisk, TensorOnDisk]]
    checksum: str | None

    def verify(self) -> None:
        """Check that the tensors are as they were written; an adapter without a checksum (PEFT's) always passes.

        Reads every byte of them. Local: one rank calls it, before anything is loaded.

        Raises:
            AdapterError: they are not, or the file can't be read.
        """
        if self.checksum is None:
            return
        try:
            actual = _checksum_on_disk([half for pair in self.pairs.values() for half in pair])
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        if actual != self.checksum:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} is damaged: its tensors have checksum {actual}, and {self.checksum} was "
                "written. Copy it again, or recreate it: dist-lora gather CHECKPOINT --out DIR"
            )

    def read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A ``(R, D_in)`` and B ``(D_out, R)`` of a module, fp32, in host memory.

        Raises:
            AdapterError: the file can't be read, or a value is NaN or infinite.
        """
        try:
            first, second = (read_tensor(half, dtype=torch.float32) for half in self.pairs[module])
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        self._refuse_infinite({f"{module}.lora_A": first, f"{module}.lora_B": second})
        return first, second

    def _refuse_infinite(self, tensors: Mapping[str, Tensor]) -> None:
        infinite = [peft_key(key) for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if infinite:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} holds NaN or infinity in {first_few(infinite)}. Its run "
                "diverged; use one of its earlier checkpoints."
            )


def open_adapter(folder: Path) -> AdapterOnDisk:
    """The adapter in ``folder``, ours or PEFT's, with everything checked that its JSON files and header allow.

    Raises:
        ConfigError: it is no adapter's folder; see ``check_adapter_folder``.
        AdapterError: the folder is damaged, or isn't plain LoRA on a Llama's seven linears with one rank and one
            alpha. Names the keys: the missing half of a pair, an unexpected key, a wrong rank, a zero-size or 1-D
            tensor.
    """
    check_adapter_folder(folder)
    _refuse_links(folder)
    config = read_adapter_json(folder / CONFIG_FILE)
    _refuse_kinds(config, folder=folder)
    rank, alpha, dropout = _numbers(config, folder=folder)
    headers = _headers(folder)
    keys = {name: match[1] if (match := _PEFT_KEY.fullmatch(name)) else name for name in headers}
    names_in_file = {key: name for name, key in keys.items()}
    shapes = {keys[name]: tensor.shape for name, tensor in headers.items()}
    targets, layers = _coverage(config, shapes, folder=folder)
    faults = faults_of(
        shapes, rank=rank, targets=targets, layers=layers, names=lambda key: names_in_file.get(key) or peft_key(key)
    )
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} doesn't hold the adapter of its {CONFIG_FILE} (r = {rank}):\n  "
            + "\n  ".join(faults)
        )
    by_key = {keys[name]: tensor for name, tensor in headers.items()}
    modules = sorted({key.rpartition(".")[0] for key in by_key}, key=_module_order)
    pairs = {module: (by_key[f"{module}.lora_A"], by_key[f"{module}.lora_B"]) for module in modules}
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    seal = _read_seal(folder)
    base = read_origin(folder, config, checksum=seal.get("checksum"))
    changed = [
        f"{key} is {config.get(key)!r}, and was {sealed!r}"
        for key, sealed in seal.get("config", {}).items()
        if config.get(key) != sealed or type(config.get(key)) is not type(sealed)
    ]
    if changed:
        raise AdapterError(
            f"{folder / CONFIG_FILE} has changed since {WEIGHTS_FILE} was written: {'; '.join(changed)}. It is "
            "damaged, of another adapter, or was edited by hand: restore the former values."
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
    """The adapter in ``folder``, whole, fp32, in host memory, its checksum verified where it has one.

    Raises what ``open_adapter``, ``verify`` and ``read_pair`` raise.
    """
    opened = open_adapter(folder)
    opened.verify()
    tensors: dict[str, Tensor] = {}
    for module in opened.pairs:
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = opened.read_pair(module)
    facts = {field.name: getattr(opened, field.name) for field in fields(AdapterFacts)}
    return Adapter(tensors=tensors, **facts)


def _checksum_on_disk(tensors: Sequence[TensorOnDisk]) -> str:
    """``adapter_writer._checksum_of`` the tensors of one file, read a slice at a time."""
    digest, reader = xxhash.xxh3_128(), SliceReader()
    by_name = sorted(tensors, key=lambda tensor: tensor.name)
    with open_weights(by_name[0].file) as descriptor:
        for tensor in by_name:
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for _, rows in reader.slices(tensor, descriptor=descriptor):
                digest.update(bytes_of(rows))
    return f"xxh3_128:{digest.hexdigest()}"


def faults_of(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    targets: Sequence[str],
    layers: tuple[int, ...] | None,
    names: Callable[[str], str],
) -> list[str]:
    """A line for each kind of fault among keys ``<module>.lora_A`` and ``.lora_B``, named by ``names``."""
    known = {key: shape for key, shape in shapes.items() if _linear_of(key)}
    whole = {key: shape for key, shape in known.items() if len(shape) == 2 and min(shape) > 0}
    ranks = {key: shape[0 if key.endswith("A") else 1] for key, shape in whole.items()}
    modules = {key.rpartition(".")[0] for key in known}
    expected = _expected_modules(modules, targets=targets, layers=layers)
    halves = {f"{module}.lora_{half}" for module in modules | expected for half in "AB"}
    kinds = (
        ("unexpected, on none of Llama's linears", [names(key) for key in sorted(set(shapes) - set(known))]),
        (_NOT_GATHERED, [f"{names(key)} has shape {known[key]}" for key in sorted(set(known) - set(whole))]),
        (
            "wrong rank",
            [f"{names(key)} has rank {actual}" for key, actual in sorted(ranks.items()) if actual != rank],
        ),
        (
            "not among the named targets and layers",
            [names(key) for key in sorted(known) if expected and key.rpartition(".")[0] not in expected],
        ),
        ("missing", [names(key) for key in sorted(halves - set(known))]),
    )
    faults = [f"{kind}: {first_few(keys)}" for kind, keys in kinds if keys]
    return faults or ([] if known else ["missing: it holds no adapter at all"])


def _linear_of(key: str) -> tuple[int, str] | None:
    """Layer and linear of ``<module>.lora_A`` or ``.lora_B``; None if it is on none of Llama's linears."""
    module, _, half = key.rpartition(".")
    match = _MODULE.fullmatch(module)
    if match is None or half not in ("lora_A", "lora_B"):
        return None
    return int(match[1]), match[2] or match[3]


def _expected_modules(modules: Iterable[str], *, targets: Sequence[str], layers: tuple[int, ...] | None) -> set[str]:
    """All modules that targets and layers name; without layers: those from 0 to the highest one present."""
    if layers is None:
        layers = tuple(range(1 + max((_module_order(module)[0] for module in modules), default=-1)))
    return {module_path(target, layer=layer) for layer in layers for target in targets}


def _module_order(module: str) -> tuple[int, int]:
    layer, linear = _linear_of(f"{module}.lora_A") or (0, LINEARS[0])
    return layer, LINEARS.index(linear)


def peft_key(key: str) -> str:
    """The name of ``<module>.lora_A`` or ``.lora_B`` in PEFT's file."""
    return f"base_model.model.{key}.weight"


def _refuse_kinds(config: Mapping[str, Any], *, folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / CONFIG_FILE} describes an adapter of type {config.get('peft_type')!r}; only LORA is supported."
        )
    unsupported = [f"{key} ({what})" for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias: {config['bias']} (trained biases)")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights: {start} (changes the base; let PEFT convert it when saving)")
    if unsupported:
        raise AdapterError(
            f"{folder / CONFIG_FILE} asks for more than plain LoRA on the seven linears: {', '.join(unsupported)}. "
            "Such an adapter isn't supported."
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
    outside = links_out(folder, (CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE))
    if outside:
        raise AdapterError(
            f"{folder} has links that point outside of it: {first_few(outside)}. Nothing is read from there: put the "
            "files themselves into the folder, or name the folder that they are in."
        )


def _read_seal(folder: Path) -> dict[str, Any]:
    """The seal of our own writer, its structure checked; empty where another program wrote the weights."""
    file = folder / WEIGHTS_FILE
    try:
        written = read_metadata(file).get(SEAL)
        seal = None if written is None else json.loads(written)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: {SEAL} in its metadata is not JSON ({error}).") from error
    if seal is None:
        return {}
    is_ours = isinstance(seal, dict) and isinstance(seal.get("checksum"), str) and isinstance(seal.get("config"), dict)
    if not is_ours:
        raise AdapterError(f"{file} is damaged: {SEAL} in its metadata lacks a checksum or the config.")
    return dict(seal)


def _headers(folder: Path) -> dict[str, TensorOnDisk]:
    file = folder / WEIGHTS_FILE
    if not file_exists(file) and file_exists(folder / "adapter_model.bin"):
        raise AdapterError(
            f"{folder} holds adapter_model.bin: pickled weights are never read because they can run code. "
            "Save the adapter again with a PEFT that writes safetensors."
        )
    try:
        return {tensor.name: tensor for tensor in read_header(file)}
    except WeightsError as error:
        raise AdapterError(str(error)) from error


def _coverage(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, folder: Path
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """The expected linears and layers: from the config, or from the keys if it has a pattern."""
    named, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(named, str) or config.get("exclude_modules"):
        present = [linear for key in shapes if (linear := _linear_of(key))]
        in_file = {linear for _, linear in present}
        return tuple(linear for linear in LINEARS if linear in in_file), tuple(sorted({n for n, _ in present}))
    last_parts = [str(name).rpartition(".")[2] for name in named] if isinstance(named, list) else []
    unknown = [name for name in last_parts if name not in LINEARS]
    if unknown or not last_parts:
        raise AdapterError(
            f"{folder / CONFIG_FILE} names target_modules {first_few(unknown) or 'none'}; a list of Llama's "
            f"linears ({' '.join(LINEARS)}) was expected."
        )
    targets = tuple(linear for linear in LINEARS if linear in last_parts)
    if type(layers) is int:
        layers = [layers]
    if layers and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise AdapterError(
            f"{folder / CONFIG_FILE} has layers_to_transform = {layers!r}; a list of layer numbers was expected. The "
            "file is damaged."
        )
    return targets, tuple(sorted(layers)) if layers else None
