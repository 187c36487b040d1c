"""Checkpoints that are NF4 on disk, as bitsandbytes and transformers publish them: read as they are, codes unchanged.

With ``X.weight``, the codes as one column, are stored ``X.weight.absmax``, ``X.weight.quant_map`` (the 16 levels) and
``X.weight.quant_state.bitsandbytes__nf4`` (JSON in bytes). With double quantization absmax is bytes too, and
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map`` say what they mean (QLoRA, arXiv 2305.14314, section 3;
the layout is ``QuantState.as_dict(packed=True)`` of bitsandbytes 0.50.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lora.base.index import TensorOnDisk, WeightIndex, check_types, open_index, open_weights
from dist_lora.base.quant.nf4 import BLOCK, LEVELS, dequantize_nf4
from dist_lora.base.stream import SliceReader
from dist_lora.config.schema import Quant
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.text import first_few

# D_in and D_out of a linear

NF4_ON_DISK = "NF4"
_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 10_000  # a few numbers in JSON: 200 bytes


@dataclass(frozen=True)
class NestedAbsmax:
    """How bytes of absmax become numbers: level of the byte, times the scale of its block, plus ``offset``.

    ``scales`` is F32 ``(blocks,)``, one for each ``block`` bytes of the whole absmax, row after row; ``levels`` is
    F32 ``(256,)``.
    """

    scales: TensorOnDisk
    levels: TensorOnDisk
    block: int
    offset: float


@dataclass(frozen=True)
class Nf4OnDisk:
    """One linear's weight in NF4.

    ``codes`` is U8 ``(D_out, D_in / 2)``, ``absmax`` F32 or, if nested, U8 ``(D_out, D_in / 64)``.
    """

    name: str
    shape: tuple[int, int]
    codes: TensorOnDisk
    absmax: TensorOnDisk
    nested: NestedAbsmax | None

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and absmax on disk; a nested absmax adds less than a hundredth of them."""
        return self.codes.num_bytes + self.absmax.num_bytes

    def read_rows(self, first_row: int, num_rows: int) -> dict[str, Tensor]:
        """``codes`` ``(num_rows, D_in / 2)`` uint8 and ``absmax`` ``(num_rows, D_in / 64)`` fp32 of these rows.

        Reads their bytes alone (and, if nested, 1 KiB and 4 bytes for every 256 of absmax). absmax is what
        bitsandbytes computes, bit for bit. Local. Peak memory is 1.3 times the result.

        Raises:
            WeightsError: the file is truncated or can't be read, or a scale is NaN or infinite.
        """
        assert 0 <= first_row <= first_row + num_rows <= self.shape[0], f"{self.name}: {first_row} + {num_rows} rows"
        codes = _read(self.codes, first=first_row, count=num_rows)
        absmax = _read(self.absmax, first=first_row, count=num_rows)
        if self.nested is not None:
            absmax = _dequantize_absmax(absmax, nested=self.nested, first=first_row * self.absmax.shape[1])
        faulty = (~absmax.isfinite()).nonzero()
        if len(faulty):
            row, block = faulty[0].tolist()
            raise WeightsError(
                f"{self.absmax.file} is damaged: in {self.name} the scale of row {first_row + row:,}, block {block:,} "
                f"is {absmax[row, block].item()}. Fetch it again."
            )
        return {"codes": codes, "absmax": absmax}


@dataclass(frozen=True)
class BaseOnDisk:
    """The weights of a model folder, quantized or not.

    ``index`` has every tensor by the name and the shape that the model gives it; those of type ``NF4_ON_DISK`` are
    read through ``nf4``, by the same name.
    """

    index: WeightIndex
    nf4: Mapping[str, Nf4OnDisk]

    def values(
        self, tensor: TensorOnDisk, *, reader: SliceReader, descriptor: int, max_slice_bytes: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows) of a tensor: in its type on disk, or of one in NF4 its values in fp32.

        Raises:
            WeightsError: see ``SliceReader.slices`` and ``Nf4OnDisk.read_rows``.
        """
        published = self.nf4.get(tensor.name)
        if published is None:
            yield from reader.slices(tensor, descriptor=descriptor)
            return
        num_rows, width = published.shape
        count = max(1, max_slice_bytes // (4 * width))
        for row in range(0, num_rows, count):
            parts = published.read_rows(row, min(count, num_rows - row))
            yield row, dequantize_nf4(parts["codes"], parts["absmax"], torch.float32)


def open_base_on_disk(folder: Path, *, quant: Quant, index: WeightIndex | None = None) -> BaseOnDisk:
    """What a model folder holds, whether its linears are plain or NF4. Reads headers and, for NF4, 0.3 KB per linear.

    A folder may mix both (``llm_int8_skip_modules``).

    Args:
        quant: ``model.quant``; NF4 on disk can be nothing else in memory.
        index: the folder's, with bytes allowed, where another process has read the headers.

    Raises:
        ConfigError: NF4 on disk and another ``quant``; or quantized in an unsupported way: FP4, another block
            or other levels.
        WeightsError: the folder is damaged or holds unsupported dtypes.
    """
    index = index or open_index(folder, allow_bytes=True)
    states = [name for name in index.tensors if _STATE in name]
    if not states:
        check_types(index.tensors.values(), where=folder)
        return BaseOnDisk(index, {})
    if quant != "nf4":
        raise ConfigError(
            f"model.quant: {quant}, and {folder} holds {len(states):,} weights that are quantized already, in NF4 by "
            "bitsandbytes. Set model.quant to nf4, or use the model's unquantized folder."
        )
    nf4, faults = _all_nf4(states, index)
    if faults:
        raise ConfigError(
            f"{folder} holds weights quantized by bitsandbytes in an unsupported way (supported is NF4 in blocks of "
            f"{BLOCK} weights, with absmax in fp32 or double-quantized). Use the model's unquantized folder.\n  "
            + first_few(faults)
        )
    tensors = {name: tensor for name, tensor in index.tensors.items() if not _belongs(name, nf4)}
    check_types(tensors.values(), where=folder)
    for name, weight in nf4.items():
        tensors[name] = replace(weight.codes, dtype=NF4_ON_DISK, shape=weight.shape)
    return BaseOnDisk(replace(index, tensors=tensors), nf4)


def _all_nf4(states: Iterable[str], index: WeightIndex) -> tuple[dict[str, Nf4OnDisk], list[str]]:
    nf4: dict[str, Nf4OnDisk] = {}
    faults: list[str] = []
    for state in states:
        weight, _, kind = state.partition(_STATE)
        settings = _read_state(index.tensors[state])
        fault = _unsupported(settings, kind=kind)
        if fault is None:
            nf4[weight] = _nf4_on_disk(weight, settings, index=index)
            fault = _unsupported_levels(_part(index, f"{weight}.quant_map", "F32", num_bytes=4 * len(LEVELS)))
        if fault is not None:
            faults.append(f"{weight}: {fault}")
    return nf4, faults


def _unsupported(settings: Mapping[str, Any], *, kind: str) -> str | None:
    """Why a weight's quantization is not supported; None where it is."""
    if kind != "nf4" or settings.get("quant_type") != "nf4":
        return f"quant_type {settings.get('quant_type', kind)!r}"
    if settings.get("blocksize") != BLOCK:
        return f"blocksize {settings.get('blocksize')!r}"
    if "nested_offset" in settings and settings.get("nested_dtype") != "float32":
        return f"nested_dtype {settings.get('nested_dtype')!r}"
    shape = settings.get("shape")
    if isinstance(shape, list) and len(shape) == 2 and type(shape[1]) is int and shape[1] % BLOCK:
        return f"rows of {shape[1]:,} weights, which share blocks"
    return None


def _unsupported_levels(quant_map: TensorOnDisk) -> str | None:
    levels = _read(quant_map, first=0, count=len(LEVELS))
    if torch.equal(levels, torch.tensor(LEVELS, dtype=torch.float32, device="cpu")):
        return None
    return f"levels {[round(level, 4) for level in levels.tolist()[:4]]}... in its quant_map"


def _nf4_on_disk(weight: str, settings: Mapping[str, Any], *, index: WeightIndex) -> Nf4OnDisk:
    """The parts of one weight, each checked to have the type and the bytes that the weight's shape asks for."""
    state = index.tensors[f"{weight}{_STATE}nf4"]
    shape = settings.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise _damaged(state, f"shape is {shape!r}, and two sizes were expected")
    rows, width = shape
    # The codes may be stored as any dtype (bnb_4bit_quant_storage): they are bytes all the same.
    codes = replace(_part(index, weight, None, num_bytes=rows * width // 2), dtype="U8", shape=(rows, width // 2))
    blocks = rows * width // BLOCK
    nested = None
    if "nested_offset" in settings:
        nested = _nested(weight, settings, index=index, blocks=blocks)
    dtype, item_bytes = ("F32", 4) if nested is None else ("U8", 1)
    absmax = _part(index, f"{weight}.absmax", dtype, num_bytes=item_bytes * blocks)
    return Nf4OnDisk(weight, (rows, width), codes, replace(absmax, shape=(rows, width // BLOCK)), nested)


def _nested(weight: str, settings: Mapping[str, Any], *, index: WeightIndex, blocks: int) -> NestedAbsmax:
    state = index.tensors[f"{weight}{_STATE}nf4"]
    block, offset = settings.get("nested_blocksize"), settings["nested_offset"]
    if type(block) is not int or block < 1:
        raise _damaged(state, f"nested_blocksize is {block!r}, and a whole number above 0 was expected")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise _damaged(state, f"nested_offset is {offset!r}, and a number was expected")
    scales = _part(index, f"{weight}.nested_absmax", "F32", num_bytes=4 * -(-blocks // block))
    levels = _part(index, f"{weight}.nested_quant_map", "F32", num_bytes=4 * 256)
    return NestedAbsmax(scales, levels, block, float(offset))


def _part(index: WeightIndex, name: str, dtype: str | None, *, num_bytes: int) -> TensorOnDisk:
    tensor = index.tensors.get(name)
    if tensor is None:
        raise WeightsError(
            f"{index.folder} lacks {name}, without which a quantized weight can't be read. Fetch the weights again."
        )
    if dtype not in (None, tensor.dtype) or tensor.num_bytes != num_bytes:
        actual = f"it has {tensor.num_bytes:,} bytes of {tensor.dtype}"
        raise _damaged(tensor, f"{actual}, and {num_bytes:,} of {dtype or 'any type'} were expected")
    return replace(tensor, shape=(math.prod(tensor.shape),))


def _read_state(state: TensorOnDisk) -> dict[str, Any]:
    if state.dtype != "U8" or not 0 < state.num_bytes <= _MAX_STATE_BYTES:
        raise _damaged(state, f"it has {state.num_bytes:,} bytes of {state.dtype}, and JSON in bytes was expected")
    flat = replace(state, shape=(state.num_bytes,))
    try:
        settings = json.loads(_read(flat, first=0, count=state.num_bytes).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(state, f"it is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise _damaged(state, "a JSON object was expected")
    return settings


def _belongs(name: str, weights: Mapping[str, object]) -> bool:
    """Whether a tensor is a quantized weight or one of its parts: ``X.weight``, ``X.weight.absmax``."""
    stem, marker, _ = name.rpartition(".weight.")
    return name in weights or f"{stem}.weight" in weights if marker else name in weights


def _dequantize_absmax(absmax: Tensor, *, nested: NestedAbsmax, first: int) -> Tensor:
    """fp32 of ``absmax`` uint8 of any shape, whose first byte is byte ``first`` of the whole absmax."""
    first_block, end_block = first // nested.block, -(-(first + absmax.numel()) // nested.block)
    levels = _read(nested.levels, first=0, count=256)
    scales = _read(nested.scales, first=first_block, count=end_block - first_block)
    values = levels.index_select(0, absmax.view(-1).int())
    skipped = first - first_block * nested.block
    values *= scales.repeat_interleave(nested.block)[skipped : skipped + len(values)]
    values += nested.offset
    return values.view(absmax.shape)


def _read(tensor: TensorOnDisk, *, first: int, count: int) -> Tensor:
    """Rows ``first`` to ``first + count``, in new memory."""
    reader = SliceReader(max_slice_bytes=count * (tensor.num_bytes // tensor.shape[0]))
    with open_weights(tensor.file) as descriptor:
        for _, rows in reader.slices(tensor, descriptor=descriptor, first_row=first, num_rows=count):
            return rows
    return torch.empty((0, *tensor.shape[1:]), dtype=torch.float32 if tensor.dtype == "F32" else torch.uint8)


def _damaged(tensor: TensorOnDisk, problem: str) -> WeightsError:
    return WeightsError(f"{tensor.file} is damaged: {tensor.name}: {problem}. Fetch it again.")
