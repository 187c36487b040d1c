"""Recording of collectives: all that torch dispatches, whichever library calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dist_lora.world.world import World

Axis = Literal["node", "between nodes", "world"]


@dataclass(frozen=True)
class Sent:
    """One collective: its kind, the participating ranks, the bytes of the whole tensor and its dtype."""

    kind: str
    ranks: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same axis: how many, and the bytes of their whole tensors added up."""

    kind: str
    axis: Axis
    ranks: int
    count: int
    num_bytes: int


def sent_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sent | None:
    """The collective that a dispatched operator starts; None if it isn't one."""
    name: str = func._schema.name
    if not name.startswith("c10d::") or "barrier" in name:
        return None
    leaves = tree_leaves((args, kwargs))
    group = next(value for value in leaves if isinstance(value, torch.ScriptObject) and _is_group(value))
    ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
    tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
    largest = max(tensors, key=lambda tensor: tensor.nbytes)  # of a gather the result, of a scatter the input
    return Sent(name.removeprefix("c10d::"), ranks, largest.nbytes, largest.dtype)


def is_above_local(types: Iterable[type]) -> bool:
    """Whether an operator's arguments are DTensors, which dispatch to operators on local tensors."""
    return any(issubclass(kind, DTensor) for kind in types)


def axis_of(ranks: Sequence[int], world: World) -> Axis:
    """The mesh axis of these ranks; ``node`` if the world is one node."""
    nodes = {rank // world.local_size for rank in ranks}
    if len(nodes) == 1:
        return "node"
    return "between nodes" if len(nodes) == len(ranks) else "world"


def traffic(sent: Iterable[Sent], world: World) -> tuple[Traffic, ...]:
    """Collectives summed by kind and axis, most bytes first."""
    counts: Counter[tuple[str, Axis, int]] = Counter()
    num_bytes: Counter[tuple[str, Axis, int]] = Counter()
    for collective in sent:
        key = (collective.kind, axis_of(collective.ranks, world), len(collective.ranks))
        counts[key] += 1
        num_bytes[key] += collective.num_bytes
    return tuple(Traffic(*key, count=counts[key], num_bytes=total) for key, total in num_bytes.most_common())


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())
