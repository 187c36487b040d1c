"""The learning rate of each step, and AdamW over the flat trained state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_lora.config.schema import OptimSection

_NORM_WIDTH = 4096  # elements that are added up in fp32


def lr_at(step: int, *, section: OptimSection, num_steps: int) -> float:
    """The learning rate of ``step`` (1 is the first), a pure function: nothing of it is ever saved.

    It rises in a line over ``warmup_steps``, reaching ``lr`` at the last of them, then stays, falls in a line, or
    along half a cosine, to 0 one step after the last: the last step still learns.
    """
    if step <= section.warmup_steps:
        return section.lr * step / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    done = (step - section.warmup_steps - 1) / max(1, num_steps - section.warmup_steps)
    done = min(1.0, done)
    return section.lr * ((1 - done) if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class AdamW:
    """AdamW over one flat fp32 parameter ``(N,)``; its state is three things by name, no index and no pickle.

    Source: arXiv 1711.05101; the arithmetic is ``torch.optim.AdamW``'s.
    """

    def __init__(self, parameter: nn.Parameter, section: OptimSection) -> None:
        self._optimizer = torch.optim.AdamW(
            [parameter],
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        state = self._optimizer.state[parameter]
        # fused AdamW wants the count of steps beside the parameter, as a tensor.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)
        self.exp_avg: Tensor = state["exp_avg"]
        self.exp_avg_sq: Tensor = state["exp_avg_sq"]
        self._num_steps: Tensor = state["step"]

    def step(self, lr: float) -> None:
        """One update of the parameter by its gradient at ``lr``."""
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def resume_at(self, num_steps: int) -> None:
        """Set how many updates the moments (filled by the caller) have seen."""
        self._num_steps.fill_(num_steps)


def clip_(gradient: Tensor, max_norm: float | None) -> float:
    """Scale the flat global gradient to ``max_norm`` where it is longer; returns its norm before."""
    norm = norm_of(gradient)
    if max_norm is not None:
        gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return float(norm)


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
