"""Stores a base as training would quantize it: the linears of the layers in NF4, everything else as it is.

The folder has the layout of bitsandbytes and transformers (see ``published``), with absmax in fp32: its codes and scales
are those that a run with ``model.quant: nf4`` computes from the original on the CPU, bit for bit. It is written from file
to file, a slice at a time; the files' names are the base's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lora.base.index import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorOnDisk,
    WeightIndex,
    by_file,
    open_index,
    open_weights,
    read_model_json,
    refuse_links,
)
from dist_lora.base.model_folder import (
    QUANTIZED_FROM_FILE,
    check_space,
    companions,
    copy_into,
    new_model_folder,
    refuse_existing,
    write_json,
)
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.formats import Nf4
from dist_lora.base.quant.nf4 import BLOCK, LEVELS
from dist_lora.base.safetensors import Entry, bytes_of, header_of, new_safetensors
from dist_lora.base.stream import SliceReader
from dist_lora.config.schema import LINEARS
from dist_lora.errors import ConfigError
from dist_lora.files import sync_folder
from dist_lora.text import first_few

FORMAT = 1

_WHAT = "quantized model"
_SLICE_BYTES = 16 * 2**20
_NAMES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize_base`` did: linears quantized, bytes of the weights before and after, seconds."""

    linears: int
    bytes_before: int
    bytes_after: int
    seconds: float


def quantize_base(
    base: Path,
    *,
    out: Path,
    identity: Mapping[str, str | None],
    on_progress: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Writes ``out``, a model folder with the linears of ``base``'s layers in NF4, whole or not at all.

    Needs no process group and no GPU. Peak memory: 100 MiB and the scales of one linear (56 MB for 405B). It is built
    in ``<out>.partial``, which has no config.json until all else is fsynced.

    Args:
        identity: what an adapter trained on ``out`` records of its base: the fields of a ``BaseIdentity`` of ``base``.
        on_progress: called after each slice with (bytes read, total bytes of weights).

    Raises:
        ConfigError: ``out`` exists or is being written, ``base`` is quantized already, or rows are not whole blocks.
        WeightsError: the base is damaged, or a weight is NaN or infinite.
        SaveError: not enough space, or the system refuses to write.
    """
    begin = time.perf_counter()
    refuse_existing(out, what=_WHAT)
    config = read_model_json(base / "config.json")
    if config.get("quantization_config"):
        raise ConfigError(
            f"{base} is quantized already (its config.json has quantization_config). Train on it as it is."
        )
    index = open_index(base)
    linears = _linears(index)
    copied = [*companions(base), *(path for path in [base / _GENERATION_FILE] if path.is_file())]
    refuse_links(base, [str(path.relative_to(base)) for path in copied])
    writer = _Writer(index, linears, on_progress)
    with new_model_folder(out, what=_WHAT) as partial:
        check_space(partial, needed=writer.num_bytes + sum(path.stat().st_size for path in copied) + 2**20, what=_WHAT)
        writer.write(partial)
        for path in copied:
            copy_into(partial, path, folder=base)
        _write_record(partial, index, writer, identity)
        sync_folder(partial)  # config.json last, since nothing loads a folder without it
        write_json(partial / "config.json", {**config, "quantization_config": _settings(index, linears)})
    return QuantizeReport(len(linears), index.num_bytes, writer.num_bytes, time.perf_counter() - begin)


class _Writer:
    """Writes the weights' files, each under the name that it has in the base."""

    def __init__(
        self, index: WeightIndex, linears: frozenset[str], on_progress: Callable[[int, int], None] | None
    ) -> None:
        self._index = index
        self._linears = linears
        self._on_progress = on_progress
        self._reader = SliceReader(_SLICE_BYTES)
        self._bytes_read = 0
        self.files = {
            source: [entry for tensor in tensors for entry in self._entries(tensor)]
            for source, tensors in by_file(index.tensors.values())
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of weights."""
        headers = sum(len(header_of(entries, metadata={})) for entries in self.files.values())
        return headers + sum(entry.num_bytes for entries in self.files.values() for entry in entries)

    def _entries(self, tensor: TensorOnDisk) -> list[Entry]:
        if tensor.name not in self._linears:
            return [Entry(tensor.name, tensor.dtype, tensor.shape)]
        rows, width = tensor.shape
        return [
            Entry(tensor.name, "U8", (rows * width // 2, 1)),
            Entry(f"{tensor.name}.absmax", "F32", (rows * width // BLOCK,)),
            Entry(f"{tensor.name}.quant_map", "F32", (len(LEVELS),)),
            Entry(f"{tensor.name}.quant_state.bitsandbytes__nf4", "U8", (len(_state(tensor)),)),
        ]

    def write(self, partial: Path) -> None:
        for source, tensors in by_file(self._index.tensors.values()):
            target = partial / source.relative_to(self._index.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with (
                open_weights(source) as descriptor,
                new_safetensors(target, self.files[source], metadata={}) as write,
            ):
                for tensor in tensors:
                    self._write_tensor(tensor, descriptor=descriptor, write=write)

    def _write_tensor(self, tensor: TensorOnDisk, *, descriptor: int, write: Callable[[memoryview], None]) -> None:
        is_linear = tensor.name in self._linears
        scales: list[Tensor] = []
        for row, rows in self._reader.slices(tensor, descriptor=descriptor):
            if is_linear:
                try:
                    parts = Nf4().quantize_rows(rows)
                except NotFiniteError as error:
                    raise error.within(f"{tensor.file}: {tensor.name}", first_row=row) from error
                write(bytes_of(parts["codes"]))
                scales.append(parts["absmax"])
            else:
                write(bytes_of(rows))
            self._bytes_read += rows.nbytes
            if self._on_progress:
                self._on_progress(self._bytes_read, self._index.num_bytes)
        if is_linear:
            for absmax in scales:
                write(bytes_of(absmax))
            write(bytes_of(torch.tensor(LEVELS, dtype=torch.float32, device="cpu")))
            write(memoryview(_state(tensor)))


def _state(tensor: TensorOnDisk) -> bytes:
    """The JSON of bitsandbytes' ``QuantState.as_dict(packed=True)`` (0.50.2)."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
    return json.dumps(state).encode()


def _linears(index: WeightIndex) -> frozenset[str]:
    """The weights that ``model.quant`` quantizes: the seven linears of each layer."""
    names = [
        name
        for name in index.tensors
        if name.startswith("model.layers.") and name.removesuffix(".weight").rpartition(".")[2] in LINEARS
    ]
    refusals = [
        f"{name}: {why}"
        for name in names
        if (why := Nf4().refusal(*index.tensors[name].shape) if len(index.tensors[name].shape) == 2 else "no matrix")
    ]
    if refusals or not names:
        what = first_few(refusals) if refusals else f"it has none of a Llama's linears ({' '.join(LINEARS)})"
        raise ConfigError(f"{index.folder} can't be stored in nf4: {what}")
    return frozenset(names)


def _settings(index: WeightIndex, linears: frozenset[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``, as transformers 5.23 writes it."""
    dtype = _NAMES[index.tensors[min(linears)].dtype]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _write_record(partial: Path, index: WeightIndex, writer: _Writer, identity: Mapping[str, str | None]) -> None:
    """The index, where there are several files, and the record of the original with the hash of what was written."""
    if not (index.folder / SINGLE_FILE).exists():
        entries = {
            entry.name: (str(source.relative_to(index.folder)), entry.num_bytes)
            for source, of_file in writer.files.items()
            for entry in of_file
        }
        total = sum(num_bytes for _, num_bytes in entries.values())
        weight_map = {name: file for name, (file, _) in sorted(entries.items())}
        write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content_hash = open_index(partial, allow_bytes=True).content_hash()
    record = {"format": FORMAT, "base": dict(identity), "quant": "nf4", "content_hash": content_hash}
    write_json(partial / QUANTIZED_FROM_FILE, record)
