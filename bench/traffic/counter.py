"""Counts the kernels of whatever runs on the meta device, with where in the model and in which phase each runs."""

from __future__ import annotations

import sys
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.traffic.cuda import COMPOSED, Call, Kernel, Kind, kernels_of, storage_of, tensors_of
from bench.traffic.norm import fused_norms
from dist_lora.base.llama import Llama

Phase = Literal["forward", "recomputation", "backward"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# A layer by its number, or what lies around the layers.
Place = int | Literal["embedding", "head and loss", "update"]
_RECOMPUTES = "torch/utils/checkpoint.py"
_CREATES: tuple[Kind, ...] = ("copies", "dequantizing")  # of a frozen weight they make a frozen weight


@dataclass(frozen=True)
class Counted:
    """A kernel with its place and phase."""

    kernel: Kernel
    place: Place
    phase: Phase


@dataclass(frozen=True)
class Transfer:
    """A copy between the host and the device."""

    to_device: bool
    num_bytes: int
    place: Place
    phase: Phase


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs on the meta device while it is active, as a GPU would run it.

    Tensors on the CPU are computed as ever; what moves between them and the meta device is a transfer, and a
    value that the host reads from the device is zero.

    Args:
        documents: lengths of the documents of a micro-batch.
    """

    def __init__(self, documents: Sequence[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Counted] = []
        self.transfers: list[Transfer] = []
        self.kept_bytes: Tally[Place] = Tally()  # for the backward, each storage at the place that first saves it
        self._documents = tuple(documents)
        self._place: Place = "update"
        self._kind: Kind | None = None  # of the composed operator that is being counted
        self._is_backward = False
        self._frozen: set[int] = set()
        self._uncounted: set[int] = set()  # storages that are there anyway, or saved already
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        self._contexts.enter_context(fused_norms())
        self._contexts.enter_context(saved_tensors_hooks(self._save, lambda tensor: tensor))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._contexts.close()

    # Where

    def watch(self, model: Llama) -> None:
        """Tell the layers, and what lies around them, apart by hooks on the modules and on their results' gradients."""
        self.freeze(p for p in model.parameters() if not p.requires_grad)
        self._uncounted.update(storage_of(p) for p in model.parameters())
        model.register_forward_pre_hook(lambda *_: self._enter("embedding"))
        for number, block in enumerate(model.blocks()):
            block.register_forward_pre_hook(lambda *_, number=number: self._enter(number))
            block.register_forward_hook(lambda *call, number=number: self._leave(number, call[-1]))

    def freeze(self, weights: Iterable[Tensor]) -> None:
        """Products with these are the base's."""
        self._frozen.update(map(storage_of, weights))

    def _enter(self, place: Place) -> None:
        self._place = place

    def _leave(self, number: int, result: Any) -> None:
        self._place = "head and loss"  # unless another layer follows
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self._enter(number))

    def _phase(self) -> Phase:
        """A recomputation runs within the backward, in the function that torch's checkpoint calls."""
        is_backward = torch._C._current_graph_task_id() != -1
        if self._is_backward and not is_backward:
            self._place = "update"
        self._is_backward = is_backward
        if not is_backward:
            return "forward"
        return "recomputation" if torch.is_grad_enabled() or _is_called_from(_RECOMPUTES) else "backward"

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta and not self._is_backward and storage_of(tensor) not in self._uncounted:
            self._uncounted.add(storage_of(tensor))
            self.kept_bytes[self._place] += tensor.untyped_storage().nbytes()
        return tensor

    # What

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        kwargs = kwargs or {}
        phase = self._phase()
        name = func._schema.name
        if name in COMPOSED:
            return self._composed(name, args, kwargs)
        if _is_composed(func):  # within an operator's own code these get here whole
            with self._again():
                return func.decompose(*args, **kwargs)
        result, to_device = _run(func, args, kwargs)
        if to_device is not None:
            num_bytes = sum(
                t.numel() * t.element_size() for t in tensors_of(args[-1] if name == "aten::copy_" else args)
            )
            self.transfers.append(Transfer(to_device, num_bytes, self._place, phase))
            return result
        call = Call(func, args, kwargs, result, self.is_frozen, self._documents)
        if any(t.is_meta for t in (*call.read, *call.written)):
            kernels = kernels_of(call)
            if self._kind is not None:
                kernels = [replace(kernel, kind=self._kind) for kernel in kernels]
            self.kernels += [Counted(kernel, self._place, phase) for kernel in kernels]
            self._follow(call, kernels)
        return result

    def _composed(self, name: str, args: Any, kwargs: Any) -> Any:
        """Run the operator's own code, so that what it calls is counted."""
        self._kind = COMPOSED[name]
        with self._again():
            result = OPDEFS[name]._init_fn(*args, **kwargs)
        self._kind = None
        if COMPOSED[name] in _CREATES and all(map(self.is_frozen, tensors_of(args))):
            self.freeze(tensors_of(result))
        return result

    @contextmanager
    def _again(self) -> Iterator[None]:
        """The mode active again within its own dispatch, which suspends it."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def is_frozen(self, tensor: Tensor) -> bool:
        """Whether a tensor is in a frozen weight's memory, or in that of a copy of one."""
        return storage_of(tensor) in self._frozen

    def _follow(self, call: Call, kernels: Sequence[Kernel]) -> None:
        """Note which new storages hold frozen weights: memory is used again, so every new one is noted."""
        if call.func.is_view or call.name.endswith("_"):
            return
        is_made = bool(call.read) and any(kernel.kind in _CREATES for kernel in kernels)
        is_made_from_frozen = is_made and all(map(self.is_frozen, call.read))
        for tensor in tensors_of(call.result):
            if is_made_from_frozen:
                self.freeze([tensor])
            else:
                self._frozen.discard(storage_of(tensor))
                self._uncounted.discard(storage_of(tensor))


def _run(func: Any, args: Any, kwargs: Any) -> tuple[Any, bool | None]:
    """A call's result, and for a transfer whether it goes to the device."""
    name = func._schema.name
    if name == "aten::_local_scalar_dense" and args[0].is_meta:
        return (0.0 if args[0].dtype.is_floating_point else 0), False
    if name == "aten::_fused_adamw_":  # there is none for the meta device, and nothing to compute
        return None, None
    if name == "aten::copy_" and args[0].device != args[1].device:
        return args[0], args[0].is_meta
    device = kwargs.get("device")
    if name == "aten::_to_copy" and device is not None and torch.device(device).type != args[0].device.type:
        dtype = kwargs.get("dtype") or args[0].dtype
        if args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=dtype), False
        return func(*args, **kwargs), True
    return func(*args, **kwargs), None


def _is_composed(func: Any) -> bool:
    """Whether an operator only calls others, on any device: some have kernels of their own on most (``silu_backward``)."""

    def has(key: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))

    return has("CompositeImplicitAutograd") and not has("CPU") and not has("Meta")


def _is_called_from(path: str) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(path) and frame.f_code.co_name == "unpack_hook":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
