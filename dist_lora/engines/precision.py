"""The dtype of each part of a run: declared once, logged at the start, checked at the start and the end of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_lora.base.llama import Llama
from dist_lora.base.quant.formats import Format, Plain
from dist_lora.engines.adapters import Adapters
from dist_lora.errors import TrainingError
from dist_lora.layout.choices import DtypeName
from dist_lora.text import count, first_few

TORCH_TYPES: Mapping[DtypeName, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
TRAINED = torch.float32  # adapters, the sum of their gradients, AdamW's moments


def set_products(*, is_deterministic: bool) -> None:
    """Have this process sum products in fp32 and, if asked, repeat them bit for bit; call it before the GPU is used.

    cuBLAS may otherwise add up parts of a bf16 product in bf16 (torch 2.13): the head's second one has a term per token of
    the vocabulary. Deterministic kernels (``train.deterministic``) are slower: flash attention's backward adds without atomics.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all of it is written
    if torch.are_deterministic_algorithms_enabled() != is_deterministic:
        # It imports torch.compile, which takes as long as all other imports.
        torch.use_deterministic_algorithms(is_deterministic)


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run: ``fmt`` of the layers' linears, ``dtype`` of all else in the base.

    The linears of ``unquantized`` are in ``dtype`` too, as they were published.

    Products and activations are computed in ``dtype``; the loss, the norms' statistics, the adapters, their gradients
    over all ranks and AdamW's moments are fp32 whatever the base is.
    """

    fmt: Format
    dtype: torch.dtype
    unquantized: frozenset[str] = frozenset()

    def line(self) -> str:
        """The dtypes of all parts, as logged at the start."""
        dtype = _short(self.dtype)
        base = f"{dtype} (not quantized)"
        if self.fmt.name != "none":
            also = f"{len(self.unquantized):,} linears, " if self.unquantized else ""
            parts = ", ".join(f"{part.name} {_short(part.dtype)}" for part in self.fmt.parts(64, 64))
            base = f"{self.fmt.name} ({parts}; {also}embeddings, norms and head {dtype})"
        return f"dtypes: base {base}, compute {dtype}, adapters and AdamW {_short(TRAINED)}"

    def check(self, model: Llama, adapters: Adapters) -> None:
        """Raise ``TrainingError``, naming them, where tensors have another dtype than declared."""
        plain = Plain(self.dtype)
        expected = {
            f"{name}.{part.name}": part.dtype
            for name, linear in model.linears().items()
            for part in (plain if name in self.unquantized else self.fmt).parts(linear.out_features, linear.in_features)
        }
        wrong = [
            f"{name} is {_short(parameter.dtype)}, not {_short(expected.get(name, self.dtype))}"
            for name, parameter in model.base_parameters().items()
            if parameter.dtype != expected.get(name, self.dtype)
        ]
        wrong += [f"{name} has a gradient" for name, p in model.base_parameters().items() if p.grad is not None]
        wrong += [
            f"{tensor.name} is {_short(tensor.parameter.dtype)}, not {_short(TRAINED)}"
            for tensor in adapters.tensors
            if tensor.parameter.dtype != TRAINED
        ]
        if wrong:
            raise TrainingError(
                f"{count(len(wrong), 'tensor does', 'tensors do')}n't have the dtypes that this run declares: {first_few(wrong)}. A library "
                "has cast them; nothing is saved from here on. Compare its version with constraints.txt."
            )


def _short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
