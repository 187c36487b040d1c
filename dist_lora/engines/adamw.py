"""AdamW over flat fp32 parameters, on their device or with its state in host memory; the norm of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_lora.config.schema import OptimSection

# N elements of a parameter

_NORM_WIDTH = 4096  # elements that are summed in fp32


@dataclass(frozen=True)
class Span:
    """Elements ``[start, stop)`` of a flat parameter, and the factor of their learning rate."""

    start: int
    stop: int
    rate: float = 1.0


class AdamW:
    """AdamW over some flat fp32 parameters ``(N,)``; its state is named tensors, without pickle.

    With ``on_host`` the moments and the updated copy of the parameters are in host memory (pinned if there is a GPU):
    a step copies the gradients there and the new parameters back, and the GPU holds no optimizer state.

    Source: arXiv 1711.05101; the arithmetic is ``torch.optim.AdamW``'s.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        section: OptimSection,
        *,
        on_host: bool = False,
        parts: Sequence[tuple[Span, ...]] | None = None,
    ) -> None:
        """Zero moments.

        Args:
            parts: of each parameter the elements that have a learning rate of their own; None where one rate is all's. Elements of no
                part (padding) are left as they are.
        """
        self._parameters = list(parameters)
        self._updated = [_host_copy(p) for p in parameters] if on_host else self._parameters
        spans = parts or [(Span(0, p.numel()),) for p in self._updated]
        self._spans = [(flat, span) for flat, of_flat in enumerate(spans) for span in of_flat]
        # Without parts a parameter is its own only piece, and nothing is a view.
        whole = parts is None
        self._pieces = [
            u if whole else nn.Parameter(u.detach()[s.start : s.stop]) for u, s in self._placed(self._updated)
        ]
        self.exp_avg = [torch.zeros_like(p.data) for p in self._updated]
        self.exp_avg_sq = [torch.zeros_like(p.data) for p in self._updated]
        # A rank may have nothing of what is trained.
        self._rates = sorted({span.rate for _, span in self._spans} or {1.0})
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p, (_, s) in zip(self._pieces, self._spans, strict=True) if s.rate == rate]}
                for rate in self._rates
            ],
            lr=section.peak_lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        self._num_steps: list[Tensor] = []
        moments = zip(self._placed(self.exp_avg), self._placed(self.exp_avg_sq), strict=True)
        for piece, ((first, span), (second, _)) in zip(self._pieces, moments, strict=True):
            state = self._optimizer.state[piece]
            # fused AdamW needs the step count on the parameter's device, as a tensor.
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.device)
            state["exp_avg"] = first[span.start : span.stop]
            state["exp_avg_sq"] = second[span.start : span.stop]
            self._num_steps.append(state["step"])

    def _placed(self, flats: Sequence[Tensor]) -> list[tuple[Tensor, Span]]:
        return [(flats[flat], span) for flat, span in self._spans]

    def state(self) -> list[Tensor]:
        """All tensors besides the parameters: moments, step counts, and copies in host memory."""
        copies = [u.data for p, u in zip(self._parameters, self._updated, strict=True) if u is not p]
        return [*self.exp_avg, *self.exp_avg_sq, *self._num_steps, *copies]

    def step(self, gradients: Sequence[Tensor], lr: float, *, is_valid: Tensor | None = None) -> None:
        """One update of the parameters by their gradients, each ``(N,)`` fp32, at ``lr``.

        Args:
            is_valid: a boolean scalar on the gradients' device, which the host needn't know: where it is false, nothing changes.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        # What the fused kernel reads for torch.amp's scaler (torch 2.13): with a 1 there it leaves all as it is, the count too.
        if is_valid is not None and self._updated:
            self._optimizer.found_inf = (~is_valid).float().to(self._updated[0].device)  # type: ignore[attr-defined]
        for piece, (gradient, span) in zip(self._pieces, self._placed(gradients), strict=True):
            part = gradient[span.start : span.stop]
            piece.grad = part if piece.device == part.device else part.to(piece.device)
        self._optimizer.step()
        self._optimizer.found_inf = None  # type: ignore[attr-defined]
        for piece in self._pieces:
            piece.grad = None
        self._copy_back()

    def _copy_back(self) -> None:
        """Copy what was updated in host memory to the parameters."""
        for parameter, updated in zip(self._parameters, self._updated, strict=True):
            if updated is not parameter:
                parameter.data.copy_(updated.data)

    def refresh_copies(self) -> None:
        """Copy parameters that the caller has filled to host memory, where they are updated there."""
        for parameter, updated in zip(self._parameters, self._updated, strict=True):
            if updated is not parameter:
                updated.data.copy_(parameter.data)

    def resume_at(self, num_steps: int) -> None:
        """Set how many updates the moments and parameters (filled by the caller) have seen."""
        self.refresh_copies()
        for count in self._num_steps:
            count.fill_(num_steps)


def _host_copy(parameter: nn.Parameter) -> nn.Parameter:
    values = parameter.detach().to("cpu", copy=True)
    return nn.Parameter(values.pin_memory() if parameter.is_cuda else values)


def norm_of(flat: Tensor) -> Tensor:
    """The Euclidean norm of ``flat`` ``(N,)``, a scalar in fp64, whatever N.

    In two stages: one fp32 reduction on a CPU (torch 2.13) adds term by term, and the sum becomes too large for the
    terms: a thousandth of the norm is lost at 50 million elements.
    """
    tail = len(flat) % _NORM_WIDTH
    rows = flat[: len(flat) - tail].view(-1, _NORM_WIDTH)
    parts = (torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(flat[len(flat) - tail :])[None])
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64)
    return norm
