"""A base's shape as its files have it, where config.json says otherwise: the files decide, and each difference is named.

What transformers 5.23 does is done here too: a head of its own that differs from the embedding stays its own though
config.json ties them (``PreTrainedModel.tie_weights``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dist_lora.base.index import TensorOnDisk, WeightIndex, open_weights
from dist_lora.base.quant.published import NF4_ON_DISK, BaseOnDisk
from dist_lora.base.stream import SliceReader
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.layout.choices import DtypeName
from dist_lora.text import first_few

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 1024
_DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BITS: Mapping[str, int] = {"F32": 23, "BF16": 7, "F16": 10}  # of the fraction


def has_own_head(index: WeightIndex) -> bool:
    """Whether the files hold a head that differs from the embedding. Reads both, once, where they hold a head at all.

    Raises:
        WeightsError: a file can't be read.
    """
    embedding, head = index.tensors.get(EMBEDDING), index.tensors.get(HEAD)
    if head is None or embedding is None:
        return False
    if embedding.shape != head.shape or NF4_ON_DISK in (embedding.dtype, head.dtype):
        return True
    with open_weights(embedding.file) as of_embedding, open_weights(head.file) as of_head:
        pairs = zip(
            _reader(embedding).slices(embedding, descriptor=of_embedding),
            _reader(head).slices(head, descriptor=of_head),
            strict=True,
        )
        return not all(torch.equal(one.float(), other.float()) for (_, one), (_, other) in pairs)


def _reader(tensor: TensorOnDisk) -> SliceReader:
    """Reads slices of as many rows, whatever the dtype."""
    return SliceReader(max_slice_bytes=_ROWS_AT_ONCE * tensor.num_bytes // tensor.shape[0])


def stored_base(shape: Shape, on_disk: BaseOnDisk, *, own_head: bool) -> tuple[Shape, BaseOnDisk]:
    """The shape with what only the files know, and the files with a head that serves as the embedding too.

    Args:
        shape: that of config.json.
        own_head: ``has_own_head`` of the files.

    Raises:
        ConfigError: what is quantized on disk is no linear of a layer.
    """
    linears = {f"{name}.weight" for name in shape.linear_names()}
    foreign = [name for name in on_disk.nf4 if name not in linears]
    if foreign:
        raise ConfigError(
            f"{on_disk.index.folder} holds weights in NF4 that are no linears of its {shape.num_layers} layers: "
            f"{first_few(foreign)}. Use the model's unquantized folder."
        )
    if shape.tied and own_head:
        shape = replace(shape, tied=False)
    tensors = on_disk.index.tensors
    if shape.tied and HEAD in tensors and EMBEDDING not in tensors:  # transformers ties whichever there is
        moved = {**tensors, EMBEDDING: replace(tensors[HEAD], name=EMBEDDING)}
        on_disk = replace(on_disk, index=replace(on_disk.index, tensors=moved))
    unquantized = frozenset[str]()
    if on_disk.nf4:
        unquantized = frozenset(name for name in shape.linear_names() if f"{name}.weight" not in on_disk.nf4)
    return replace(shape, unquantized=unquantized), on_disk


def stored_remarks(config: Mapping[str, Any], stated: Shape, stored: Shape, on_disk: BaseOnDisk) -> list[str]:
    """A sentence on each statement of config.json that the files contradict."""
    remarks = []
    if stated.tied and not stored.tied:
        remarks.append(
            "tie_word_embeddings is true, and lm_head.weight in the files differs from the embedding: the head is not "
            "tied, as in transformers. Set tie_word_embeddings to false"
        )
    if on_disk.nf4 and not config.get("quantization_config"):
        remarks.append(f"quantization_config is missing, and the files hold {len(on_disk.nf4):,} linears in NF4")
    listed = sorted(stated.unquantized - stored.unquantized) if on_disk.nf4 else []
    if listed:
        remarks.append(f"llm_int8_skip_modules lists {len(listed):,} linears that are in NF4: {first_few(listed)}")
    return remarks


def unquantized_line(shape: Shape) -> str:
    """How many linears were published unquantized, for the log."""
    names = sorted(shape.unquantized)
    return (
        f"{len(names):,} of {7 * shape.num_layers:,} linears were published unquantized and stay so: {first_few(names)}"
    )


def refuse_unquantized(config: Mapping[str, Any], on_disk: BaseOnDisk) -> None:
    """Raise ``ConfigError`` where config.json says that the weights are quantized, and none of the files' are."""
    if config.get("quantization_config") and not on_disk.nf4:
        raise ConfigError(
            f"{on_disk.index.folder / 'config.json'}: quantization_config: found weights quantized by bitsandbytes, and "
            "no weight in the files is. If they are the unquantized ones, remove quantization_config; model.quant: nf4 "
            "quantizes them as they are read"
        )


def dtype_remarks(config: Mapping[str, Any], on_disk: BaseOnDisk, *, dtype: DtypeName) -> list[str]:
    """A sentence where weights are rounded to the run's dtype, or where config.json or the files contradict themselves.

    Args:
        dtype: of the run.
    """
    counts = Counter(tensor.dtype for tensor in on_disk.index.tensors.values() if tensor.dtype in _DTYPES)
    held = ", ".join(f"{count:,} tensors in {_DTYPES[kind]}" for kind, count in counts.most_common())
    stated = config.get("dtype") or config.get("torch_dtype")
    remarks = []
    lossy = sum(count for kind, count in counts.items() if _BITS[kind] > _BITS[{"bf16": "BF16", "fp32": "F32"}[dtype]])
    if lossy:
        remarks.append(f"the files hold {held}; {lossy:,} of them are rounded to {dtype} (model.dtype)")
    elif len(counts) > 1:
        remarks.append(f"the files hold {held}; all are converted to {dtype}, without loss")
    if isinstance(stated, str) and stated != "auto" and counts and stated not in {_DTYPES[kind] for kind in counts}:
        remarks.append(f"dtype is {stated}, and the files hold {held}: they are read as they are")
    return remarks
