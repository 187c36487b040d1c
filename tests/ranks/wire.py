"""The collectives of a rank, recorded as torch dispatches them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dist_lora.simulation.collectives import Sent, sent_by


class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the collectives of this rank while it is entered. Seen from one rank, in the order of calling."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sent = sent_by(func, args, kwargs or {})
        if sent is not None:
            self.sent.append(sent)
        return func(*args, **(kwargs or {}))
