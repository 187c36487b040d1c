"""The trained tensors and their optimizer as the loop sees them, however they are sharded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lora.base.checksum import checksums
from dist_lora.base.index import WeightIndex
from dist_lora.base.stream import WEIGHT, Slot, fill_slots
from dist_lora.config.schema import OptimSection
from dist_lora.engines.adamw import AdamW, Span, norm_of
from dist_lora.lora.attach import TrainedTensor
from dist_lora.lora.state import KINDS, Kind, Piece
from dist_lora.world.world import World

# N elements of all trained tensors


class Adapters(ABC):
    """All trained tensors of a run, the gradients of a step, and AdamW's state, as an engine gives them to the loop.

    A step is ``begin_step``, ``backward`` for each micro-batch, ``reduce``, ``step``. All ranks call all of it.
    """

    def __init__(self, tensors: Sequence[TrainedTensor]) -> None:
        self.tensors = list(tensors)
        self.shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.parameter.shape) for t in self.tensors}

    @property
    def num_elements(self) -> int:
        """How many weights are trained, over all ranks."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_unfrozen(self) -> int:
        """How many of them are the base's own."""
        return sum(math.prod(self.shapes[tensor.name]) for tensor in self.tensors if tensor.initial is None)

    # The values

    def initialize(self, seed: int, base: WeightIndex | None = None) -> None:
        """A drawn from (seed, name), B zero, rows as in ``base``: the same on every rank without communication.

        Args:
            base: the base on disk, of which each rank reads the rows that it trains; None where none are.

        Raises:
            WeightsError: the base can't be read.
        """
        self.load((t.name, t.initial(self.shapes[t.name], seed, base)) for t in self.tensors if t.initial is not None)
        slots = self._slots_of([tensor.name for tensor in self.tensors if tensor.initial is None])
        if slots:
            assert base is not None, "unfrozen weights start as the base's, which wasn't given"
            fill_slots(slots, index=base)
            self._has_filled()

    @abstractmethod
    def _slots_of(self, names: Sequence[str]) -> list[Slot]:
        """The elements of these tensors that this rank updates, to be filled."""

    @abstractmethod
    def _has_filled(self) -> None:
        """Called once ``_slots_of`` are filled."""

    @abstractmethod
    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Copy in whole tensors by name, fp32 on the CPU; the caller has checked names and shapes. Local."""

    # A step

    @abstractmethod
    def start_training(self, section: OptimSection) -> None:
        """Create the optimizer's state. Called once, after the values are loaded; not needed for evaluation."""

    @abstractmethod
    def begin_step(self) -> None:
        """Clear the gradients of the previous step."""

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro-batch's gradients to the step's; ``is_last``: no other follows in this step."""

    @abstractmethod
    def reduce(self, scalars: Tensor) -> None:
        """Sum the gradients and ``scalars`` (fp32) over all ranks, in place, unless the backward has summed them."""

    @abstractmethod
    def without_gradient(self, attribute: str) -> list[str]:
        """The names of the tensors (``lora_A`` or ``lora_B``) whose summed gradient is zero in every element."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip, update, and return the gradient's global norm before clipping, an fp64 scalar on the device.

        Where that is not finite: no update. It is for the caller to read, so that the host waits once in a step.
        """

    @abstractmethod
    def copies_agree(self) -> bool:
        """Whether all ranks that hold the same trained weights hold the same bytes. The same answer on every rank."""

    # What a checkpoint holds

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The pieces of a checkpoint that this rank needs."""

    @abstractmethod
    def share(self) -> dict[Piece, Tensor]:
        """The pieces of a checkpoint that this rank writes: over all ranks every element once.

        Views of the live state, 1-D fp32, on its device: the next step changes them.
        """

    @abstractmethod
    def restore(self, values: Mapping[Piece, Tensor], *, num_steps: int) -> None:
        """Restore ``pieces()`` as they were after ``num_steps`` updates."""


@dataclass(frozen=True)
class Part:
    """Elements ``[start, stop)`` of a trained tensor, which this rank updates, and where they are.

    They are elements ``[offset, offset + stop - start)`` of flat parameter number ``flat_index``.
    """

    name: str
    start: int
    stop: int
    flat_index: int
    offset: int


class FlatAdapters(Adapters):
    """Trained tensors of which this rank updates flat fp32 parameters by our own AdamW."""

    def __init__(
        self,
        tensors: Sequence[TrainedTensor],
        *,
        flat_parameters: Sequence[nn.Parameter],
        parts: Sequence[Part],
        world: World,
        optimizer_on_host: bool,
    ) -> None:
        super().__init__(tensors)
        self.flat_parameters, self.parts, self.world = list(flat_parameters), list(parts), world
        self._optimizer_on_host = optimizer_on_host
        self._optimizer: AdamW | None = None
        self._max_norm: float | None = None

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients ``(N,)`` of the flat parameters, as accumulated so far."""

    @abstractmethod
    def _sum_over_shards(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that hold the other shards of the same replica, in place."""

    @abstractmethod
    def _copies(self) -> tuple[int, int]:
        """Index of this rank among those that hold the same parts, and their number: they divide the writing."""

    def _slots_of(self, names: Sequence[str]) -> list[Slot]:
        return [
            Slot(part.name, WEIGHT, self.shapes[part.name], part.start, self._view(part, self.flat_parameters))
            for part in self.parts
            if part.name in names
        ]

    def _has_filled(self) -> None:
        if self._optimizer is not None:
            self._optimizer.refresh_copies()

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Adapters``."""
        by_name: dict[str, list[Part]] = {}
        for part in self.parts:
            by_name.setdefault(part.name, []).append(part)
        for name, whole in values:
            for part in by_name.get(name, ()):
                self._view(part, self.flat_parameters).copy_(whole.reshape(-1)[part.start : part.stop])
        self._has_filled()

    def start_training(self, section: OptimSection) -> None:
        """See ``Adapters``."""
        self._optimizer = AdamW(
            self.flat_parameters, section, on_host=self._optimizer_on_host, parts=self._spans(section.lr_ratio)
        )
        self._max_norm = section.max_grad_norm

    def _spans(self, lr_ratio: float) -> list[tuple[Span, ...]] | None:
        """The parts of each flat parameter with their learning rates; None where all have one."""
        if lr_ratio == 1.0:
            return None
        spans: list[list[Span]] = [[] for _ in self.flat_parameters]
        for part in self.parts:
            rate = lr_ratio if part.name.endswith(".lora_B") else 1.0
            spans[part.flat_index].append(Span(part.offset, part.offset + part.stop - part.start, rate))
        return [tuple(of_flat) for of_flat in spans]

    @property
    def optimizer(self) -> AdamW:
        """AdamW over the flat parameters."""
        assert self._optimizer is not None, "start_training was not called"
        return self._optimizer

    def optimizer_state(self) -> list[Tensor]:
        """All tensors that the optimizer keeps between steps besides the flat parameters."""
        return self.optimizer.state()

    def without_gradient(self, attribute: str) -> list[str]:
        """See ``Adapters``."""
        names = [tensor.name for tensor in self.tensors if tensor.attribute == attribute]
        index_of = {name: i for i, name in enumerate(names)}
        gradients = self.gradients()
        nonzero = torch.zeros(len(names), device=self.world.device)
        for part in self.parts:
            if part.name in index_of:
                nonzero[index_of[part.name]] += self._view(part, gradients).any()
        self._sum_over_shards(nonzero)
        return [name for name, count in zip(names, nonzero.tolist(), strict=True) if not count]

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """See ``Adapters``."""
        gradients = self.gradients()
        norm = self._norm(gradients)
        if self._max_norm is not None and gradients:
            scale = torch.where(norm > self._max_norm, self._max_norm / (norm + 1e-6), 1.0)
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        self.optimizer.step(gradients, lr, is_valid=norm.isfinite())
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """In fp64, a scalar."""
        squares = torch.stack([norm_of(gradient).square() for gradient in gradients]).sum()
        return self._sum_over_shards(squares).sqrt()

    def pieces(self) -> list[Piece]:
        """See ``Adapters``."""
        return [Piece(part.name, kind, part.start, part.stop) for part in self.parts for kind in KINDS]

    def share(self) -> dict[Piece, Tensor]:
        """See ``Adapters``."""
        index, num_copies = self._copies()
        mine = share_of(sum(part.stop - part.start for part in self.parts), index, num_copies)
        share: dict[Piece, Tensor] = {}
        offset = 0
        for part in self.parts:
            first = max(part.start, part.start + mine.start - offset)
            last = min(part.stop, part.start + mine.stop - offset)
            offset += part.stop - part.start
            for kind, flats in self._state().items():
                if first < last:
                    values = self._view(part, flats)[first - part.start : last - part.start]
                    share[Piece(part.name, kind, first, last)] = values
        return share

    def restore(self, values: Mapping[Piece, Tensor], *, num_steps: int) -> None:
        """See ``Adapters``."""
        state = self._state()
        for part in self.parts:
            for kind, flats in state.items():
                self._view(part, flats).copy_(values[Piece(part.name, kind, part.start, part.stop)])
        self.optimizer.resume_at(num_steps)

    def _state(self) -> dict[Kind, Sequence[Tensor]]:
        return {
            "adapter": self.flat_parameters,
            "exp_avg": self.optimizer.exp_avg,
            "exp_avg_sq": self.optimizer.exp_avg_sq,
        }

    @staticmethod
    def _view(part: Part, flats: Sequence[Tensor]) -> Tensor:
        return flats[part.flat_index].detach()[part.offset : part.offset + part.stop - part.start]


class ReplicatedAdapters(FlatAdapters):
    """All trained tensors, replicated on every rank, as views of one flat fp32 buffer ``(N,)``.

    Gradients accumulate in a second one, so that a step reduces once, whatever the number of micro-batches, and
    the global norm counts each element once.
    """

    def __init__(self, tensors: Sequence[TrainedTensor], world: World, *, optimizer_on_host: bool = False) -> None:
        parts, end = [], 0
        for tensor in tensors:
            count = tensor.parameter.numel()
            parts.append(Part(tensor.name, 0, count, flat_index=0, offset=end))
            end += count
        self.parameter = nn.Parameter(torch.zeros(end, device=world.device))
        self.gradient = torch.zeros(end, device=world.device)
        super().__init__(
            tensors, flat_parameters=[self.parameter], parts=parts, world=world, optimizer_on_host=optimizer_on_host
        )
        for tensor, part in zip(tensors, parts, strict=True):
            shape = self.shapes[tensor.name]
            view = nn.Parameter(self._view(part, self.flat_parameters).view(shape))
            view.grad = self._view(part, [self.gradient]).view(shape)
            tensor.put(view)

    def gradients(self) -> list[Tensor]:
        """See ``FlatAdapters``."""
        return [self.gradient]

    def begin_step(self) -> None:
        """See ``Adapters``."""
        self.gradient.zero_()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See ``Adapters``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, scalars: Tensor) -> None:
        """See ``Adapters``."""
        self.world.sum(self.gradient)
        self.world.sum(scalars)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return norm_of(self.gradient)

    def _sum_over_shards(self, values: Tensor) -> Tensor:
        return values

    def copies_agree(self) -> bool:
        """See ``Adapters``."""
        return self.world.world_size == 1 or same_on_all(self.flat_parameters, self.world.device)

    def _copies(self) -> tuple[int, int]:
        return self.world.world_rank, self.world.world_size


def same_on_all(values: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether ``values`` are, byte for byte, those of every rank of the group. A collective of 16 bytes."""
    checksum = sum(checksums((str(i), value) for i, value in enumerate(values)).values()) % 2**62
    ends = torch.tensor([checksum, -checksum], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    return int(ends[0]) == -int(ends[1])


@dataclass(frozen=True)
class Range:
    """Elements ``[start, stop)`` of a flat tensor."""

    start: int
    stop: int


def share_of(num_elements: int, index: int, num_shares: int) -> Range:
    """The ``index``-th of ``num_shares`` contiguous parts of ``num_elements``; the first ones are larger by one."""
    small, larger = divmod(num_elements, num_shares)
    start = index * small + min(index, larger)
    return Range(start, start + small + (index < larger))
