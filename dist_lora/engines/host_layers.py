"""The layers of a frozen base in host memory: each is copied to the device while the one before it computes.

The device holds two layers at a time. What has to be in order is kept so by events: a layer computes once its copy has arrived,
and the next copy into its buffer begins once its kernels have ended. On a CPU the same copies are made at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_lora.base.llama import Block

_ALIGNED_BYTES = 256  # of each tensor in its layer's block: as much as an allocation of its own would have


@dataclass(frozen=True, eq=False)
class _Part:
    """A frozen parameter of a layer, and where it lies in the layer's block."""

    parameter: nn.Parameter
    shape: torch.Size
    offset: int
    num_bytes: int
    nothing: Tensor  # what the parameter holds while its layer isn't needed: whoever used it then would fail

    def within(self, block: Tensor) -> Tensor:
        """The parameter's tensor in its layer's block, on any device."""
        part = block[self.offset : self.offset + self.num_bytes]
        return part.view(self.nothing.dtype).view(self.shape)


@dataclass(eq=False)
class _Buffer:
    """Memory of one layer on the device, and the layer whose weights it holds or is about to hold."""

    memory: Tensor  # uint8
    free: Any  # event: the kernels that read it have ended
    layer: int | None = None
    arrived: Any = None  # event: the copy of its layer is done
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # of each layer that it has held


class HostLayers:
    """The base's parameters of ``blocks``, in one pinned block a layer, of which two at a time are on the device.

    A parameter holds its tensor from when its layer is needed until the next one is. Autograd saves a parameter by reference
    and not what it held (torch 2.13), so the backward reads the buffer that the layer has been fetched to by then.

    Args:
        blocks: the layers, with frozen parameters on the meta device; they are replaced.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._parts = [_parts_of(block, device) for block in blocks]
        sizes = [parts[-1].offset + parts[-1].num_bytes if parts else 0 for parts in self._parts]
        is_pinned = device.type == "cuda"
        self._blocks = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned) for size in sizes]
        # Their memory may have been freed by kernels that still run: the first copy waits for those too.
        self._buffers = [
            _Buffer(torch.empty(max(sizes), dtype=torch.uint8, device=device), self._recorded()) for _ in range(2)
        ]
        self._current: _Buffer | None = None  # the one whose layer is bound
        self._whole: list[Tensor] | None = None
        self._first_in_graph = 0
        self.host_tensors: dict[nn.Parameter, Tensor] = {
            part.parameter: part.within(block)
            for parts, block in zip(self._parts, self._blocks, strict=True)
            for part in parts
        }
        for layer, module in enumerate(blocks):
            self._watch(layer, module)

    def keep_on_device(self, is_kept: bool) -> None:
        """Copy all layers to the device until further notice, or free those copies."""
        if is_kept and self._whole is None:
            self._release()
            self._whole = [block.to(self._device) for block in self._blocks]
            for layer, block in enumerate(self._whole):
                self._bind(layer, [part.within(block) for part in self._parts[layer]])
        elif not is_kept and self._whole is not None:
            for parts in self._parts:
                _unbind(parts)
            self._whole = None

    def _watch(self, layer: int, block: Block) -> None:
        """Have a layer fetched before its forward and its backward, and after it what follows there.

        A recomputation runs within a layer's backward (see ``Block.forward``), and needs nothing of its own.
        """
        last = len(self._blocks) - 1

        def before_forward(*_: Any) -> None:
            if layer == 0:
                self._first_in_graph = last
            # The backward begins with the last two layers, which are there; without one another forward follows.
            at_end = max(0, last - 1) if torch.is_grad_enabled() else 0
            self._need(layer, then=layer + 1 if layer < last else at_end)

        def before_backward(_: Tensor) -> None:
            self._need(layer, then=layer - 1 if layer > self._first_in_graph else 0)

        def after_forward(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                self._first_in_graph = min(self._first_in_graph, layer)
                output.register_hook(before_backward)  # type: ignore[no-untyped-call]

        block.register_forward_pre_hook(before_forward)
        block.register_forward_hook(after_forward)

    def _need(self, layer: int, *, then: int) -> None:
        """Bind a layer for what is enqueued from here on, and begin to fetch the one that comes next."""
        if self._whole is not None:
            return
        if self._current is None or self._current.layer != layer:
            self._release()
            buffer = self._holding(layer) or self._fetch(layer)
            if buffer.arrived is not None:
                torch.cuda.current_stream(self._device).wait_event(buffer.arrived)
            if layer not in buffer.views:
                buffer.views[layer] = [part.within(buffer.memory) for part in self._parts[layer]]
            self._bind(layer, buffer.views[layer])
            self._current = buffer
        if self._holding(then) is None:
            self._fetch(then)

    def _holding(self, layer: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.layer == layer), None)

    def _fetch(self, layer: int) -> _Buffer:
        """Enqueue the copy of a layer into the buffer that isn't bound."""
        buffer = next(buffer for buffer in self._buffers if buffer is not self._current)
        block = self._blocks[layer]
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(buffer.free)
            buffer.memory[: len(block)].copy_(block, non_blocking=True)
            buffer.arrived = self._recorded()
        buffer.layer = layer
        return buffer

    def _bind(self, layer: int, tensors: Sequence[Tensor]) -> None:
        for part, tensor in zip(self._parts[layer], tensors, strict=True):
            part.parameter.data = tensor

    def _release(self) -> None:
        """The bound layer isn't needed any more, once what is enqueued has run."""
        if self._current is not None:
            assert self._current.layer is not None
            _unbind(self._parts[self._current.layer])
            self._current.free = self._recorded()
            self._current = None

    def _recorded(self) -> Any:
        """An event of the current stream; None on a CPU, where all is done when the call returns."""
        return None if self._device.type != "cuda" else torch.cuda.current_stream(self._device).record_event()


def _parts_of(block: Block, device: torch.device) -> list[_Part]:
    """The frozen parameters of a layer, each replaced by one that holds nothing, one after the other in a block."""
    parts: list[_Part] = []
    end = 0
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad:
                continue
            nothing = torch.empty(0, dtype=parameter.dtype, device=device)
            unbound = nn.Parameter(nothing, requires_grad=False)
            parts.append(_Part(unbound, parameter.shape, end, parameter.nbytes, nothing))
            module._parameters[name] = unbound
            end += -(-parameter.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return parts


def _unbind(parts: Sequence[_Part]) -> None:
    for part in parts:
        part.parameter.data = part.nothing
