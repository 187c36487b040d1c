"""Tracks the bytes of all live tensors at each moment of a step, by kind; for real and for fake tensors.

It tracks storages, not tensors: views cost nothing, a resized storage changes its bytes (FSDP2 frees and regrows gathered
parameters this way), and an unreferenced storage is gone at once. What an operator allocates and frees internally isn't seen.

The kind of a storage often shows only later (what a forward made is an activation if it is still alive when the backward
begins), so lifetimes are recorded and added up at the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.base.llama import Llama
from dist_lora.engines.adapters import FlatAdapters
from dist_lora.engines.engine import Engine
from dist_lora.simulation.collectives import Sent, is_above_local, sent_by

Kind = Literal[
    "base shard",
    "gathered base",
    "adapters",
    "gathered adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Phase = Literal["update", "forward", "head", "recompute", "backward"]

_LATER: frozenset[Phase] = frozenset(
    ("forward", "head", "recompute")
)  # what they allocate may be saved for the backward
_GATHERED: dict[Kind, Kind] = {"base shard": "gathered base", "adapters": "gathered adapters"}


@dataclass(frozen=True)
class Moment:
    """The live bytes after one event: in total and by kind, in the order of ``KINDS``."""

    event: int
    phase: Phase
    total_bytes: int
    by_kind: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """The result of a tracker: the peak, and a timeline with the highest moment of each interval."""

    peak: Moment
    timeline: tuple[Moment, ...]

    @property
    def composition(self) -> dict[Kind, int]:
        """The bytes at the peak, by kind."""
        return dict(zip(KINDS, self.peak.by_kind, strict=True))


@dataclass(eq=False)
class _Life:
    """The lifetime of a storage of one size, from one event to another."""

    num_bytes: int
    born: int
    phase: Phase  # in which it was allocated
    span: int  # number of the forward, recomputation or backward in which it was allocated
    kind: Kind | None = None  # None until it is known
    died: int | None = None
    is_counted: bool = True
    is_kept: bool = False  # it outlived the span that allocated it


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks all storages that are allocated while it is active, and those that are registered.

    Only one per process can be active, since it patches ``torch.UntypedStorage.resize_``. It also records collectives.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Sent] = []
        self.forwards: list[int] = []  # number of collectives before each forward of the watched model
        self._lives: list[_Life] = []
        self._of: dict[int, tuple[weakref.ref[Any], _Life]] = {}  # by the storage's id
        self._event = 0
        self._is_entered = False
        self._phases: list[tuple[int, Phase]] = [(0, "update")]
        self._span = 0
        self._flags: dict[str, bool] = {"forward": False, "head": False, "recompute": False}
        self._vocab = 0
        self._gathering: Kind = "gathered base"

    # Registration

    def register(self, kind: Kind, tensors: Iterable[Tensor], *, is_counted: bool = True) -> None:
        """Set the kind of some tensors' storages, whether or not they were allocated under the tracker.

        ``is_counted=False``: they are not on the device whose memory is tracked.
        """
        for tensor in tensors:
            life = self._seen(_local(tensor))
            life.kind, life.is_counted = kind, is_counted

    def watch(self, model: Llama) -> None:
        """Distinguish forward, head, recomputation and backward of ``model`` by hooks on its modules."""
        self._vocab = model.shape.vocab

        def flag(name: str, value: bool) -> Any:
            def hook(*_: Any) -> None:
                self._flags[name] = value

            return hook

        def recompute(*_: Any) -> None:
            self._flags["recompute"] = torch._C._current_graph_task_id() != -1

        model.register_forward_pre_hook(lambda *_: self.forwards.append(len(self.sent)), prepend=True)
        model.register_forward_pre_hook(flag("forward", True), prepend=True)
        model.register_forward_hook(flag("forward", False), always_call=True)
        model.lm_head.register_forward_pre_hook(flag("head", True))
        model.lm_head.register_forward_hook(flag("head", False), always_call=True)
        for block in model.blocks():
            # A recomputation ends with an exception once it has everything that the backward needs.
            block.self_attn.register_forward_pre_hook(recompute)
            block.mlp.register_forward_hook(flag("recompute", False), always_call=True)

    # Recording

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        resize = self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        self._is_entered = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, at: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._is_entered = False
        super().__exit__(kind, error, at)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_above_local(types):
            return NotImplemented
        kwargs = kwargs or {}
        self._look_at_phase()
        name = func._schema.name
        result = func(*args, **kwargs)
        if name.startswith("c10d::"):
            sent = sent_by(func, args, kwargs)
            if sent is not None:
                self.sent.append(sent)
                if "reduce_scatter" in name:
                    self._name("gradients", _tensors(args[0]))
        elif name == "fsdp::all_gather_copy_in":
            self._gathering = self._gathered_kind(args[0])
            self._name(self._gathering, [args[1]])
        elif name == "fsdp::split_with_sizes_copy":
            self._name(self._gathered_kind([args[0]]), kwargs["out"])
        elif name == "aten::cat":
            self._name_joined(args[0], kwargs.get("out", result))
        elif name == "aten::copy_" and self._seen(args[1]).kind in _GATHERED:
            self._name(self._gathered_kind([args[1]]), [args[0]])  # FSDP2's all-gather over a single rank
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._seen(leaf)
        return result

    def _name_joined(self, parts: Sequence[Tensor], whole: Tensor) -> None:
        """DeepSpeed's all-gather: shards are concatenated in a buffer, and parameters from parts of it."""
        kinds = {self._seen(part).kind for part in parts}
        for shard, gathered in _GATHERED.items():
            if shard in kinds or gathered in kinds:
                self._name(gathered, [whole])
                return

    def _gathered_kind(self, sources: Sequence[Tensor]) -> Kind:
        """The kind of an all-gather of ``sources``: shards, or a buffer filled from them."""
        for source in sources:
            kind = self._seen(source).kind
            if kind is not None:
                return _GATHERED.get(kind, kind)
        return self._gathering  # copies of offloaded shards

    def _look_at_phase(self) -> None:
        flags = self._flags
        phase: Phase
        if flags["recompute"]:
            phase = "recompute"
        elif torch._C._current_graph_task_id() != -1:
            phase = "backward"
        elif flags["head"]:
            phase = "head"
        else:
            phase = "forward" if flags["forward"] else "update"
        before = self._phases[-1][1]
        if phase != before:
            self._phases.append((self._event, phase))
            self._span += {phase, before} != {"forward", "head"}  # the head is the end of its forward

    def _seen(self, tensor: Tensor) -> _Life:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._of.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        self._of[key] = self._known(storage)
        life = self._of[key][1]
        if life.phase == "head" and tensor.ndim == 2 and tensor.shape[-1] == self._vocab:
            life.kind = "logits"
        return life

    def _known(self, storage: torch.UntypedStorage) -> tuple[weakref.ref[Any], _Life]:
        key = id(storage)
        return weakref.ref(storage, lambda _: self._freed(key)), self._begin(storage.nbytes())

    def _name(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            life = self._seen(_local(tensor))
            if life.kind is None:
                life.kind = kind

    def _begin(self, num_bytes: int) -> _Life:
        self._event += self._is_entered  # storages from before belong to the first event
        life = _Life(num_bytes, self._event, self._phases[-1][1], self._span)
        self._lives.append(life)
        return life

    def _end(self, life: _Life) -> None:
        self._event += 1
        life.died = self._event
        life.is_kept = self._span != life.span

    def _freed(self, key: int) -> None:
        known = self._of.pop(key, None)
        if known is not None:
            self._end(known[1])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._of.get(id(storage))
        if known is None or known[0]() is not storage:
            self._look_at_phase()
            self._of[id(storage)] = self._known(storage)
        elif storage.nbytes() != known[1].num_bytes:
            before = known[1]
            self._end(before)
            self._look_at_phase()
            after = self._begin(storage.nbytes())
            # The kind survives freeing and regrowing.
            after.kind, after.is_counted = before.kind, before.is_counted
            self._of[id(storage)] = (known[0], after)

    # Results

    @property
    def host_bytes(self) -> int:
        """The live bytes now that were registered as not on the device."""
        return sum(life.num_bytes for _, life in list(self._of.values()) if not life.is_counted)

    def _kind_of(self, life: _Life) -> Kind:
        if life.kind is not None:
            return life.kind
        is_kept = life.is_kept or (life.died is None and self._span != life.span)
        return "activations" if is_kept and life.phase in _LATER else "other"

    def memory(self, *, num_moments: int = 500) -> Memory:
        """The peak and a timeline of everything so far, with at most ``num_moments`` including the first and the last."""
        num_events = self._event + 1
        changes = np.zeros((num_events, len(KINDS)), np.int64)
        for life in self._lives:
            if life.is_counted:
                column = KINDS.index(self._kind_of(life))
                changes[life.born, column] += life.num_bytes
                if life.died is not None:
                    changes[life.died, column] -= life.num_bytes
        by_kind = changes.cumsum(axis=0)
        total = by_kind.sum(axis=1)
        starts = np.array([event for event, _ in self._phases])

        def moment(event: int) -> Moment:
            phase = self._phases[int(np.searchsorted(starts, event, side="left")) - 1 if event else 0][1]
            return Moment(event, phase, int(total[event]), tuple(int(value) for value in by_kind[event]))

        bounds = np.linspace(0, num_events, num_moments - 1).astype(int)
        highest = {int(a + total[a:b].argmax()) for a, b in zip(bounds, bounds[1:], strict=False) if b > a}
        shown = sorted(highest | {0, num_events - 1})
        return Memory(moment(int(total.argmax())), tuple(map(moment, shown)))


def register_run(tracker: Tracker, model: Llama, engine: Engine, adapters: FlatAdapters) -> None:
    """Register a run's persistent tensors with a tracker, and have it watch the model.

    Call it after ``start_training``. Offloaded tensors aren't counted.
    """
    layout = engine.layout
    for slot in engine.slots(model):
        tracker.register("base shard", [slot.destination], is_counted=not engine.is_on_host(slot))
    tracker.register("adapters", adapters.flat_parameters)
    tracker.register("adapters", (tensor.parameter.data for tensor in adapters.tensors))
    tracker.register("gradients", adapters.gradients())
    tracker.register("optimizer", adapters.optimizer_state(), is_counted=not layout.optimizer_on_host)
    tracker.watch(model)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, which itself has no storage."""
    return tensor.to_local() if is_above_local((type(tensor),)) else tensor  # type: ignore[attr-defined]
