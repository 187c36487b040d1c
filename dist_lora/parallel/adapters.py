"""The trained tensors as one flat buffer on every rank: one reduction, one optimizer step, one norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_lora.base.index import first_few
from dist_lora.errors import TrainingError
from dist_lora.lora.attach import AdapterTensor, layers_of
from dist_lora.lora.layer import initial_a

# N elements of all trained tensors together


class ReplicatedAdapters:
    """All trained tensors, whole on every rank, as views of one flat fp32 buffer ``(N,)``.

    Gradients accumulate in a second one, so that a step reduces once, whatever the number of micro-batches, and
    the global norm counts each element once. ``parameter`` is what the optimizer steps: its ``.grad`` is set.
    """

    def __init__(self, tensors: list[AdapterTensor], device: torch.device) -> None:
        self.tensors = tensors
        self.ranges: dict[str, tuple[int, int]] = {}
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.parameter.numel()
            self.ranges[tensor.name] = (start, end)
        self.shapes = {tensor.name: tuple(tensor.parameter.shape) for tensor in tensors}
        self.parameter = nn.Parameter(torch.zeros(end, device=device))
        self.parameter.grad = torch.zeros(end, device=device)
        for tensor in tensors:
            start, end = self.ranges[tensor.name]
            shape = self.shapes[tensor.name]
            view = nn.Parameter(self.parameter.data[start:end].view(shape))
            view.grad = self.parameter.grad[start:end].view(shape)
            setattr(tensor.module, tensor.attribute, view)

    @property
    def gradient(self) -> Tensor:
        """The flat gradient ``(N,)``."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def initialize(self, seed: int) -> None:
        """A drawn from (seed, name), B zero: the same on every rank without a word between them."""
        for tensor in self.tensors:
            values = tensor.parameter.data
            if tensor.attribute == "lora_A":
                layer = tensor.name.removesuffix(".lora_A")
                drawn = initial_a(layer, rank=values.shape[0], in_features=values.shape[1], seed=seed)
                values.copy_(drawn)
            else:
                values.zero_()

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over whole tensors by name; the caller has checked names and shapes."""
        for tensor in self.tensors:
            tensor.parameter.data.copy_(values[tensor.name])

    def values(self) -> dict[str, Tensor]:
        """The whole tensors by name, on the CPU."""
        return {tensor.name: tensor.parameter.detach().cpu().clone() for tensor in self.tensors}

    def check_gradients(self, step: int) -> None:
        """Raise ``TrainingError`` naming the trained tensors that the first steps' gradients did not reach.

        At the first step B alone moves (A's gradient is zero as long as B is), at the second A does too.
        """
        half = {1: "lora_B", 2: "lora_A"}.get(step)
        dead = [
            tensor.name
            for tensor in self.tensors
            if tensor.attribute == half and not self.gradient[slice(*self.ranges[tensor.name])].any()
        ]
        if dead:
            raise TrainingError(
                f"step {step}: {len(dead)} of {len(self.tensors) // 2} {half} tensors got no gradient, in "
                f"{layers_of(dead)}: {first_few(dead)}. "
                "Nothing that they are beside can learn; the graph behind them is cut."
            )
