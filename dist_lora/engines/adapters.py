"""The trained tensors and their optimizer as the loop sees them, whoever holds which part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lora.base.checksum import checksums
from dist_lora.config.schema import OptimSection
from dist_lora.engines.adamw import AdamW, norm_of
from dist_lora.lora.attach import AdapterTensor
from dist_lora.lora.layer import initial_a
from dist_lora.lora.state import KINDS, Kind, Piece
from dist_lora.world.world import World

# N elements of all trained tensors together


class Adapters(ABC):
    """All trained tensors of a run, the gradients of a step, and AdamW's state: what an engine gives the loop.

    A step is ``begin_step``, ``backward`` for each micro-batch, ``reduce``, ``step``. All ranks call all of it.
    """

    def __init__(self, tensors: Sequence[AdapterTensor]) -> None:
        self.tensors = list(tensors)
        self.shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.parameter.shape) for t in self.tensors}

    @property
    def num_elements(self) -> int:
        """How many weights are trained, over all ranks."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    # The values

    def initialize(self, seed: int) -> None:
        """A drawn from (seed, name), B zero: the same on every rank without a word between them."""
        drawn = (
            (t.name, initial_a(t.layer, rank=shape[0], in_features=shape[1], seed=seed))
            for t, shape in zip(self.tensors, self.shapes.values(), strict=True)
            if t.attribute == "lora_A"
        )
        self.load(drawn)
        self.load((t.name, torch.zeros(self.shapes[t.name])) for t in self.tensors if t.attribute == "lora_B")

    @abstractmethod
    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Take over whole tensors by name, fp32 on the CPU; the caller has checked names and shapes. Local."""

    # A step

    @abstractmethod
    def start_training(self, section: OptimSection) -> None:
        """Make the optimizer's state. Called once, after the values are there; evaluation does without."""

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the gradients of the step before."""

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro-batch's gradients to the step's; ``is_last`` says that no other follows in this step."""

    @abstractmethod
    def reduce(self, scalars: Tensor) -> None:
        """Sum the gradients and ``scalars`` (fp32) over all ranks, in place: all that a step sends of what is trained."""

    @abstractmethod
    def without_gradient(self, attribute: str) -> list[str]:
        """The names of the tensors (``lora_A`` or ``lora_B``) whose summed gradient is zero in every element."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update, and return the gradient's global norm before clipping. Where that is not finite: no update."""

    @abstractmethod
    def copies_agree(self) -> bool:
        """Whether all ranks that hold the same trained weights hold the same bytes. The same answer on every rank."""

    # What a checkpoint holds

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """All that this rank needs of a checkpoint."""

    @abstractmethod
    def share(self) -> dict[Piece, Tensor]:
        """What this rank writes of a checkpoint: all ranks' shares are every element once.

        Views of the live state, 1-D fp32, wherever it lies: the next step changes them.
        """

    @abstractmethod
    def restore(self, values: Mapping[Piece, Tensor], *, num_steps: int) -> None:
        """Take back ``pieces()`` as they were after ``num_steps`` updates."""


@dataclass(frozen=True)
class Part:
    """Elements ``[start, stop)`` of a trained tensor, which this rank updates, and where they lie.

    They are elements ``[at, at + stop - start)`` of flat parameter number ``home``.
    """

    name: str
    start: int
    stop: int
    home: int
    at: int


class FlatAdapters(Adapters):
    """Trained tensors of which this rank updates flat fp32 parameters ("homes") by our own AdamW."""

    def __init__(
        self,
        tensors: Sequence[AdapterTensor],
        *,
        homes: Sequence[nn.Parameter],
        parts: Sequence[Part],
        world: World,
        optimizer_on_host: bool,
    ) -> None:
        super().__init__(tensors)
        self.homes, self.parts, self.world = list(homes), list(parts), world
        self._optimizer_on_host = optimizer_on_host
        self._optimizer: AdamW | None = None
        self._max_norm: float | None = None

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients ``(N,)`` of the homes, as summed so far."""

    @abstractmethod
    def _sum_over_shards(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks that hold the other parts of the same copy, in place."""

    @abstractmethod
    def _copies(self) -> tuple[int, int]:
        """Which of how many ranks that hold the same parts this one is: they divide the writing."""

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Adapters``."""
        by_name: dict[str, list[Part]] = {}
        for part in self.parts:
            by_name.setdefault(part.name, []).append(part)
        for name, whole in values:
            for part in by_name.get(name, ()):
                self._place(part, self.homes).copy_(whole.reshape(-1)[part.start : part.stop])
        if self._optimizer is not None:
            self._optimizer.take_up()

    def start_training(self, section: OptimSection) -> None:
        """See ``Adapters``."""
        self._optimizer = AdamW(self.homes, section, on_host=self._optimizer_on_host)
        self._max_norm = section.max_grad_norm

    @property
    def optimizer(self) -> AdamW:
        """AdamW over the homes."""
        assert self._optimizer is not None, "start_training was not called"
        return self._optimizer

    def optimizer_state(self) -> list[Tensor]:
        """All tensors that the optimizer keeps from step to step beside the homes."""
        return self.optimizer.state()

    def without_gradient(self, attribute: str) -> list[str]:
        """See ``Adapters``."""
        names = [tensor.name for tensor in self.tensors if tensor.attribute == attribute]
        number = {name: i for i, name in enumerate(names)}
        gradients = self.gradients()
        reached = torch.zeros(len(names), device=self.world.device)
        for part in self.parts:
            if part.name in number:
                reached[number[part.name]] += self._place(part, gradients).any()
        self._sum_over_shards(reached)
        return [name for name, count in zip(names, reached.tolist(), strict=True) if not count]

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See ``Adapters``."""
        gradients = self.gradients()
        norm = float(self._norm(gradients))
        if math.isfinite(norm):
            if self._max_norm is not None and norm > self._max_norm:
                torch._foreach_mul_(gradients, self._max_norm / (norm + 1e-6))
            self.optimizer.step(gradients, lr)
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
        which, num_copies = self._copies()
        mine = share_of(sum(part.stop - part.start for part in self.parts), which, num_copies)
        share: dict[Piece, Tensor] = {}
        offset = 0
        for part in self.parts:
            first = max(part.start, part.start + mine.start - offset)
            last = min(part.stop, part.start + mine.stop - offset)
            offset += part.stop - part.start
            for kind, flats in self._state().items():
                if first < last:
                    values = self._place(part, flats)[first - part.start : last - part.start]
                    share[Piece(part.name, kind, first, last)] = values
        return share

    def restore(self, values: Mapping[Piece, Tensor], *, num_steps: int) -> None:
        """See ``Adapters``."""
        state = self._state()
        for part in self.parts:
            for kind, flats in state.items():
                self._place(part, flats).copy_(values[Piece(part.name, kind, part.start, part.stop)])
        self.optimizer.resume_at(num_steps)

    def _state(self) -> dict[Kind, Sequence[Tensor]]:
        return {"adapter": self.homes, "exp_avg": self.optimizer.exp_avg, "exp_avg_sq": self.optimizer.exp_avg_sq}

    @staticmethod
    def _place(part: Part, flats: Sequence[Tensor]) -> Tensor:
        return flats[part.home].detach()[part.at : part.at + part.stop - part.start]


class ReplicatedAdapters(FlatAdapters):
    """All trained tensors, whole on every rank, as views of one flat fp32 buffer ``(N,)``.

    Gradients accumulate in a second one, so that a step reduces once, whatever the number of micro-batches, and
    the global norm counts each element once.
    """

    def __init__(self, tensors: Sequence[AdapterTensor], world: World, *, optimizer_on_host: bool = False) -> None:
        parts, end = [], 0
        for tensor in tensors:
            count = tensor.parameter.numel()
            parts.append(Part(tensor.name, 0, count, home=0, at=end))
            end += count
        self.parameter = nn.Parameter(torch.zeros(end, device=world.device))
        self.gradient = torch.zeros(end, device=world.device)
        super().__init__(tensors, homes=[self.parameter], parts=parts, world=world, optimizer_on_host=optimizer_on_host)
        for tensor, part in zip(tensors, parts, strict=True):
            shape = self.shapes[tensor.name]
            view = nn.Parameter(self._place(part, self.homes).view(shape))
            view.grad = self._place(part, [self.gradient]).view(shape)
            setattr(tensor.module, tensor.attribute, view)

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
        return self.world.world_size == 1 or same_on_all(self.homes, self.world.device)

    def _copies(self) -> tuple[int, int]:
        return self.world.world_rank, self.world.world_size


def same_on_all(values: Sequence[Tensor], device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether ``values`` are, byte for byte, those of every rank of the group. A collective of 16 bytes."""
    number = sum(checksums((str(i), value) for i, value in enumerate(values)).values()) % 2**62
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    return int(ends[0]) == -int(ends[1])


@dataclass(frozen=True)
class Range:
    """Elements ``[start, stop)`` of something flat."""

    start: int
    stop: int


def share_of(num_elements: int, which: int, num_shares: int) -> Range:
    """The ``which``-th of ``num_shares`` contiguous parts of ``num_elements``; the first ones are larger by one."""
    small, larger = divmod(num_elements, num_shares)
    start = which * small + min(which, larger)
    return Range(start, start + small + (which < larger))
