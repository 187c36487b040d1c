"""The singular values of an adapter's changes dW = scale B A, without a dW in memory, and the norms of what they change.

Letters: R LoRA rank, D_in and D_out a linear's widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_lora.base.index import by_file, open_index, open_weights
from dist_lora.base.norms import Squares, norm_of, squares_of
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.stream import SLICE_BYTES, SliceReader
from dist_lora.config.schema import ModuleAdapter
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.lora.adapter_reader import AdapterOnDisk
from dist_lora.lora.origin import BaseIdentity, identify_base
from dist_lora.text import first_few


def singular_values(first: Tensor, second: Tensor, *, scale: float) -> list[float]:
    """Those of ``scale B A``, R of them, the largest first.

    B = Q_B R_B and A^T = Q_A R_A have orthonormal Q, so that the singular values are those of the R x R matrix
    ``scale R_B R_A^T``: O((D_in + D_out) R^2) in fp64, which loses nothing of fp32's products.

    Args:
        first: A ``(R, D_in)``, finite.
        second: B ``(D_out, R)``, finite.
    """
    _, of_second = torch.linalg.qr(second.detach().double(), mode="r")
    _, of_first = torch.linalg.qr(first.detach().double().T, mode="r")
    values: list[float] = torch.linalg.svdvals(scale * of_second @ of_first.T).tolist()
    # A linear narrower than R has fewer, and the others are zero.
    return values + [0.0] * (len(first) - len(values))


def spectra(tensors: Mapping[str, Tensor], modules: Iterable[ModuleAdapter]) -> dict[str, list[float]]:
    """The singular values of each module's change, by its name.

    Args:
        tensors: ``<module>.lora_A`` ``(R, D_in)`` and ``<module>.lora_B`` ``(D_out, R)``, on any device.
    """
    return {
        module.name: singular_values(
            tensors[f"{module.name}.lora_A"], tensors[f"{module.name}.lora_B"], scale=module.scale
        )
        for module in modules
    }


def spectra_on_disk(adapter: AdapterOnDisk) -> dict[str, list[float]]:
    """``spectra`` of an adapter's folder, read one pair at a time.

    Raises:
        AdapterError: the file can't be read, or a value is NaN or infinite.
    """
    return {
        name: singular_values(*adapter.read_pair(name), scale=module.scale) for name, module in adapter.modules.items()
    }


def norms_on_disk(
    adapter: AdapterOnDisk, base: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """The norms of the weights that an adapter changes, from the files of its base; of NF4 those of its values.

    Reads these weights once, a slice of 64 MiB at a time; needs no GPU.

    Args:
        on_progress: called after each slice with (bytes done, total bytes), as of fp32.

    Raises:
        ConfigError: the adapter was trained on another model, or has other widths than its weights.
        WeightsError: a file is damaged, or a weight isn't finite.
    """
    on_disk = open_base_on_disk(base, quant="nf4", index=open_index(base, allow_bytes=True))
    _check_base(adapter, base, shapes={name: tensor.shape for name, tensor in on_disk.index.tensors.items()})
    tensors = [on_disk.index.tensors[f"{module}.weight"] for module in adapter.pairs]
    total, done, norms = sum(4 * tensor.shape[0] * tensor.shape[1] for tensor in tensors), 0, {}
    reader = SliceReader()
    for file, of_file in by_file(tensors):
        with open_weights(file) as descriptor:
            for tensor in of_file:
                squares = Squares()
                for _, rows in on_disk.values(
                    tensor, reader=reader, descriptor=descriptor, max_slice_bytes=SLICE_BYTES
                ):
                    squares += squares_of(rows)
                    done += 4 * rows.numel()
                    if on_progress:
                        on_progress(done, total)
                norm = norm_of([squares], num_rows=tensor.shape[0])
                if norm is None:
                    raise WeightsError(f"{tensor.file}: {tensor.name} holds NaN or infinity. Fetch it again.")
                norms[tensor.name.removesuffix(".weight")] = norm
    return norms


def _check_base(adapter: AdapterOnDisk, base: Path, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
    here: BaseIdentity = identify_base(base)
    differing = adapter.base.differences(here)
    if differing:
        raise ConfigError(
            f"{adapter.folder} was trained on {adapter.base.name or 'another model'}, and {base} differs from it "
            f"({'; '.join(differing)}). Name the model that it was trained on: --base MODEL"
        )
    faults = []
    for module, (first, second) in adapter.pairs.items():
        found, expected = shapes.get(f"{module}.weight"), (second.shape[0], first.shape[1])
        if found != expected:
            faults.append(f"{module}.weight is {found or 'missing'}, and B A {expected}")
    if faults:
        raise ConfigError(f"{adapter.folder} doesn't fit {base}: {first_few(faults)}. Name its own base: --base MODEL")
