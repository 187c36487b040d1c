"""The table: which kernels an operator starts on CUDA, and the bytes that each loads and stores.

A kernel loads each distinct element of its inputs once and stores each of its results once, whatever the caches do. What CUDA does
otherwise than the meta device, which only knows shapes, is said here and nowhere else. An operator that isn't here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dist_lora.base.kernels import rows_per_program

# M rows, K inputs and N outputs of a product; T tokens, H heads and E width of a head in attention

Kind = Literal["frozen matmuls", "LoRA's matmuls", "attention", "elementwise", "copies", "dequantizing"]
TILE_ROWS = 128  # cuBLAS computes whole tiles: a product with 261 rows of activations takes the time of one with 384


class UnknownOperatorError(Exception):
    """The model calls an operator whose kernels the table doesn't know."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: what it loads and stores, and its floating-point operations where they may bound it."""

    name: str
    kind: Kind
    loaded_bytes: int
    stored_bytes: int
    flops: int = 0

    @property
    def num_bytes(self) -> int:
        """Loaded and stored."""
        return self.loaded_bytes + self.stored_bytes


@dataclass(frozen=True)
class Call:
    """A call of an operator with its result.

    ``is_frozen`` tells whether a tensor is a weight of the base, or made from one; ``documents`` are the lengths of the
    documents that attention sees.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    is_frozen: Callable[[Tensor], bool] = field(default=lambda _: False)
    documents: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The operator's, without its overload: ``aten::mm``."""
        name: str = self.func._schema.name
        return name

    @cached_property
    def _arguments(self) -> list[tuple[Any, list[Tensor]]]:
        given = dict(zip((a.name for a in self.func._schema.arguments), self.args, strict=False)) | dict(self.kwargs)
        return [(a, tensors_of(given[a.name])) for a in self.func._schema.arguments if a.name in given]

    @property
    def read(self) -> list[Tensor]:
        """Every tensor whose values it needs, once."""
        return _distinct(t for argument, tensors in self._arguments if not argument.is_out for t in tensors)

    @property
    def written(self) -> list[Tensor]:
        """Every tensor that it makes or changes, once."""
        changed = (
            t
            for argument, tensors in self._arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tensors
        )
        return _distinct([*changed, *tensors_of(self.result)])

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)
        return default

    def kernel(self, kind: Kind, load: Iterable[Tensor] | None = None, store: Iterable[Tensor] | None = None) -> Kernel:
        """A kernel in one pass: by default it loads all that is read and stores all that is written."""
        return Kernel(
            self.name,
            kind,
            sum(map(bytes_of, self.read if load is None else load)),
            sum(map(bytes_of, self.written if store is None else store)),
        )


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in an argument or a result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: what is expanded along a dim is loaded once."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride else min(size, 1) for size, stride in dims) * tensor.element_size()


def storage_of(tensor: Tensor) -> int:
    """The identity of a tensor's memory while it lives."""
    return int(tensor.untyped_storage()._cdata)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({(storage_of(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


# The rules

Rule = Callable[[Call], list[Kernel]]


def _one_pass(kind: Kind) -> Rule:
    return lambda call: [call.kernel(kind)]


def _fill(call: Call) -> list[Kernel]:
    """Values that don't depend on what was there: stored, nothing loaded."""
    return [call.kernel("copies", load=())]


def _copy(call: Call) -> list[Kernel]:
    """``copy_``, of one tensor or of a list in one kernel: the destination is not loaded."""
    return [call.kernel("copies", load=tensors_of(call.argument("src")))]


def _pick(call: Call) -> list[Kernel]:
    """Chosen rows or elements: of the source only those are loaded."""
    index = call.argument("indices") if call.argument("index") is None else call.argument("index")
    return [call.kernel("copies", load=[*tensors_of(index), *call.written])]


def _put_at(*, adds: bool) -> Rule:
    """Stored at chosen rows or elements, or added to them: of the destination only those are touched."""

    def rule(call: Call) -> list[Kernel]:
        index, out = call.argument("index"), call.written[0]
        values = tensors_of([call.argument("source"), call.argument("src")])  # none where a number is put
        touched = (values[0] if values else index).numel() * out.element_size()
        loaded = sum(map(bytes_of, [index, *values])) + (touched if adds else 0)
        copies = [] if call.name.endswith("_") else [call.kernel("copies", load=[call.argument("self")])]
        return [*copies, Kernel(call.name, "elementwise", loaded, touched)]

    return rule


def _part_of_zeros(call: Call) -> list[Kernel]:
    """The gradient of a slice: zeros of the whole's size, and a copy into their part."""
    gradient = call.argument("grad_output")
    return [
        call.kernel("copies", load=()),
        Kernel(call.name, "copies", bytes_of(gradient), bytes_of(gradient)),
    ]


def _log_sum_exp(call: Call) -> list[Kernel]:
    """Nine kernels, of which four pass over the whole (ReduceOps.cpp): amax, x - amax, exp in place, sum."""
    whole, small = bytes_of(call.argument("self")), bytes_of(call.result)
    passes = [(whole, small), (whole + small, whole), (whole, whole), (whole, small)]
    finite = [(small, small)] * 3  # abs(), == inf and masked_fill_ of the maxima
    return [
        Kernel(call.name, "elementwise", load, store)
        for load, store in [*passes, *finite, (small, small), (2 * small, small)]  # and log_(), add_(amax)
    ]


def _product(call: Call) -> list[Kernel]:
    """A matrix product, or a batch of them, in one kernel (cuBLAS).

    ``addmm`` out of place copies its first argument into the result and adds the product to that; a bias, which has one
    dim, is added in the kernel. A split of K over thread blocks, whose partial sums are small, isn't counted.
    """
    first, second = [t for t in tensors_of(call.args) if t.dim() >= 2][-2:]
    out = call.written[0]
    is_of_frozen = call.is_frozen(first) or call.is_frozen(second)
    rows, inputs, outputs = first.shape[-2], first.shape[-1], second.shape[-1]
    batch = math.prod(first.shape[:-2])
    if is_of_frozen:  # the rows are those of the activations
        rows, outputs = (rows, outputs) if call.is_frozen(second) else (outputs, rows)
        rows = -(-rows // TILE_ROWS) * TILE_ROWS
    added = call.argument("self") if "add" in call.name else None
    copies = []
    if added is not None and call.argument("beta", 1) != 0:
        if added.dim() >= 2 and storage_of(added) != storage_of(out):
            copies = [call.kernel("copies", load=[added], store=[out])]
            added = out
    else:
        added = None
    kernel = Kernel(
        call.name,
        "frozen matmuls" if is_of_frozen else "LoRA's matmuls",
        sum(map(bytes_of, _distinct([first, second, *([] if added is None else [added])]))),
        bytes_of(out),
        2 * batch * rows * inputs * outputs,
    )
    return [*copies, kernel]


def _attention(num_products: int) -> Rule:
    """Flash attention as one kernel: of T x T products per head only the causal half is computed.

    Forward has two products (scores and values), backward five (the scores again, and four gradients).
    Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
    """

    def rule(call: Call) -> list[Kernel]:
        query = call.args[0] if num_products == 2 else call.args[1]
        if sum(call.documents) != query.shape[0]:
            raise UnknownOperatorError(
                f"{call.name}: attends over {query.shape[0]:,} tokens, and the documents given to the counter have "
                f"{sum(call.documents):,}: give it those of the batch."
            )
        pairs = sum(n * n for n in call.documents) // 2
        passes = call.kernel("attention")
        flops = num_products * 2 * query.shape[1] * query.shape[2] * pairs
        return [Kernel(call.name, "attention", passes.loaded_bytes, passes.stored_bytes, flops)]

    return rule


def _adamw(call: Call) -> list[Kernel]:
    """Weight, gradient and both moments are loaded, all but the gradient stored."""
    changed = [t for name in ("self", "exp_avgs", "exp_avg_sqs") for t in call.argument(name)]
    return [call.kernel("elementwise", load=[*changed, *call.argument("grads")], store=changed)]


def _nf4(call: Call) -> list[Kernel]:
    """bitsandbytes' ``kDequantizeBlockwise``: codes and scales loaded, the weight stored (0.5, 1/16 and 2 bytes a weight in bf16)."""
    return [call.kernel("dequantizing", load=[call.argument("codes"), call.argument("absmax")])]


def _norm(call: Call) -> list[Kernel]:
    """The weight is loaded once by each program, all else once."""
    return [_with_weight(call, call.kernel("elementwise"), call.argument("weight"), is_backward=False)]


def _norm_backward(call: Call) -> list[Kernel]:
    """The gradient is overwritten; h, where it is wanted, is stored and not loaded."""
    d_h, x, weight, inverse_rms, d_stream, h = map(
        call.argument, ("d_h", "x", "weight", "inverse_rms", "d_stream", "h")
    )
    kernel = call.kernel(
        "elementwise", load=tensors_of([d_h, x, weight, inverse_rms, d_stream]), store=tensors_of([d_h, h])
    )
    return [_with_weight(call, kernel, weight, is_backward=True)]


def _with_weight(call: Call, kernel: Kernel, weight: Tensor, *, is_backward: bool) -> Kernel:
    programs = -(-len(call.argument("x")) // rows_per_program(len(weight), is_backward=is_backward))
    return replace(kernel, loaded_bytes=kernel.loaded_bytes + (programs - 1) * bytes_of(weight))


def _silu_times_backward(call: Call) -> list[Kernel]:
    """Gate and up are overwritten, and the gradient of h where that is wanted once more."""
    d_h, gate, up, needs_h = map(call.argument, ("d_h", "gate", "up", "needs_h"))
    return [call.kernel("elementwise", load=[d_h, gate, up], store=[gate, up, *([d_h] if needs_h else [])])]


def _rotate(call: Call) -> list[Kernel]:
    """Query and key are overwritten; a token's cosines and sines are loaded once for all heads."""
    return [call.kernel("elementwise", store=[call.argument("query"), call.argument("key")])]


def _cross_entropy(call: Call) -> list[Kernel]:
    """Logits are loaded for the sum, and again for the gradient, which overwrites them; and each label's logit by itself."""
    logits, labels, to_gradient = map(call.argument, ("logits", "labels", "to_gradient"))
    whole, of_labels = bytes_of(logits), labels.numel() * logits.element_size()
    loaded = (2 if to_gradient else 1) * whole + of_labels + bytes_of(labels)
    return [Kernel(call.name, "elementwise", loaded, bytes_of(call.result) + (whole if to_gradient else 0))]


# No kernel: memory is allocated, or seen otherwise.
NOTHING = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view", "detach_", "resize_", "set_", "_reshape_alias"}
)  # fmt: skip
_ELEMENTWISE = (  # beside all that torch tags as pointwise
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "argmax", "linalg_vector_norm", "cumsum", "_softmax", "_softmax_backward_data",
    "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward", "native_dropout", "native_dropout_backward",
    "_foreach_add_", "_foreach_mul_", "_foreach_sub_", "_foreach_div_", "_foreach_norm", "_foreach_sqrt",
)  # fmt: skip
_COPIES = (
    "_to_copy",
    "clone",
    "cat",
    "stack",
    "repeat",
    "repeat_interleave",
    "flip",
    "roll",
    "contiguous",
)
_FILLS = (
    "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_", "zero_", "fill", "zero",
    "arange", "scalar_tensor", "_foreach_zero_",
)  # fmt: skip
_PICKS = ("embedding", "index_select", "gather", "index")
RULES: dict[str, Rule] = {
    **{f"aten::{name}": _one_pass("elementwise") for name in _ELEMENTWISE},
    **{f"aten::{name}": _one_pass("copies") for name in _COPIES},
    **{f"aten::{name}": _fill for name in _FILLS},
    **{f"aten::{name}": _pick for name in _PICKS},
    **{f"aten::{name}": _put_at(adds=True) for name in ("index_add_", "index_add", "scatter_add_", "scatter_add")},
    **{f"aten::{name}": _put_at(adds=False) for name in ("scatter_", "scatter", "index_copy_", "index_copy")},
    **{f"aten::{name}": _part_of_zeros for name in ("slice_backward", "select_backward")},
    **{f"aten::{name}": _product for name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")},
    "aten::copy_": _copy,
    "aten::_foreach_copy_": _copy,
    "aten::logsumexp": _log_sum_exp,
    "aten::_fused_adamw_": _adamw,
    "torch_attn::_varlen_attn": _attention(2),
    "torch_attn::_varlen_attn_backward": _attention(5),
    # Theirs are not the operators that other devices compose them of: see ``norm.py``.
    "aten::_fused_rms_norm": _one_pass("elementwise"),
    "aten::_fused_rms_norm_backward": _one_pass("elementwise"),
    # Operators of ours: what their kernels load and store, whatever their inputs and results are.
    "dist_lora::dequantize_nf4": _nf4,
    "dist_lora::norm": _norm,
    "dist_lora::add_norm": _norm,
    "dist_lora::norm_backward_": _norm_backward,
    "dist_lora::silu_times": _one_pass("elementwise"),
    "dist_lora::silu_times_backward_": _silu_times_backward,
    "dist_lora::rotate_": _rotate,
    "dist_lora::cross_entropy_": _cross_entropy,
}
# Operators of ours that are no kernel of their own: what they call is counted in their place, as the given kind.
COMPOSED: dict[str, Kind] = {"dist_lora::dequantize_int8": "dequantizing"}


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels that a call starts.

    Raises:
        UnknownOperatorError: it isn't in the table; the error names it.
    """
    namespace, _, name = call.name.partition("::")
    if call.func.is_view or namespace in ("profiler", "prim") or (namespace == "aten" and name in NOTHING):
        return []
    if not any(t.numel() for t in call.written):
        return []
    rule = RULES.get(call.name)
    if rule is None and namespace == "aten" and torch.Tag.pointwise in call.func.tags:
        rule = _one_pass("elementwise")
    if rule is None:
        raise UnknownOperatorError(
            f"{call.func}: the model calls this operator, and bench/traffic/cuda.py has no rule for what it loads and stores on "
            "CUDA. Add one to RULES (or to COMPOSED, if it only calls other operators)."
        )
    return rule(call)
