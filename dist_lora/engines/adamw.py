"""AdamW over flat fp32 parameters, on their device or with all of its state in host memory; the norm of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_lora.config.schema import OptimSection

# N elements of a parameter

_NORM_WIDTH = 4096  # elements that are added up in fp32


class AdamW:
    """AdamW over some flat fp32 parameters ``(N,)``; its state is named tensors, no index and no pickle.

    With ``on_host`` the moments and the copy of the parameters that is updated lie in host memory (pinned where there
    is a GPU): a step brings the gradients there and the new parameters back, and a GPU keeps nothing of it.

    Source: arXiv 1711.05101; the arithmetic is ``torch.optim.AdamW``'s.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], section: OptimSection, *, on_host: bool = False) -> None:
        self._parameters = list(parameters)
        self._updated = [_host_copy(p) for p in parameters] if on_host else self._parameters
        self._optimizer = torch.optim.AdamW(
            self._updated,
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        self.exp_avg: list[Tensor] = []
        self.exp_avg_sq: list[Tensor] = []
        self._num_steps: list[Tensor] = []
        for parameter in self._updated:
            state = self._optimizer.state[parameter]
            # fused AdamW wants the count of steps beside the parameter, as a tensor.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.data)
            state["exp_avg_sq"] = torch.zeros_like(parameter.data)
            self._num_steps.append(state["step"])
            self.exp_avg.append(state["exp_avg"])
            self.exp_avg_sq.append(state["exp_avg_sq"])

    def state(self) -> list[Tensor]:
        """All that it keeps beside the parameters: moments, counts of steps, and copies in host memory."""
        copies = [u.data for p, u in zip(self._parameters, self._updated, strict=True) if u is not p]
        return [*self.exp_avg, *self.exp_avg_sq, *self._num_steps, *copies]

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One update of the parameters by their gradients, each ``(N,)`` fp32, at ``lr``."""
        self._optimizer.param_groups[0]["lr"] = lr
        for parameter, gradient in zip(self._updated, gradients, strict=True):
            parameter.grad = gradient if parameter.device == gradient.device else gradient.to(parameter.device)
        self._optimizer.step()
        for parameter in self._updated:
            parameter.grad = None
        self.publish()

    def publish(self) -> None:
        """Bring what was updated in host memory to where it is used."""
        for parameter, updated in zip(self._parameters, self._updated, strict=True):
            if updated is not parameter:
                parameter.data.copy_(updated.data)

    def take_up(self) -> None:
        """Take over parameters that were filled from outside, where the updated ones are a copy."""
        for parameter, updated in zip(self._parameters, self._updated, strict=True):
            if updated is not parameter:
                updated.data.copy_(parameter.data)

    def resume_at(self, num_steps: int) -> None:
        """Set how many updates the moments and parameters (filled by the caller) have seen."""
        self.take_up()
        for count in self._num_steps:
            count.fill_(num_steps)


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    values = parameter.detach().to("cpu", copy=True)
    return nn.Parameter(values.pin_memory() if parameter.is_cuda else values)


def norm_of(flat: Tensor) -> Tensor:
    """The Euclidean norm of ``flat`` ``(N,)``, a scalar in fp64, whatever N.

    In two stages: one fp32 reduction on a CPU (torch 2.13) adds up term by term, and what it adds to becomes too
    large for what it adds: a thousandth of the norm is lost at 50 million elements.
    """
    tail = len(flat) % _NORM_WIDTH
    rows = flat[: len(flat) - tail].view(-1, _NORM_WIDTH)
    parts = (torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(flat[len(flat) - tail :])[None])
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64)
    return norm
