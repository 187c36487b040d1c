"""Reading an adapter's folder, ours or PEFT's, with every fault named.

The format is PEFT's own: ``adapter_config.json``, and ``adapter_model.safetensors`` with two tensors per module,
``base_model.model.<module>.lora_A.weight`` ``(R, D_in)`` and ``lora_B`` ``(D_out, R)``; where tokens are trained, their rows
``(N, D)`` of the embedding, and of a head of its own, as ``...token_adapter.trainable_tokens_delta``, which are the new values;
and whole weights ``base_model.model.<module>.weight`` of linears and norms that are trained themselves (``modules_to_save``).
``dist_lora.json`` in the same folder names the base that the adapter belongs to. A seal in the weights' metadata, which
other programs ignore, holds a checksum of the tensors and the settings that they depend on, so that a flipped bit or a file
of another adapter is detected. In memory the keys are ``<module>.lora_A`` and ``<module>.lora_B``, with modules as
``model.layers.0.self_attn.q_proj``, ``<module>.weight``, ``model.embed_tokens.token_rows`` and ``lm_head.token_rows``. Letters: R LoRA rank,
D_in and D_out the linear's widths, N trained tokens, D model width.
"""

from __future__ import annotations

import json
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
from dist_lora.config.schema import LINEARS, NORMS, LinearName, ModuleAdapter
from dist_lora.errors import AdapterError, ConfigError, WeightsError
from dist_lora.files import file_exists, links_out
from dist_lora.herd.unfrozen import layer_of as layer_of_weight
from dist_lora.lora.adapter_folder import check_adapter_folder
from dist_lora.lora.origin import CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE, BaseIdentity, read_adapter_json, read_origin
from dist_lora.lora.peft_config import PeftConfig, read_peft_config, refuse_other_models
from dist_lora.lora.tokens import EMBEDDING_ROWS, HEAD_ROWS
from dist_lora.text import first_few

# At most three digits of layers: every key up to the highest layer is checked.
_MODULE = re.compile(r"model\.layers\.([0-9]{1,3})\.(?:self_attn\.([qkvo]_proj)|mlp\.((?:gate|up|down)_proj))")
_UNFROZEN = re.compile(
    r"(model\.layers\.[0-9]{1,3}\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|(?:input|post_attention)_layernorm)|model\.norm)"
    r"\.weight"
)
_PEFT_KEY = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")
_PEFT_ROWS: Mapping[str, str] = {
    EMBEDDING_ROWS: "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    HEAD_ROWS: "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
}
_ROWS = {name: key for key, name in _PEFT_ROWS.items()}
_NOT_GATHERED = "not gathered: a process holds only its shard of a tensor"
SEAL = "dist_lora"  # its key in the metadata of the weights' file
# The settings that the tensors depend on; all others may be edited.
SEALED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "target_modules", "layers_to_transform",
    "trainable_token_indices", "modules_to_save",
)  # fmt: skip
# What is not in the seal of a file from an earlier version, which wrote no patterns, or of one without trained tokens.
_UNSEALED: Mapping[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "modules_to_save": None,
}
# Keys of tensors that are no plain LoRA on a linear, and what they are; as PEFT 0.21 names them.
_REFUSED_KEYS = (
    (
        r".+\.lora_[AB]\.(?!weight$)[^.]+\.weight|.+\.trainable_tokens_(delta\..+|original.*)",
        "keys with the adapter's name in them, from model.state_dict(), which PEFT doesn't find either: save the adapter by "
        "PEFT's model.save_pretrained(FOLDER), or leave the name out ('.lora_A.default.weight' is '.lora_A.weight')",
    ),
    (r".+\.lora_magnitude_vector.*", "DoRA"),
    (
        r".+\.lora_embedding_[AB].*|.+\.embed_tokens\.lora_.+|.+\.lm_head\.lora_.+",
        "adapters on the embeddings or the head",
    ),
    (
        r".+\.(embed_tokens|lm_head)\.(?!lora_|token_adapter\.trainable_tokens_delta$).*",
        "whole embeddings or a whole head (save them without: save_embedding_layers=False, if they were not trained)",
    ),
    (r".+\.bias", "biases"),
)


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """An adapter's settings and base, from its JSON files.

    ``modules`` are the adapted linears by full name, in the model's order, each with its own rank and with the alpha that
    gives its scale (of rsLoRA too). ``rank`` and ``alpha`` are the file's, which hold where no pattern says otherwise, and
    ``scale`` is what B A is multiplied by then. ``targets`` are the linears that occur in ``modules``, ``layers`` their
    layers, or None if the adapter is for as many as a model has. ``tokens`` are those whose rows are trained, ascending;
    ``unfrozen`` the linears and norms whose whole weights are.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[LinearName, ...]
    layers: tuple[int, ...] | None
    scale: float
    modules: Mapping[str, ModuleAdapter]
    base: BaseIdentity
    tokens: tuple[int, ...] = ()
    unfrozen: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Adapter(AdapterFacts):
    """An adapter in memory: tensors ``<module>.lora_A`` ``(R, D_in)`` and ``<module>.lora_B`` ``(D_out, R)``, fp32.

    And ``model.embed_tokens.token_rows`` and ``lm_head.token_rows`` ``(N, D)``, where it has tokens; ``<module>.weight`` of
    ``unfrozen`` ones.
    """

    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdapterOnDisk(AdapterFacts):
    """An adapter with checked headers, whose tensors are read one pair at a time; see ``Adapter``.

    ``rows``: the trained rows by name; those of the head only where it isn't tied to the embedding. ``weights``: those of
    ``unfrozen`` modules.
    """

    folder: Path
    config: PeftConfig
    pairs: dict[str, tuple[TensorOnDisk, TensorOnDisk]]
    rows: dict[str, TensorOnDisk]
    weights: dict[str, TensorOnDisk]
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
            actual = _checksum_on_disk(
                [*(half for pair in self.pairs.values() for half in pair), *self.rows.values(), *self.weights.values()]
            )
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        if actual != self.checksum:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} is damaged: its tensors have checksum {actual}, and {self.checksum} was "
                "written. Copy it again, or recreate it: dist-lora gather CHECKPOINT --out DIR"
            )

    def lacking(self, num_layers: int) -> list[str]:
        """The linears of a model of so many layers that the adapter's config names, and the file has no tensors for."""
        return [module for module in self.config.modules(range(num_layers)) if module not in self.pairs]

    def read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A ``(R, D_in)`` and B ``(D_out, R)`` of a module, fp32, in host memory.

        Raises:
            AdapterError: the file can't be read, or a value is NaN or infinite.
        """
        halves = zip((f"{module}.lora_A", f"{module}.lora_B"), self.pairs[module], strict=True)
        first, second = self._read(dict(halves))
        return first, second

    def read_rows(self, name: str) -> Tensor:
        """The trained rows ``(N, D)`` of this name, in the order of ``tokens``, fp32, in host memory.

        Raises: see ``read_pair``.
        """
        (rows,) = self._read({name: self.rows[name]})
        place = {token: row for row, token in enumerate(self.config.tokens)}
        return rows[[place[token] for token in self.tokens]]

    def read_weight(self, module: str) -> Tensor:
        """The whole weight of an unfrozen linear ``(D_out, D_in)`` or norm ``(D,)``, fp32, in host memory.

        Raises: see ``read_pair``.
        """
        (weight,) = self._read({f"{module}.weight": self.weights[module]})
        return weight

    def _read(self, tensors: Mapping[str, TensorOnDisk]) -> list[Tensor]:
        """These tensors by our keys, fp32, in host memory."""
        try:
            values = [read_tensor(tensor, dtype=torch.float32) for tensor in tensors.values()]
        except WeightsError as error:
            raise AdapterError(str(error)) from error
        infinite = [
            peft_key(key) for key, value in zip(tensors, values, strict=True) if not torch.isfinite(value).all()
        ]
        if infinite:
            raise AdapterError(
                f"{self.folder / WEIGHTS_FILE} holds NaN or infinity in {first_few(infinite)}. Its run "
                "diverged; use one of its earlier checkpoints."
            )
        return values


def open_adapter(folder: Path) -> AdapterOnDisk:
    """The adapter in ``folder``, ours or PEFT's, with everything checked that its JSON files and header allow.

    Raises:
        ConfigError: it is no adapter's folder (see ``check_adapter_folder``), isn't plain LoRA on a Llama's seven linears, or
            its weights are pickled; names what it is.
        AdapterError: the folder is damaged. Names the keys: the missing half of a pair, an unexpected key, a wrong rank, a
            zero-size or 1-D tensor.
    """
    check_adapter_folder(folder)
    _refuse_links(folder)
    settings = read_adapter_json(folder / CONFIG_FILE)
    config = read_peft_config(settings, folder=folder)
    headers = _headers(folder)
    keys = {name: match[1] if (match := _PEFT_KEY.fullmatch(name)) else name for name in headers}
    _refuse_keys(headers, folder=folder)
    weights = {module: tensor for name, tensor in headers.items() if (module := unfrozen_of(name)) is not None}
    whole = {tensor.name for tensor in weights.values()}
    by_key = {keys[name]: tensor for name, tensor in headers.items() if name not in _ROWS and name not in whole}
    pairs = _pairs(by_key, config, folder=folder)
    rows = {_ROWS[name]: tensor for name, tensor in headers.items() if name in _ROWS}
    _check_rows(rows, config, folder=folder)
    _check_weights(weights, config, folder=folder)
    seal = _read_seal(folder)
    base = read_origin(folder, settings, checksum=seal.get("checksum"))
    _check_seal(seal, settings, folder=folder)
    modules = {module: config.adapter_of(module) for module in pairs}
    return AdapterOnDisk(
        folder=folder,
        config=config,
        pairs=pairs,
        rows=rows,
        weights=weights,
        checksum=seal.get("checksum"),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=tuple(linear for linear in LINEARS if linear in {module.linear for module in modules.values()}),
        layers=_layers_of(modules, config),
        scale=config.scale,
        modules=modules,
        base=base,
        tokens=tuple(sorted(config.tokens)),
        unfrozen=tuple(sorted(weights, key=_in_order)),
    )


def unfrozen_of(name: str) -> str | None:
    """The linear or norm whose whole weight has this name, in PEFT's file or ours; None if it is another tensor."""
    match = _UNFROZEN.fullmatch(name.removeprefix("base_model.model."))
    return None if match is None else match[1]


def _in_order(module: str) -> tuple[int, int]:
    """Sorts linears and norms as a model has them."""
    layer = layer_of_weight(module)
    return 1000 if layer is None else layer, (*LINEARS, *NORMS).index(module.rpartition(".")[2])


def _check_weights(weights: Mapping[str, TensorOnDisk], config: PeftConfig, *, folder: Path) -> None:
    """Raise ``AdapterError`` unless the whole weights are those that the config names, which may be ends of names."""
    unnamed = [module for module in weights if not any(module.endswith(name) for name in config.unfrozen)]
    lacking = [name for name in config.unfrozen if not any(module.endswith(name) for module in weights)]
    faults = [f"unexpected: {first_few([weights[module].name for module in unnamed])}"] if unnamed else []
    faults += [f"missing: {first_few(lacking)}"] if lacking else []
    faults += weights_faults({f"{module}.weight": tensor.shape for module, tensor in weights.items()}, tuple(weights))
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} doesn't hold the whole modules of its {CONFIG_FILE} (modules_to_save):\n  "
            + "\n  ".join(faults)
        )


def weights_faults(shapes: Mapping[str, tuple[int, ...]], unfrozen: Sequence[str]) -> list[str]:
    """A line for each kind of fault among the weights ``<module>.weight`` of unfrozen linears and norms."""
    expected = {f"{module}.weight" for module in unfrozen}
    unwhole = [
        f"{key} has shape {shape}"
        for key, shape in shapes.items()
        if len(shape) != (1 if key.endswith("norm.weight") else 2) or not min(shape)
    ]
    kinds = (
        ("unexpected, not unfrozen", sorted(shapes.keys() - expected)),
        ("missing", sorted(expected - shapes.keys())),
        (_NOT_GATHERED, unwhole),
    )
    return [f"{kind}: {first_few(keys)}" for kind, keys in kinds if keys]


def _check_rows(rows: Mapping[str, TensorOnDisk], config: PeftConfig, *, folder: Path) -> None:
    """Raise ``AdapterError`` unless the trained rows are those of the config's tokens."""
    faults = rows_faults({name: tensor.shape for name, tensor in rows.items()}, num_tokens=len(config.tokens))
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} doesn't hold the trained tokens of its {CONFIG_FILE} (trainable_token_indices):\n  "
            + "\n  ".join(faults)
        )


def rows_faults(shapes: Mapping[str, tuple[int, ...]], *, num_tokens: int) -> list[str]:
    """A line for each of the trained rows that isn't ``(num_tokens, D)``, is missing or unexpected."""
    if not num_tokens:
        return [f"unexpected, since the config names no token: {peft_key(name)}" for name in shapes]
    faults = [] if EMBEDDING_ROWS in shapes else [f"missing: {peft_key(EMBEDDING_ROWS)}"]
    widths = {shape[-1] for shape in shapes.values() if shape}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] != num_tokens or not shape[1] or len(widths) > 1:
            faults.append(f"{peft_key(name)} has shape {shape}, expected ({num_tokens}, the model's width)")
    return faults


def _pairs(
    by_key: Mapping[str, TensorOnDisk], config: PeftConfig, *, folder: Path
) -> dict[str, tuple[TensorOnDisk, TensorOnDisk]]:
    """A and B of each linear that the config covers, in the model's order; the file has all of them and nothing else."""
    linears = [linear for key in by_key if (linear := _linear_of(key))]
    expected = config.modules(range(1 + max((layer for layer, _ in linears), default=-1)))
    refuse_other_models(config, covered=expected, folder=folder)
    is_llamas = any(re.match(r"model\.layers\.[0-9]+\.(self_attn|mlp)\.", key) for key in by_key)
    if not is_llamas and any(_PEFT_KEY.fullmatch(tensor.name) for tensor in by_key.values()):
        raise ConfigError(
            f"{folder / WEIGHTS_FILE} holds {first_few(sorted(tensor.name for tensor in by_key.values()))}, on none of the "
            f"linears of a Llama (model.layers.N.self_attn.q_proj and so on): it is another model's adapter."
        )
    if not by_key and config.has_no_adapters:
        return {}
    faults = faults_of(
        {key: tensor.shape for key, tensor in by_key.items()},
        ranks={module: config.adapter_of(module).rank for module in expected},
        names=lambda key: by_key[key].name if key in by_key else peft_key(key),
    )
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} doesn't hold the adapter of its {CONFIG_FILE} (r = {config.rank}):\n  "
            + "\n  ".join(faults)
        )
    return {module: (by_key[f"{module}.lora_A"], by_key[f"{module}.lora_B"]) for module in expected}


def _layers_of(modules: Mapping[str, ModuleAdapter], config: PeftConfig) -> tuple[int, ...] | None:
    """The adapted layers; None if the config covers the linears of as many layers as a model has."""
    layers = sorted({module.layer for module in modules.values()})
    if not layers:
        return None
    following = config.modules([layers[-1] + 1])
    goes_on = {name.rpartition(".")[2] for name in following} == {module.linear for module in modules.values()}
    return None if goes_on and layers == list(range(len(layers))) else tuple(layers)


def _check_seal(seal: Mapping[str, Any], settings: Mapping[str, Any], *, folder: Path) -> None:
    """Raise ``AdapterError`` if a setting that the tensors depend on isn't the one that they were written with."""
    sealed = {**_UNSEALED, **seal["config"]} if seal else {}
    changed = [
        f"{key} is {settings.get(key)!r}, and was {value!r}"
        for key, value in sealed.items()
        if settings.get(key) != value or type(settings.get(key)) is not type(value)
    ]
    if changed:
        raise AdapterError(
            f"{folder / CONFIG_FILE} has changed since {WEIGHTS_FILE} was written: {'; '.join(changed)}. It is "
            "damaged, of another adapter, or was edited by hand: restore the former values."
        )


def _refuse_keys(names: Iterable[str], *, folder: Path) -> None:
    kinds: dict[str, list[str]] = {}
    for name in names:
        what = next((what for pattern, what in _REFUSED_KEYS if re.fullmatch(pattern, name)), None)
        if what is not None:
            kinds.setdefault(what, []).append(name)
    if kinds:
        raise ConfigError(
            f"{folder / WEIGHTS_FILE} holds more than plain LoRA on Llama's seven linears, which isn't supported:\n  "
            + "\n  ".join(f"{first_few(keys)}: {what}" for what, keys in kinds.items())
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
    tensors |= {name: opened.read_rows(name) for name in opened.rows}
    tensors |= {f"{module}.weight": opened.read_weight(module) for module in opened.unfrozen}
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
    shapes: Mapping[str, tuple[int, ...]], *, ranks: Mapping[str, int], names: Callable[[str], str]
) -> list[str]:
    """A line for each kind of fault among keys ``<module>.lora_A`` and ``.lora_B``, named by ``names``.

    Args:
        ranks: the rank of each module that has an adapter.
    """
    known = {key: shape for key, shape in shapes.items() if _linear_of(key)}
    whole = {key: shape for key, shape in known.items() if len(shape) == 2 and min(shape) > 0}
    actual = {key: shape[0 if key.endswith("A") else 1] for key, shape in whole.items()}
    modules = {key: key.rpartition(".")[0] for key in known}
    halves = {f"{module}.lora_{half}" for module in {*modules.values(), *ranks} for half in "AB"}
    differing = {key: rank for key, rank in sorted(actual.items()) if rank != ranks.get(modules[key], rank)}
    kinds = (
        ("unexpected, on none of Llama's linears", [names(key) for key in sorted(set(shapes) - set(known))]),
        (_NOT_GATHERED, [f"{names(key)} has shape {known[key]}" for key in sorted(set(known) - set(whole))]),
        ("wrong rank", [f"{names(key)} has rank {rank}" for key, rank in differing.items()]),
        (
            "not among the named targets and layers",
            [names(key) for key in sorted(known) if modules[key] not in ranks],
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


def layer_of(key: str) -> int | None:
    """The layer in the name of a trained tensor; None if it is on none of Llama's linears."""
    linear = _linear_of(key)
    return None if linear is None else linear[0]


def peft_key(key: str) -> str:
    """The name of ``<module>.lora_A`` or ``.lora_B``, of trained rows, or of a whole weight, in PEFT's file."""
    return _PEFT_ROWS.get(key) or f"base_model.model.{key.removesuffix('.weight')}.weight"


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
        raise ConfigError(
            f"{folder} holds adapter_model.bin: pickled weights are never read because they can run code. "
            "Save the adapter again with a PEFT that writes safetensors (model.save_pretrained(FOLDER, safe_serialization=True))."
        )
    try:
        return {tensor.name: tensor for tensor in read_header(file)}
    except WeightsError as error:
        raise AdapterError(str(error)) from error
