"""Llama as a flat stream of tokens: frozen linears that may carry an adapter, and a loss without all logits in memory.

A micro-batch is one row of T tokens, all its documents one after the other; there is no batch dim and no padding.
Parameters have the names they have in a Hugging Face checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lora.base.attention import Attention
from dist_lora.base.before import RMSNorm, SiluTimes
from dist_lora.base.kernels import operators, plain
from dist_lora.base.linear import FrozenLinear, linears_of
from dist_lora.base.quant.formats import Format, Plain
from dist_lora.base.rope import inverse_frequencies, rotate, rotate_in_place, rotation
from dist_lora.herd.shape import Shape, module_path
from dist_lora.layout.activations import fp32_rows_of_slice, rows_of_slice
from dist_lora.profile.parts import layer as profiled_layer
from dist_lora.profile.parts import mark

# T tokens of a micro-batch, D model width, F feed-forward width, V vocabulary, K rows whose next token is predicted
# H query heads, G key and value heads, E width of a head, N tokens whose rows are trained


class SelfAttention(nn.Module):
    """Self-attention: query and key rotated by their positions (RoPE), attended, and projected back."""

    def __init__(self, shape: Shape, layer: int, formats: Mapping[str, Format]) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = shape.head_dim
        self.q_proj = FrozenLinear(shape.hidden, shape.num_heads * shape.head_dim, formats["q_proj"])
        self.k_proj = FrozenLinear(shape.hidden, shape.num_kv_heads * shape.head_dim, formats["k_proj"])
        self.v_proj = FrozenLinear(shape.hidden, shape.num_kv_heads * shape.head_dim, formats["v_proj"])
        self.o_proj = FrozenLinear(shape.num_heads * shape.head_dim, shape.hidden, formats["o_proj"])
        self.is_fused = False

    def forward(
        self, x: Tensor, norm: RMSNorm, rotary: tuple[Tensor, Tensor], attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """``(T, D)`` of ``x`` ``(T, D)``, which ``norm`` norms first; and ``x``, from which the residual stream goes on."""
        linears = [self.q_proj, self.k_proj, self.v_proj]
        query, key, value, x = linears_of(norm.before(), (x,), linears, norm=norm)
        if self.is_fused:
            query, key = rotate_in_place(query, key, *rotary)
        query, key, value = (heads.view(len(x), -1, self.head_dim) for heads in (query, key, value))
        if not self.is_fused:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        with mark("attention"):
            attended = attention(self.layer, query, key, value)
        return self.o_proj(attended.flatten(-2)), x


class FeedForward(nn.Module):
    """Llama's gated feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, shape: Shape, formats: Mapping[str, Format]) -> None:
        super().__init__()
        self.gate_proj = FrozenLinear(shape.hidden, shape.ffn, formats["gate_proj"])
        self.up_proj = FrozenLinear(shape.hidden, shape.ffn, formats["up_proj"])
        self.down_proj = FrozenLinear(shape.ffn, shape.hidden, formats["down_proj"])
        self.is_fused = False

    def gate_and_up(self, x: Tensor, delta: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        """Gate and up ``(T, F)`` of ``x + delta`` ``(T, D)``, which ``norm`` norms first; and that sum, the residual stream."""
        return linears_of(norm.before(adds=True), (x, delta), [self.gate_proj, self.up_proj], norm=norm)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``(T, D)`` of gate and up."""
        return linears_of(SiluTimes(self.is_fused), (gate, up), [self.down_proj])[0]


class Block(nn.Module):
    """One layer. With ``recompute`` its activations are recomputed in the backward instead of stored."""

    def __init__(self, shape: Shape, layer: int, *, fmt: Format, dtype: torch.dtype) -> None:
        super().__init__()
        formats = {
            linear: Plain(dtype) if module_path(linear, layer=layer) in shape.unquantized else fmt
            for linear in shape.linear_shapes()
        }
        self.self_attn = SelfAttention(shape, layer, formats)
        self.mlp = FeedForward(shape, formats)
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps, dtype)
        self.recompute = False

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """``(T, D)`` of ``x`` ``(T, D)``."""
        if self.recompute and torch.is_grad_enabled():
            # Inside the block's own forward, so that a sharded block is gathered once for both
            # the recomputation and the backward.
            recomputed: Tensor = checkpoint(self._layer, x, rotary, attention, use_reentrant=False)
            return recomputed
        return self._layer(x, rotary, attention)

    def _layer(self, x: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        with profiled_layer():
            delta, x = self.self_attn(x, self.input_layernorm, rotary, attention)
            gate, up, x = self.mlp.gate_and_up(x, delta, self.post_attention_layernorm)
            del delta  # before down's input is there, the widest tensor of all
            result: Tensor = x + self.mlp(gate, up)
        return result


class TrainedRows(Protocol):
    """What embedding and head need of the rows that are trained in place of theirs: ``rows`` ``(N, D)`` in fp32."""

    @property
    def rows(self) -> Tensor: ...
    @property
    def ids(self) -> Tensor:
        """The tokens ``(N,)`` that they belong to, ascending."""
        ...

    def __call__(self, step: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``step(*inputs)``, while the rows are whole on this rank."""
        ...


def _with_rows(trained: TrainedRows, x: Tensor, ids: Tensor) -> Tensor:
    """``x`` ``(T, D)`` with the trained row where a token has one, without asking the device which tokens do."""
    place = torch.searchsorted(trained.ids, ids).clamp_(max=len(trained.ids) - 1)
    # Not rows[place]: on a GPU the backward of that adds by atomics, in any order, and an embedding's sorts.
    rows = F.embedding(place, trained.rows.to(x.dtype))
    return torch.where((trained.ids[place] == ids)[:, None], rows, x)


class Decoder(nn.Module):
    """Embedding, layers and the last norm: everything but the head.

    ``adapter`` has the rows that are trained in place of some of the embedding's, if any. It isn't the embedding's own module, whose
    frozen rows an engine would then gather for the backward too.
    """

    def __init__(self, shape: Shape, *, fmt: Format, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden, dtype=dtype)
        self.embed_tokens.weight.requires_grad_(False)
        self.adapter: TrainedRows | None = None
        self.layers = nn.ModuleList(Block(shape, layer, fmt=fmt, dtype=dtype) for layer in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """``(T, D)`` of ids ``(T,)``."""
        x: Tensor = self.embed_tokens(ids)
        if self.adapter is None:
            return x
        return self.adapter(functools.partial(_with_rows, self.adapter), x, ids)


class Head(nn.Module):
    """From hidden states to the loss over their labels, or to their logits. ``adapter`` has rows that are trained, if any."""

    weight: nn.Parameter

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.hidden, dtype=dtype), requires_grad=False)
        self.is_fused = False
        self.adapter: TrainedRows | None = None

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """Sum of the cross entropy of ``hidden`` ``(K, D)`` over ``labels`` ``(K,)``, an fp32 scalar; or logits."""
        step = self._logits if labels is None else self._loss
        inputs = (hidden,) if labels is None else (hidden, labels)
        return step(*inputs) if self.adapter is None else self.adapter(step, *inputs)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        if self.adapter is not None:
            own = F.linear(hidden, self.adapter.rows.to(hidden.dtype))
            logits = logits.index_copy(1, self.adapter.ids, own)
        return logits.float()

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        trained = () if self.adapter is None else (self.adapter.rows, self.adapter.ids)
        with mark("loss"):
            loss: Tensor = SumOfCrossEntropy.apply(hidden, self.weight, labels, self.is_fused, *trained)  # type: ignore[no-untyped-call]
        return loss


class SumOfCrossEntropy(torch.autograd.Function):
    """Sum over K rows of the cross entropy of ``hidden @ weight.T``, in slices of ``rows_of_slice`` rows.

    All slices of logits have the same memory: the gradient of ``hidden`` is computed in the forward, since the head is
    frozen and the loss is a plain sum. What is saved for the backward is ``(K, D)``. ``rows`` ``(N, D)`` in fp32 are trained in
    place of those of the tokens ``own`` ``(N,)``; their gradient is summed over the slices in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        is_fused: bool = False,
        rows: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        trained = None if rows is None or own is None else _RowsOfHead(rows, own, dtype=hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        vocab = weight.shape[0]
        at_once = min(len(hidden), rows_of_slice(vocab, item_bytes=hidden.element_size()))
        memory = hidden.new_empty((at_once, vocab))
        in_fp32: Tensor | None = None
        if hidden.dtype != torch.float32 and not is_fused:
            in_fp32 = memory.new_empty((min(at_once, fp32_rows_of_slice(vocab)), vocab), dtype=torch.float32)
        to_gradient = gradient is not None
        for first in range(0, len(hidden), max(1, at_once)):
            part = slice(first, first + at_once)
            logits = torch.mm(hidden[part], weight.T, out=memory[: len(hidden[part])])
            if trained is not None:
                trained.write_logits(logits, hidden[part])
            if is_fused:
                losses = operators.cross_entropy_(logits, labels[part, None], to_gradient)
            else:
                losses = plain.cross_entropies(logits, labels[part, None], in_fp32=in_fp32, to_gradient=to_gradient)
            total += losses.sum()
            if gradient is not None:
                of_trained = None if trained is None else trained.take_gradient(logits, hidden[part])
                torch.mm(logits, weight, out=gradient[part])
                if of_trained is not None:
                    gradient[part] += of_trained
        ctx.save_for_backward(gradient, None if trained is None else trained.gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_rows = ctx.saved_tensors
        # By a matrix of one fp32 number: a scalar takes the gradient's dtype, and in 16 bits it is off by up to 0.2 %.
        d_hidden = torch.mul(gradient, d_total.view(1, 1), out=torch.empty_like(gradient))
        return d_hidden, None, None, None, None if of_rows is None else of_rows * d_total, None


class _RowsOfHead:
    """The trained rows ``(N, D)`` of the head within the loss, in its dtype, and their gradient in fp32."""

    def __init__(self, rows: Tensor, ids: Tensor, *, dtype: torch.dtype) -> None:
        self._rows, self._ids = rows.to(dtype), ids
        self.gradient = torch.zeros_like(rows)

    def write_logits(self, logits: Tensor, hidden: Tensor) -> None:
        """Replaces the trained tokens' columns of a slice of logits ``(rows, V)`` of ``hidden`` ``(rows, D)``."""
        logits.index_copy_(1, self._ids, hidden @ self._rows.t())

    def take_gradient(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        """The part of the gradient of ``hidden`` that comes through these rows; adds up their own.

        Their columns of ``d_logits`` are zero then, so that the frozen rows add nothing.
        """
        own = d_logits.index_select(1, self._ids)
        d_logits.index_fill_(1, self._ids, 0.0)
        self.gradient += own.t() @ hidden
        return own @ self._rows


class Llama(nn.Module):
    """A Llama-3 model. Build it with ``build_on_meta``; it holds no weights before they are streamed in."""

    inv_freq: Tensor

    def __init__(self, shape: Shape, *, fmt: Format, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, fmt=fmt, dtype=dtype)
        self.lm_head = Head(shape, dtype)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]
        # Counted here, while every parameter is whole: a sharded one may not know its shape.
        self.base_bytes = sum(p.numel() * p.element_size() for p in self.base_parameters().values())
        # Computed on the CPU: values on the meta device would be lost, and no checkpoint has these.
        self.register_buffer("inv_freq", inverse_frequencies(shape), persistent=False)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor,
        attention: Attention,
        rows: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of some rows, or their logits.

        Args:
            ids: ``(T,)``, the micro-batch's tokens.
            positions: ``(T,)``, each token's position in its own document.
            attention: which tokens attend to which.
            rows: ``(K,)``, the tokens whose next one is predicted.
            labels: ``(K,)``, those next tokens.

        Returns:
            With labels the sum of their cross entropies, an fp32 scalar (0 where K is 0, and still
            part of the graph); without, logits ``(K, V)`` in fp32.
        """
        x = self.model.embed(ids)
        rotary = rotation(positions, self.inv_freq, x.dtype)
        for block in self.model.layers:
            x = block(x, rotary, attention)
        hidden = self.model.norm(x.index_select(0, rows))
        result: Tensor = self.lm_head(hidden, labels)
        return result

    def fuse_elementwise(self) -> None:
        """Have norms, the rotary embedding, SiLU and the loss computed by ``kernels.operators`` from here on."""
        for module in self.modules():
            if isinstance(module, RMSNorm | SelfAttention | FeedForward | Head):
                module.is_fused = True

    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def linears(self) -> dict[str, FrozenLinear]:
        """Every linear that can carry an adapter, by its full name, first layer first."""
        return {name: module for name, module in self.named_modules() if isinstance(module, FrozenLinear)}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The frozen parameters by their full names; a tied head is listed once."""
        return {name: p for name, p in self.named_parameters() if not (".adapter." in name or ".trained." in name)}

    def stored_as(self, name: str) -> tuple[str, str]:
        """The checkpoint tensor that a base parameter is read from, and its part: ``weight``, or codes or scales."""
        module, _, part = name.rpartition(".")
        return f"{module}.weight", part

    def formats(self) -> dict[str, Format]:
        """The format of each linear's weight by its name in a checkpoint; all other tensors are stored as they are."""
        return {f"{name}.weight": linear.fmt for name, linear in self.linears().items()}


def build_on_meta(shape: Shape, *, dtype: torch.dtype, fmt: Format | None = None) -> Llama:
    """The model without weights: every parameter is on the meta device; RoPE's frequencies have their values.

    Args:
        dtype: of the embeddings, the norms and the head.
        fmt: how the linears of the layers are stored; None is unquantized, in ``dtype``, as those of
            ``shape.unquantized`` are whatever it is.
    """
    with torch.device("meta"):
        return Llama(shape, fmt=fmt or Plain(dtype), dtype=dtype)


def materialize(model: Llama, device: torch.device, *, base_device: torch.device | None = None) -> None:
    """Allocate memory on ``device`` for each parameter that is still on the meta device; for a shard, its size only.

    Parameters that two modules share stay shared, and buffers keep their values (``to_empty`` would leave
    garbage in RoPE's frequencies). ``base_device`` is that of the frozen parameters, where it is another.
    """
    allocated: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in allocated:
                target = device if parameter.requires_grad else base_device or device
                empty = torch.empty_like(parameter, device=target)
                allocated[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = allocated[id(parameter)]
    move_buffers(model, device)


def move_buffers(model: Llama, device: torch.device) -> None:
    """Move RoPE's frequencies, and the ids of trained rows, to ``device``."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
