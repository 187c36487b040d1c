"""Linears that share their input, with their LoRA adapters: ``y = h W^T + scale (h A^T) B^T`` for each; W is frozen or trained.

One autograd function computes a group (q, k, v; o; gate, up; down) and its whole backward. Saved are the tensors that
``h`` is computed of, ``h A^T`` and weights; the gradient of ``h`` is added up in place, product by product, and the residual
stream passes through the function, so that its gradient is added to in the norm's own backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_lora.base.before import Before, Made, Nothing, RMSNorm, UseH
from dist_lora.base.quant.formats import Format, Plain
from dist_lora.base.trained import TrainedWeight
from dist_lora.profile.parts import mark

# T tokens, D_in and D_out of a linear, R LoRA rank, S the sum of the ranks of a group


class Adapter(Protocol):
    """What a linear needs of the adapter on it: A ``(R, D_in)``, B ``(D_out, R)``."""

    @property
    def lora_A(self) -> Tensor: ...
    @property
    def lora_B(self) -> Tensor: ...
    @property
    def scale(self) -> float: ...
    @property
    def active_dropout(self) -> float:
        """The probability by which a number of the input is dropped; 0 outside of training."""
        ...

    def __call__(self, step: Callable[..., Any], *inputs: Tensor) -> Any:
        """``step(*inputs)``, while A and B are whole on this rank."""
        ...


class FrozenLinear(nn.Module):
    """A linear of the base, ``(D_out, D_in)``; ``adapter`` is the LoRA adapter on it, if any.

    Its weight is stored in the parts of ``fmt``, each an ordinary frozen parameter: ``weight``, or codes and scales. One that
    is trained has no part, and ``trained`` instead.
    """

    def __init__(self, in_features: int, out_features: int, fmt: Format) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.fmt = fmt
        for part in fmt.parts(out_features, in_features):
            values = torch.empty(part.shape, dtype=part.dtype)
            self.register_parameter(part.name, nn.Parameter(values, requires_grad=False))
        self.adapter: Adapter | None = None
        self.trained: TrainedWeight | None = None

    def unfreeze(self) -> TrainedWeight:
        """Have the weight trained, which isn't quantized and has no adapter: in place of the frozen one, and without values."""
        assert isinstance(self.fmt, Plain) and self.adapter is None
        self.trained, self.weight = TrainedWeight((self.out_features, self.in_features)), None
        self.fmt = Plain(torch.float32)
        return self.trained

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D_out)`` of ``x`` ``(T, D_in)``."""
        return linears_of(Nothing(), (x,), [self])[0]

    def parts(self) -> dict[str, Tensor]:
        """The parameters that store the weight, by name: frozen, or the trained one."""
        if self.trained is not None:
            return {"weight": self.trained.weight}
        return {name: p for name, p in self._parameters.items() if p is not None}


def linears_of(
    before: Before, inputs: tuple[Tensor, ...], linears: Sequence[FrozenLinear], *, norm: RMSNorm | None = None
) -> tuple[Tensor, ...]:
    """``(T, D_out)`` of each linear; all have the input ``(T, D_in)`` that ``before`` makes of ``inputs``.

    Last the residual stream, where ``before`` has one.

    Args:
        norm: whose weight is the last input of ``before``.
    """
    step: Callable[..., tuple[Tensor, ...]] = functools.partial(_step, before, linears, norm)
    for linear in reversed(linears):
        for module in (linear.adapter, linear.trained):
            if module is not None:
                step = functools.partial(module, step)
    if norm is not None and norm.trained is not None:
        step = functools.partial(norm.trained, step)
    return step(*inputs)


def _step(before: Before, linears: Sequence[FrozenLinear], norm: RMSNorm | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    if norm is not None:
        inputs = (*inputs, norm.scale(inputs[0].dtype))
    group = _Group(before, len(inputs), tuple(_spec(linear) for linear in linears))
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    parts = [linear.parts() for linear in linears]
    with torch.no_grad():
        made = before(*inputs)
        h = made.h.detach()
    outputs: tuple[Tensor, ...] = _Linears.apply(  # type: ignore[no-untyped-call]
        group,
        made._replace(h=h),
        *inputs,
        *(adapter.lora_A for adapter in adapters),
        *(adapter.lora_B for adapter in adapters),
        *(part for of_linear in parts for part in of_linear.values()),
    )
    # After the function has saved everything: a recomputation ends once the last tensor of its layer is saved, and so
    # never comes to the frozen product of the last linear, whose result no backward needs.
    with torch.no_grad():
        for linear, of_linear, y in zip(linears, parts, outputs, strict=False):
            weight = _dense(linear.fmt, of_linear, h.dtype).t()
            with mark("frozen matmuls"):
                if linear.adapter is None:
                    torch.mm(h, weight, out=y.detach())
                else:
                    y.detach().addmm_(h, weight)
            del weight  # before the next one is dequantized
    return outputs


def _dense(fmt: Format, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight ``(D_out, D_in)``."""
    with mark("dequantizing"):
        return fmt.dequantize(parts, dtype)


@dataclass(frozen=True)
class _Spec:
    """What a group knows of one linear. ``rank`` is 0 without an adapter; ``trained``: the dtype of a weight that is trained itself."""

    fmt: Format
    parts: tuple[str, ...]
    trained: torch.dtype | None
    out_features: int
    rank: int
    scale: float
    dropout: float


def _spec(linear: FrozenLinear) -> _Spec:
    adapter, names = linear.adapter, tuple(linear.parts())
    if adapter is None:
        trained = None if linear.trained is None else linear.trained.weight.dtype
        return _Spec(linear.fmt, names, trained, linear.out_features, 0, 0.0, 0.0)
    rank = adapter.lora_A.shape[0]
    return _Spec(linear.fmt, names, None, linear.out_features, rank, adapter.scale, adapter.active_dropout)


@dataclass(frozen=True)
class _Group:
    """Linears of one input, and how the tensors that belong to them follow one another."""

    before: Before
    num_inputs: int
    linears: tuple[_Spec, ...]

    @property
    def adapted(self) -> list[tuple[int, _Spec]]:
        """The linears that have an adapter, by their place in the group."""
        return [(place, spec) for place, spec in enumerate(self.linears) if spec.rank]

    @property
    def uses_h(self) -> bool:
        """Whether a gradient of what is trained needs ``h``."""
        return any(spec.rank or spec.trained for spec in self.linears)

    @property
    def ranks(self) -> list[int]:
        return [spec.rank for _, spec in self.adapted]

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of the inputs and what follows: those that are trained (each A, each B), and the parts of the weights."""
        num_trained = 2 * len(self.adapted)
        tensors = tensors[self.num_inputs :]
        return tensors[:num_trained], tensors[num_trained:]

    def cast(self, trained: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Each A and each B in ``dtype``: themselves, or copies one after the other in one tensor."""
        return tuple(trained) if all(tensor.dtype == dtype for tensor in trained) else (_flat(trained, dtype),)

    def stacked(self, cast: Sequence[Tensor], width: int) -> tuple[Tensor, list[Tensor]]:
        """All A as one ``(S, D_in)`` of ``width`` D_in, and each B ``(D_out, R)``."""
        ranks = self.ranks
        if len(cast) == 2 * len(ranks):
            all_a = list(cast[: len(ranks)])
            return (all_a[0] if len(all_a) == 1 else torch.cat(all_a)), list(cast[len(ranks) :])
        shapes = [(spec.out_features, spec.rank) for _, spec in self.adapted]
        first, *rest = torch.split(cast[0], [sum(ranks) * width, *(rows * rank for rows, rank in shapes)])
        return first.view(sum(ranks), width), [flat.view(shape) for flat, shape in zip(rest, shapes, strict=True)]


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All numbers of some tensors in ``dtype``, one after the other: on a GPU in one kernel."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    copies = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(copies, [tensor.reshape(-1) for tensor in tensors])
    return flat


class _Linears(torch.autograd.Function):
    """The adapters' part of each output, to which the frozen product is added after; and the backward of both."""

    @staticmethod
    def forward(ctx: Any, group: _Group, made: Made, *tensors: Tensor) -> tuple[Tensor, ...]:
        h, (trained, parts) = made.h, group.split(tensors)
        outputs = [h.new_empty(h.shape[0], spec.out_features) for spec in group.linears]
        needs_d_h = any(ctx.needs_input_grad[2 : 2 + group.num_inputs])
        saved: list[Tensor] = []
        if group.adapted:
            with mark("LoRA"):
                cast = group.cast(trained, h.dtype)
                all_a, all_b = group.stacked(cast, h.shape[1])
                low, masks = _project_down(group, h, all_a)
                columns = torch.split(low, group.ranks, dim=1)
                for (place, spec), of_low, b in zip(group.adapted, columns, all_b, strict=True):
                    outputs[place].addmm_(of_low, b.t(), beta=0, alpha=spec.scale)
            saved = [low, *masks, *cast]
            ctx.num_masks, ctx.num_cast, ctx.width = len(masks), len(cast), h.shape[1]
            ctx.trained_dtype = trained[0].dtype
        # What h is made of is needed for its gradient; without one, h itself is less.
        ctx.group, ctx.before = group, group.before if needs_d_h else Nothing()
        made_of = made.saved if needs_d_h else (h,)
        has_use = group.uses_h or not isinstance(ctx.before, Nothing)
        ctx.num_made_of = len(made_of) if has_use else 0
        ctx.save_for_backward(*(made_of if has_use else ()), *saved, *(parts if needs_d_h else ()))
        if made.stream is None:
            return tuple(outputs)
        stream = made.stream.detach()  # where it is an input, autograd would make a view of it, of which FSDP2 warns
        if not needs_d_h:
            ctx.mark_non_differentiable(stream)
        return (*outputs, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        saved = ctx.saved_tensors  # read once: a checkpoint refuses a second time
        made_of, rest = saved[: ctx.num_made_of], list(saved[ctx.num_made_of :])
        needs_d_h = any(ctx.needs_input_grad[2 : 2 + group.num_inputs])
        d_outputs, d_stream = d_outputs[: len(group.linears)], (*d_outputs, None)[len(group.linears)]
        d_inputs: tuple[Tensor | None, ...] = (None,) * group.num_inputs
        d_h: Tensor | None = None
        d_a: list[Tensor] = []
        d_b: list[Tensor] = []
        d_weights: dict[int, Tensor] = {}
        if group.adapted:
            low, masks = rest[0], rest[1 : 1 + ctx.num_masks]
            cast, rest = rest[1 + ctx.num_masks :][: ctx.num_cast], rest[1 + ctx.num_masks + ctx.num_cast :]
            with mark("LoRA"):
                all_a, all_b = group.stacked(cast, ctx.width)
                d_low, d_b = _through_b(group, d_outputs, low, all_b)
                d_h = _through_a(group, d_low, all_a, masks) if needs_d_h else None

        def gradients_from(h: Tensor) -> None:
            if group.adapted:
                with mark("LoRA"):
                    d_a.extend(_gradients_of_a(group, d_low, h, masks))
            for place, spec in enumerate(group.linears):
                if spec.trained:
                    with mark("weight gradients"):
                        d_weights[place] = (d_outputs[place].t() @ h).to(spec.trained)

        use_h: UseH | None = gradients_from if group.uses_h else None
        if needs_d_h:
            d_h = _through_weights(group, d_outputs, rest, d_h)
            # The last that is computed: h is there only while the gradients that need it are.
            d_inputs = ctx.before.backward(d_h, d_stream, *made_of, use_h=use_h)
        elif use_h is not None:
            use_h(made_of[0])
        d_trained = _as_trained((*d_a, *d_b), ctx.trained_dtype) if group.adapted else []
        d_parts = [d_weights.get(place) for place, spec in enumerate(group.linears) for _ in spec.parts]
        return (None, None, *d_inputs, *d_trained, *d_parts)


def _as_trained(gradients: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Gradients in the dtype of what is trained."""
    if all(gradient.dtype == dtype for gradient in gradients):
        return gradients
    flat = torch.split(_flat(gradients, dtype), [gradient.numel() for gradient in gradients])
    return [copy.view(gradient.shape) for copy, gradient in zip(flat, gradients, strict=True)]


def _project_down(group: _Group, h: Tensor, all_a: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``h A^T`` ``(T, S)`` of all adapters, and the masks of those with dropout: each draws its own."""
    if not any(spec.dropout for _, spec in group.adapted):
        return h @ all_a.t(), []
    low, masks = h.new_empty(h.shape[0], sum(group.ranks)), []
    columns = torch.split(low, group.ranks, dim=1)
    for (_, spec), a, of_low in zip(group.adapted, torch.split(all_a, group.ranks), columns, strict=True):
        dropped = h
        if spec.dropout:
            # F.dropout calls it on a GPU only: elsewhere its mask would have x's dtype instead of a byte per number.
            dropped, mask = torch.native_dropout(h, spec.dropout, True)
            masks.append(mask)
        torch.mm(dropped, a.t(), out=of_low)
    return low, masks


def _through_b(
    group: _Group, d_outputs: Sequence[Tensor], low: Tensor, all_b: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of ``h A^T`` ``(T, S)``, and that of each B."""
    d_low, d_b = torch.empty_like(low), []
    columns = zip(torch.split(low, group.ranks, dim=1), torch.split(d_low, group.ranks, dim=1), strict=True)
    for (place, spec), (of_low, d_of_low), b in zip(group.adapted, columns, all_b, strict=True):
        d_y = d_outputs[place]
        d_of_low.addmm_(d_y, b, beta=0, alpha=spec.scale)
        d_b.append(torch.empty_like(b).addmm_(d_y.t(), of_low, beta=0, alpha=spec.scale))
    return d_low, d_b


def _gradients_of_a(group: _Group, d_low: Tensor, h: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
    if not masks:
        return list(torch.split(d_low.t() @ h, group.ranks))
    of_masks = iter(masks)
    gradients = []
    for (_, spec), d_of_low in zip(group.adapted, torch.split(d_low, group.ranks, dim=1), strict=True):
        dropped = (h * next(of_masks)).mul_(1 / (1 - spec.dropout)) if spec.dropout else h
        gradients.append(d_of_low.t() @ dropped)
    return gradients


def _through_a(group: _Group, d_low: Tensor, all_a: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The gradient of h ``(T, D_in)`` from the adapters."""
    if not masks:
        return d_low @ all_a
    of_masks = iter(masks)
    d_h: Tensor | None = None
    columns = torch.split(d_low, group.ranks, dim=1)
    for (_, spec), d_of_low, a in zip(group.adapted, columns, torch.split(all_a, group.ranks), strict=True):
        d_dropped = d_of_low @ a
        if spec.dropout:
            d_dropped.mul_(next(of_masks)).mul_(1 / (1 - spec.dropout))
        d_h = d_dropped if d_h is None else d_h.add_(d_dropped)
    assert d_h is not None
    return d_h


def _through_weights(group: _Group, d_outputs: Sequence[Tensor], parts: Sequence[Tensor], d_h: Tensor | None) -> Tensor:
    """The gradient of h from the frozen matmuls, added to ``d_h``. Each weight is dequantized, used and freed."""
    of_parts = iter(parts)
    for spec, d_y in zip(group.linears, d_outputs, strict=True):
        weight = _dense(spec.fmt, {name: next(of_parts) for name in spec.parts}, d_y.dtype)
        with mark("frozen matmuls"):
            d_h = d_y @ weight if d_h is None else d_h.addmm_(d_y, weight)
        del weight
    assert d_h is not None
    return d_h
