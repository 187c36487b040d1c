"""What a step sends: every collective, whichever library calls it, as torch dispatches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Sent:
    """One collective: its kind, the ranks that take part, the bytes of the whole tensor and its type."""

    kind: str
    ranks: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype


class Wire(TorchDispatchMode):
    """Records the collectives of this rank while it is entered. Seen from one rank, in the order of calling."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and "barrier" not in name:
            flat, _ = tree_flatten((args, kwargs or {}))
            tensors = [value for value in flat if isinstance(value, torch.Tensor)]
            group = next(value for value in flat if isinstance(value, torch.ScriptObject) and _is_group(value))
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
            largest = max(
                tensors, key=lambda tensor: tensor.nbytes
            )  # of a gathering the result, of a scattering the input
            self.sent.append(Sent(name.removeprefix("c10d::"), ranks, largest.nbytes, largest.dtype))
        return func(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())
