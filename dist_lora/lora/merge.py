"""A model with an adapter merged into its weights: W + s B A in fp32, cast once, from file to file a slice at a time.

Trained tokens' rows take the place of those of embedding and head, unfrozen weights that of the base's.

The result mirrors the base: the same file names, the same tensors in the same order, and its config, tokenizer and
licence. Memory doesn't depend on the model's size. Letters: R LoRA rank, D_in and D_out a linear's widths.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import dist_lora
from dist_lora.base.index import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorOnDisk,
    WeightIndex,
    by_file,
    hash_config,
    open_index,
    open_weights,
    read_model_json,
    refuse_links,
)
from dist_lora.base.model_folder import (
    check_space,
    companions,
    copy_into,
    new_model_folder,
    refuse_existing,
    write_json,
)
from dist_lora.base.quant.formats import format_of
from dist_lora.base.quant.published import NF4_ON_DISK, BaseOnDisk, open_base_on_disk
from dist_lora.base.safetensors import Entry, bytes_of, header_of, new_safetensors
from dist_lora.base.stored_shape import EMBEDDING, HEAD
from dist_lora.base.stream import TORCH_DTYPES, SliceReader
from dist_lora.base.tokenizer_files import set_template
from dist_lora.config.schema import LINEARS, Quant
from dist_lora.errors import AdapterError, ConfigError
from dist_lora.files import sync_folder
from dist_lora.lora.adapter_reader import AdapterOnDisk, open_adapter
from dist_lora.lora.card import CARD_FILE, card
from dist_lora.lora.origin import BaseIdentity, facts_of, identify_base, origin_of, original_of
from dist_lora.lora.served import recipe_of
from dist_lora.lora.tokens import EMBEDDING_ROWS, HEAD_ROWS
from dist_lora.text import first_few

log = logging.getLogger("dist_lora")

_SLICE_BYTES = 16 * 2**20  # in memory: as read, in fp32, and cast: for bf16 64 MiB
_DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp32": "F32"}
_CONFIG_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp32": "float32"}
_END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # Llama 3's, in the order of their ids
_WHAT = "merged model"
_TENSORS: Mapping[str, str] = {EMBEDDING_ROWS: EMBEDDING, HEAD_ROWS: HEAD}


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_adapter`` did: tensors that changed, bytes of weights written, seconds.

    ``quant``: the base's values that were merged into; ``nf4`` for a base that was published so. ``base``: the model that
    was merged into. ``dtype``: of the merged weights, as safetensors calls it.
    """

    changed_tensors: int
    bytes_written: int
    seconds: float
    quant: Quant
    base: BaseIdentity
    dtype: str


def merge_adapter(
    adapter: Path,
    *,
    base: Path,
    out: Path,
    force: bool = False,
    dtype: Literal["bf16", "fp32"] | None = None,
    quant: Quant = "none",
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Writes ``out``, a model folder with the adapter in its weights, whole or not at all.

    Needs no process group and no GPU. Peak memory: 100 MiB and one pair of A and B. It is built in
    ``<out>.partial``, which has no config.json until all else is fsynced, so that nothing loads it by mistake;
    the next merge removes what a killed one left there.

    Args:
        force: merge even if the adapter says that it was trained on other weights than those of ``base``.
        dtype: type of all tensors of the result; without it each keeps its type on disk.
        quant: the ``model.quant`` that the adapter was trained on: the linears of the layers get the values that
            they have in it, so that the result is the trained model, up to one rounding. A base that was published in
            NF4 has these values anyway: each of its linears is dequantized, and those left unquantized stay as they are.
        on_progress: called after each slice with (bytes written, total bytes of weights).

    Raises:
        ConfigError: ``out`` exists or is being written, or the adapter belongs to another base or isn't plain LoRA.
        AdapterError: the adapter is damaged, or would leave a weight unchanged.
        WeightsError: the base is damaged.
        SaveError: not enough space, or the system refuses to write.
    """
    begin = time.perf_counter()
    refuse_existing(out, what=_WHAT)
    opened, whole = open_adapter(adapter), open_index(base, allow_bytes=True)
    on_disk, index, quant = _open_base(whole, quant)
    config_hash = hash_config(base)
    identity = _identity_of_base(opened, index=whole, config_hash=config_hash, is_forced=force)
    _check_fit(opened, index=index)
    refuse_links(base, [str(path.relative_to(base)) for path in companions(base)])
    opened.verify()
    _check_effect(opened)
    origin = origin_of(adapter)
    if other := origin.other_vocabulary(base):
        log.warning(f"{adapter} was trained {other}. The merged model gets the base's: copy the adapter's own over it.")
    with new_model_folder(out, what=_WHAT) as partial:
        _check_space(index, partial=partial, dtype=dtype)
        merger = _Merger(opened, index=index, on_disk=on_disk, dtype=dtype, quant=quant, on_progress=on_progress)
        merger.write(partial)
        _write_card(partial, opened, base=identity, quant=quant)
        _write_companions(index, partial=partial, dtype=dtype, chat_template=origin.chat_template)
    changed = [
        *(f"{module}.weight" for module in (*opened.pairs, *opened.weights)),
        *(_TENSORS[name] for name in opened.rows),
    ]
    merged = index.tensors[changed[0]].dtype
    seconds = time.perf_counter() - begin
    return MergeReport(
        len(changed),
        merger.bytes_written,
        seconds,
        quant,
        identity,
        _DTYPES[dtype] if dtype else merged,
    )


class _Merger:
    """Writes the weights' files, and checks at the end that each target changed."""

    def __init__(
        self,
        adapter: AdapterOnDisk,
        *,
        index: WeightIndex,
        on_disk: BaseOnDisk,
        dtype: str | None,
        quant: Quant,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._adapter = adapter
        self._index = index
        self._dtype = dtype
        self._on_disk = on_disk
        self._fmt = None if quant == "none" or on_disk.nf4 else format_of(quant, torch.float32)
        self._on_progress = on_progress
        self._reader = SliceReader(_SLICE_BYTES)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._rows = _rows_by_tensor(adapter, index)
        self._unchanged: list[str] = []
        self._overflowing: list[str] = []
        self._bytes_total = _num_bytes(index.tensors.values(), dtype)
        self.bytes_written = 0

    def write(self, partial: Path) -> None:
        for source, tensors in by_file(self._index.tensors.values()):
            target = partial / source.relative_to(self._index.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            entries = _entries(tensors, self._dtype)
            with open_weights(source) as descriptor, new_safetensors(target, entries, metadata={}) as write:
                for tensor in tensors:
                    self._write_tensor(tensor, descriptor=descriptor, write=write)
        self._check_targets()
        assert self.bytes_written == self._bytes_total, f"{self.bytes_written} bytes of {self._bytes_total} written"

    def _write_tensor(self, tensor: TensorOnDisk, *, descriptor: int, write: Callable[[memoryview], None]) -> None:
        module = tensor.name.removesuffix(".weight")
        pair = None
        if module in self._adapter.pairs:
            pair = (*self._adapter.read_pair(module), self._adapter.modules[module].scale)
        own = self._adapter.read_weight(module) if module in self._adapter.weights else None
        dtype = TORCH_DTYPES[_DTYPES[self._dtype] if self._dtype else tensor.dtype]
        is_changed = False
        fmt = self._fmt if module.rpartition(".")[2] in LINEARS else None
        for row, stored in self._on_disk.values(
            tensor, reader=self._reader, descriptor=descriptor, max_slice_bytes=_SLICE_BYTES
        ):
            rows = stored if fmt is None else fmt.dequantize(fmt.quantize_rows(stored), torch.float32)
            if own is not None:
                rows = own[row : row + len(rows)]
            result = self._merged(rows, pair, row=row, dtype=dtype)
            self._put_rows(tensor.name, result, first_row=row)
            if pair is not None:
                is_changed = is_changed or not torch.equal(result, rows.to(dtype))
            if pair is not None or own is not None:
                extremes = torch.aminmax(result)  # NaN is in both; isfinite would take twice the slice more
                if not all(map(math.isfinite, extremes)) and tensor.name not in self._overflowing:
                    self._overflowing.append(tensor.name)
            write(bytes_of(result))
            self.bytes_written += result.nbytes
            if self._on_progress:
                self._on_progress(self.bytes_written, self._bytes_total)
        if pair is not None and not is_changed:
            self._unchanged.append(tensor.name)

    def _merged(
        self, rows: Tensor, pair: tuple[Tensor, Tensor, float] | None, *, row: int, dtype: torch.dtype
    ) -> Tensor:
        """These rows of W + s B A, summed in fp32 and cast once; without a pair, of W. Valid until the next call."""
        if pair is None:
            return rows if rows.dtype == dtype else self._buffer(rows, dtype).copy_(rows)
        first, second, scale = pair  # A (R, D_in) and B (D_out, R), whole
        total = self._buffer(rows, torch.float32).copy_(rows)
        total.addmm_(second[row : row + len(rows)], first, alpha=scale)
        return total if dtype == torch.float32 else self._buffer(rows, dtype).copy_(total)

    def _put_rows(self, name: str, result: Tensor, *, first_row: int) -> None:
        """Write the trained tokens' rows of a tensor into some of its rows."""
        if name not in self._rows:
            return
        trained = self._rows[name]
        for token, values in zip(self._adapter.tokens, trained, strict=True):
            if first_row <= token < first_row + len(result):
                result[token - first_row] = values
                if not result[token - first_row].isfinite().all() and name not in self._overflowing:
                    self._overflowing.append(name)

    def _buffer(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A reused buffer of the shape of ``rows``: hundreds of new ones of this size would fragment the heap."""
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < rows.numel():
            buffer = self._buffers[dtype] = torch.empty(rows.numel(), dtype=dtype)
        return buffer[: rows.numel()].view(rows.shape)

    def _check_targets(self) -> None:
        if self._overflowing:
            raise AdapterError(
                f"{self._adapter.folder} turns {len(self._overflowing):,} weights into NaN or infinity: "
                f"{first_few(self._overflowing)}. If the base is in fp16, merge to bf16 or fp32: --dtype."
            )
        if self._unchanged:
            raise AdapterError(
                f"{self._adapter.folder} would not change {len(self._unchanged):,} of the {len(self._adapter.pairs):,} "
                f"weights that it targets: {first_few(self._unchanged)}. Its update is lost in rounding; merge to "
                "fp32 (--dtype fp32), or serve it as an adapter."
            )


def _rows_by_tensor(adapter: AdapterOnDisk, index: WeightIndex) -> dict[str, Tensor]:
    """The trained rows ``(N, D)`` by the tensor of the base that they are written to.

    A head that is stored though config.json ties it to the embedding gets the embedding's rows, unless it has its own.
    """
    rows = {_TENSORS[name]: adapter.read_rows(name) for name in adapter.rows}
    if EMBEDDING in rows and read_model_json(index.folder / "config.json").get("tie_word_embeddings"):
        rows.setdefault(HEAD, rows[EMBEDDING])
    return rows


def _open_base(whole: WeightIndex, quant: Quant) -> tuple[BaseOnDisk, WeightIndex, Quant]:
    """The base, the index of the result, and the quantization whose values it gets: nf4 if the base was published so."""
    on_disk = open_base_on_disk(whole.folder, quant="nf4", index=whole)
    if not on_disk.nf4:
        _check_quant(on_disk.index, quant)
        return on_disk, on_disk.index, quant
    if quant == "int8":
        raise ConfigError(
            f"--quant int8: {whole.folder} was published in NF4, and a run on it has its values in NF4. Leave the option "
            "out, or name the base that the adapter was trained on: --base MODEL"
        )
    return on_disk, _dequantized(on_disk), "nf4"


def _dequantized(on_disk: BaseOnDisk) -> WeightIndex:
    """The index of the result: what is NF4 on disk has the dtype of the model's config, else bf16."""
    config = read_model_json(on_disk.index.folder / "config.json")
    stated = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = {"float32": "F32", "float16": "F16"}.get(stated, "BF16")
    tensors = {
        name: replace(tensor, dtype=dtype) if tensor.dtype == NF4_ON_DISK else tensor
        for name, tensor in on_disk.index.tensors.items()
    }
    return replace(on_disk.index, tensors=tensors)


def _entries(tensors: Sequence[TensorOnDisk], dtype: str | None) -> list[Entry]:
    return [Entry(tensor.name, _DTYPES[dtype] if dtype else tensor.dtype, tensor.shape) for tensor in tensors]


def _num_bytes(tensors: Iterable[TensorOnDisk], dtype: str | None) -> int:
    return sum(entry.num_bytes for entry in _entries(list(tensors), dtype))


def _identity_of_base(adapter: AdapterOnDisk, *, index: WeightIndex, config_hash: str, is_forced: bool) -> BaseIdentity:
    """The model in ``index``, which is the one that the adapter was trained on, or this is forced."""
    trained_on = adapter.base
    here = original_of(index.folder) or BaseIdentity(None, None, index.content_hash(), config_hash)
    differing = trained_on.differences(here)
    if differing and not is_forced:
        raise ConfigError(
            f"{adapter.folder} was trained on {trained_on.name or 'another model'}, and {index.folder} differs from it "
            f"({'; '.join(differing)}). Merge it into the model that it was trained on, or use --force."
        )
    return identify_base(index.folder) if differing or trained_on.name is None else trained_on


def _write_card(partial: Path, adapter: AdapterOnDisk, *, base: BaseIdentity, quant: Quant) -> None:
    """The model card, by what the adapter's folder tells of its training."""
    text = card(
        "merged",
        base=base,
        recipe=recipe_of(adapter),
        origin=origin_of(adapter.folder),
        facts=facts_of(adapter.folder),
        software={"dist_lora": dist_lora.__version__, "torch": torch.__version__},
        merged_quant=quant,
    )
    (partial / CARD_FILE).write_text(text, encoding="utf-8")


def _check_fit(adapter: AdapterOnDisk, *, index: WeightIndex) -> None:
    unknown, differing = [], []
    for module, (first, second) in adapter.pairs.items():
        weight = index.tensors.get(f"{module}.weight")
        expected = (second.shape[0], first.shape[1])
        if weight is None:
            unknown.append(first.name)
        elif weight.shape != expected:
            differing.append(f"{module}.weight is {weight.shape} and the adapter's B A {expected}")
    for module, own in adapter.weights.items():
        weight = index.tensors.get(f"{module}.weight")
        if weight is None:
            unknown.append(own.name)
        elif weight.shape != own.shape:
            differing.append(f"{module}.weight is {weight.shape} and the adapter's {own.shape}")
    for name, rows in adapter.rows.items():
        weight = index.tensors.get(_TENSORS[name]) or index.tensors.get(HEAD)
        if weight is None or weight.shape[1] != rows.shape[1] or weight.shape[0] <= max(adapter.tokens):
            has = "isn't there" if weight is None else f"is {weight.shape}"
            differing.append(
                f"{_TENSORS[name]} {has} and the adapter has rows of {rows.shape[1]} up to {max(adapter.tokens)}"
            )
    lines = [f"  no such weight in the base: {first_few(unknown)}"] if unknown else []
    lines += [f"  of another shape: {first_few(differing)}"] if differing else []
    if lines:
        raise ConfigError(f"{adapter.folder} doesn't fit {index.folder}:\n" + "\n".join(lines))
    lacking = _modules_lacking(adapter, index)
    if lacking:
        raise AdapterError(
            f"{adapter.folder} is incomplete for {index.folder}: its config names {len(lacking):,} linears that it has no "
            f"tensors for: {first_few(lacking)}. Copy it again, or name its own base."
        )


def _check_quant(index: WeightIndex, quant: Quant) -> None:
    fmt = format_of(quant, torch.float32)
    for name, tensor in index.tensors.items():
        if name.removesuffix(".weight").rpartition(".")[2] in LINEARS and (why := fmt.refusal(*tensor.shape)):
            raise ConfigError(f"{index.folder} can't have been the base of a run in {quant}: {name}: {why}")


def _modules_lacking(adapter: AdapterOnDisk, index: WeightIndex) -> list[str]:
    modules = [name.removesuffix(".weight") for name in index.tensors if name.startswith("model.layers.")]
    linears = [name for name in modules if name.rpartition(".")[2] in LINEARS and name not in adapter.pairs]
    return [name for name in linears if adapter.config.covers(name)]


def _check_effect(adapter: AdapterOnDisk) -> None:
    """Reads every pair once, and checks that all are finite and none is zero."""
    zero = [module for module in adapter.pairs if not all(half.any() for half in adapter.read_pair(module))]
    if zero:
        raise AdapterError(
            f"{adapter.folder} adds nothing to {len(zero):,} of its {len(adapter.pairs):,} targets because their A or "
            f"B is zero: {first_few(zero)}; no weight would change there. It was never trained, or saved in part."
        )


def _check_space(index: WeightIndex, *, partial: Path, dtype: str | None) -> None:
    weights = _num_bytes(index.tensors.values(), dtype)
    files = by_file(index.tensors.values())
    headers = sum(len(header_of(_entries(tensors, dtype), metadata={})) for _, tensors in files)
    beside = sum(path.stat().st_size for path in companions(index.folder))
    check_space(partial, needed=weights + headers + beside + 2**20, what=_WHAT)


def _write_companions(index: WeightIndex, *, partial: Path, dtype: str | None, chat_template: str | None) -> None:
    """Writes all files but the weights; config.json last, since nothing loads a folder without it.

    ``chat_template`` is that of the adapter's run: the merged model is prompted as it was trained.
    """
    folder = index.folder
    for path in companions(folder):
        copy_into(partial, path, folder=folder)
    if chat_template is not None:
        set_template(partial, chat_template)
    if not (folder / SINGLE_FILE).exists():
        _write_index(index, partial=partial, dtype=dtype)
    config = read_model_json(folder / "config.json")
    generation = _generation_config(folder, config, templates=partial)
    if generation is not None:
        write_json(partial / "generation_config.json", generation)
    config.pop("quantization_config", None)  # all weights are written as numbers
    if dtype is not None:
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = _CONFIG_DTYPES[dtype]
    sync_folder(partial)
    write_json(partial / "config.json", config)


def _write_index(index: WeightIndex, *, partial: Path, dtype: str | None) -> None:
    metadata = read_model_json(index.folder / INDEX_FILE).get("metadata") or {}
    total = _num_bytes(index.tensors.values(), dtype)
    weight_map = {name: str(tensor.file.relative_to(index.folder)) for name, tensor in sorted(index.tensors.items())}
    write_json(partial / INDEX_FILE, {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map})


def _generation_config(folder: Path, config: Mapping[str, Any], *, templates: Path) -> dict[str, Any] | None:
    """The content of generation_config.json with all tokens that end an answer; None if the base needs none.

    A chat model of Llama 3 ends a turn with ``<|eot_id|>`` or ``<|eom_id|>``, and some published configs list only
    ``<|end_of_text|>``: such a model would never stop generating.
    """
    file = folder / "generation_config.json"
    content = read_model_json(file) if file.exists() else None
    turn_ends = _turn_ends(templates)
    if content is None and not turn_ends:
        return None
    listed = (content or {}).get("eos_token_id")
    listed = config.get("eos_token_id") if listed is None else listed
    ends = list(listed) if isinstance(listed, list) else [listed] if listed is not None else []
    ends += [token for token in turn_ends if token not in ends]
    result = dict(content) if content is not None else {"bos_token_id": config.get("bos_token_id")}
    if ends:
        result["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return result


def _turn_ends(folder: Path) -> list[int]:
    """Ids of Llama 3's end tokens that the tokenizer has, if its chat template ends turns with ``<|eot_id|>``."""
    read = {
        name: read_model_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    templates = json.dumps(read["tokenizer_config.json"].get("chat_template", ""), ensure_ascii=False)
    templates += "".join(path.read_text("utf-8") for path in folder.glob("chat_template*.j*"))
    ends = (
        *(_END_TOKENS if "<|eot_id|>" in templates else ()),
        *(("<|im_end|>", "<|endoftext|>") if "<|im_end|>" in templates else ()),
    )
    if not ends:
        return []
    listed = read["tokenizer_config.json"].get("added_tokens_decoder", {})
    ids = {token["content"]: int(number) for number, token in listed.items()}
    ids |= {token["content"]: int(token["id"]) for token in read["tokenizer.json"].get("added_tokens", [])}
    return [ids[token] for token in ends if token in ids]
