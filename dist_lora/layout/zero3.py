"""What DeepSpeed's ZeRO-3 has all-gathered at each moment of a step, by its own rules. No torch.

It takes parameters in the order in which the modules of a step use them, and counts elements, whatever their bytes. A prefetch
takes whole parameters until it has as many elements as the largest layer. So it ends within a layer where layers differ, as those
with and without adapters do, and one of its all-gathers may have the head together with the rest of the last layer.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_lora.config.schema import Quant
from dist_lora.herd.shape import Shape, module_path
from dist_lora.layout.storage import FP32, base_parts

MIN_REDUCED = 2**22  # elements: 16 MiB of gradients per reduction at least

Pass = Literal["forward", "backward"]
Module = Literal["model", "embedding", "norm", "head"] | int  # a layer by its number


@dataclass(frozen=True)
class Parameter:
    """A whole parameter: ``num_elements`` of ``item_bytes`` each. Those that are trained are in fp32."""

    num_elements: int
    item_bytes: int
    is_trained: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.num_elements * self.item_bytes


@dataclass(frozen=True)
class Modules:
    """The parameters of a model by module, in the order in which DeepSpeed has them.

    Args:
        head: None where it is the embedding.
        rows: of the tokens that are trained, in modules of their own beside the embedding and within the head: those of the
            embedding, and of a head of its own. Empty where none is trained.
        first_trained: the first layer that the backward goes through.
    """

    embedding: Parameter
    layers: tuple[tuple[Parameter, ...], ...]
    norm: Parameter
    head: Parameter | None
    rows: tuple[Parameter, ...]
    first_trained: int


@dataclass(frozen=True)
class Gathered:
    """Bytes in a module's forward or backward: while its own are copied out of their buffers, and while it computes."""

    fetching: int
    computing: int


@dataclass(frozen=True)
class Gradients:
    """Bytes of whole gradients in a layer's backward: of layers after it that wait for their reduction, and at a reduction.

    ``reducing`` has also the layer's own, and the copy that is sent; 0 where nothing is reduced.
    """

    waiting: int
    reducing: int


@dataclass(frozen=True)
class Step:
    """What ZeRO-3 holds in each module of a step, and of each layer's gradients (by layer, for those in the backward)."""

    gathered: Mapping[tuple[Pass, Module], Gathered]
    gradients: Mapping[int, Gradients]


# Kept, since a choice of ``auto`` and a search for what fits ask for the same hundreds of times.
@functools.lru_cache(maxsize=64)
def step_of(
    shape: Shape,
    quant: Quant,
    item_bytes: int,
    unfrozen: tuple[str, ...],
    lora_ranks: tuple[tuple[str, int], ...],
    *,
    trained_rows: int,
    first_trained: int,
    num_ranks: int,
    is_on_host: bool,
) -> Step:
    """What ZeRO-3 holds in a step; see ``Setup`` for the arguments. ``is_on_host``: what it gathers is in host memory."""
    frozen: dict[tuple[int | None, str], list[Parameter]] = defaultdict(list)
    for part in base_parts(shape, quant=quant, item_bytes=item_bytes, unfrozen=frozenset(unfrozen)):
        parameter = Parameter(part.num_bytes // part.item_bytes, part.item_bytes)
        frozen[part.block, part.name.partition(".")[0]].append(parameter)
    ranks, trained = dict(lora_ranks), frozenset(unfrozen)

    def of_layer(layer: int) -> Iterator[Parameter]:
        yield from frozen[layer, "weights"]
        for linear, (out, width) in shape.linear_shapes().items():
            name = module_path(linear, layer=layer)
            yield from [_trained(out * width)] if name in trained else frozen[layer, linear]
            if name in ranks:
                yield from (_trained(ranks[name] * width), _trained(out * ranks[name]))
        for i, norm in enumerate(("input_layernorm", "post_attention_layernorm"), 1):
            is_trained = f"model.layers.{layer}.{norm}" in trained
            yield from [_trained(shape.hidden)] if is_trained else frozen[layer, f"norm{i}"]

    num_matrices = 1 if shape.tied else 2
    modules = Modules(
        embedding=frozen[None, "embed_tokens"][0],
        layers=tuple(tuple(of_layer(layer)) for layer in range(shape.num_layers)),
        norm=next(iter(frozen[None, "norm"]), _trained(shape.hidden)),
        head=None if shape.tied else frozen[None, "lm_head"][0],
        rows=(_trained(trained_rows // num_matrices * shape.hidden),) * num_matrices if trained_rows else (),
        first_trained=first_trained,
    )
    is_there = num_ranks == 1 and not is_on_host
    return Step(_gathered(modules, has_buffers=num_ranks > 1, is_there=is_there), _gradients(modules))


def _trained(num_elements: int) -> Parameter:
    return Parameter(num_elements, FP32, is_trained=True)


def max_live_elements(*, head: int, layer: int) -> int:
    """How many elements may be gathered for a prefetch to go on: the head's with a layer's, or three layers'."""
    return max(head + layer, 3 * layer)


def reduced_elements(trained: Iterable[int]) -> int:
    """How many gradients are reduced at once: those of the module with most, but never so few that it isn't worth it."""
    return max(*trained, MIN_REDUCED)


def _gathered(modules: Modules, *, has_buffers: bool, is_there: bool) -> dict[tuple[Pass, Module], Gathered]:
    """What a rank has gathered in each module of a step.

    A single rank has no buffers: it copies from host memory, or does nothing, where all is on its device (``is_there``).
    """
    parameters, visits = _visits(modules)
    if is_there:
        return {(visit.way, visit.module): Gathered(0, 0) for visit in visits}
    layer = max(sum(each.num_elements for each in layer) for layer in modules.layers)
    max_live = max_live_elements(head=modules.embedding.num_elements, layer=layer)
    coordinator = _Coordinator(parameters, visits, bucket=layer, max_live=max_live, has_buffers=has_buffers)
    found: dict[tuple[Pass, Module], Gathered] = {}
    for step, visit in enumerate(visits):
        fetching = coordinator.fetch(step)
        coordinator.prefetch()
        before = found.get((visit.way, visit.module), Gathered(0, 0))
        found[visit.way, visit.module] = Gathered(
            max(before.fetching, fetching), max(before.computing, coordinator.num_bytes)
        )
        coordinator.release(step)
    return found


@dataclass(frozen=True)
class _Visit:
    """A module's turn in a pass: the parameters that it needs, by number, and those that nobody needs after it.

    These are its own, but for a module within another, whose parameters are needed until the inner one is done. One without
    parameters prefetches too.
    """

    way: Pass
    module: Module
    needed: tuple[int, ...]
    done: tuple[int, ...]


def _visits(modules: Modules) -> tuple[list[Parameter], list[_Visit]]:
    """All parameters, and the turns of a step in their order."""
    parameters: list[Parameter] = []

    def numbers(added: Iterable[Parameter]) -> tuple[int, ...]:
        first = len(parameters)
        parameters.extend(added)
        return tuple(range(first, len(parameters)))

    embedding, layers = numbers([modules.embedding]), [numbers(layer) for layer in modules.layers]
    norm = numbers([modules.norm])
    head = embedding if modules.head is None else numbers([modules.head])
    rows = numbers(modules.rows)
    of_embedding, of_head = rows[:1], rows[-1:]

    def alone(way: Pass, module: Module, needed: tuple[int, ...]) -> _Visit:
        return _Visit(way, module, needed, needed)

    # The weight of a norm that is trained is in a module of its own.
    def at_end(way: Pass) -> dict[Module, list[_Visit]]:
        outer = [_Visit(way, "norm", (), ())] if modules.norm.is_trained else []
        at_head = [alone(way, "head", head)]
        if of_head:
            at_head = [_Visit(way, "head", head, ()), _Visit(way, "head", of_head, (*of_head, *head))]
        return {"norm": [*outer, alone(way, "norm", norm)], "head": at_head}

    forward, backward = at_end("forward"), at_end("backward")
    visits = [alone("forward", "model", ()), alone("forward", "embedding", embedding)]
    visits += [alone("forward", "embedding", of_embedding)] if of_embedding else []
    visits += [alone("forward", number, layer) for number, layer in enumerate(layers)]
    visits += [*forward["norm"], *forward["head"]]
    visits += [alone("backward", "model", ()), *backward["head"], *backward["norm"]]
    visits += [
        alone("backward", number, layers[number]) for number in reversed(range(modules.first_trained, len(layers)))
    ]
    visits += [alone("backward", "embedding", of_embedding)] if of_embedding else []
    return parameters, visits


def _gradients(modules: Modules) -> dict[int, Gradients]:
    """Those of a layer are reduced together with others, once they are more than the bucket holds."""
    layers = [[each.num_elements for each in layer if each.is_trained] for layer in modules.layers]
    ends = [each.num_elements for each in (modules.norm, *modules.rows) if each.is_trained]
    bucket = reduced_elements([*map(sum, layers), sum(ends)])
    found: dict[int, Gradients] = {}
    before_layers = (
        modules.norm,
        *modules.rows[1:],
    )  # rows that are the embedding's too are complete after its backward
    waiting = sum(each.num_elements for each in before_layers if each.is_trained)
    for layer in reversed(range(modules.first_trained, len(layers))):
        before, held, reducing = waiting, waiting + sum(layers[layer]), 0
        for size in layers[layer]:
            if waiting + size > bucket and waiting:
                reducing, held, waiting = max(reducing, held + waiting), held - waiting, 0
            waiting += size
        if layer == modules.first_trained:
            reducing = max(reducing, held + waiting)
        found[layer] = Gradients(FP32 * before, FP32 * reducing)
    return found


@dataclass(eq=False)
class _Gather:
    """An all-gather, and those of its parameters that no module has waited for yet.

    With ``has_buffer`` they have one together until each of them was waited for; a single one is its own buffer.
    """

    parameters: tuple[int, ...]
    awaited: set[int]
    num_bytes: int
    has_buffer: bool
    is_copied: bool = False


class _Coordinator:
    """The rules of DeepSpeed 0.19's ``PartitionedParameterCoordinator``, once it has traced the order of a step."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        visits: Sequence[_Visit],
        *,
        bucket: int,
        max_live: int,
        has_buffers: bool,
    ) -> None:
        self._parameters, self._visits = parameters, visits
        self._bucket, self._max_live, self._has_buffers = bucket, max_live, has_buffers
        self._queue = deque((each, step) for step, visit in enumerate(visits) for each in visit.needed)
        self._fetched_for = [-1] * len(parameters)  # the last turn that a parameter was gathered for, or found gathered
        self._in_flight: dict[int, _Gather] = {}
        self._whole: set[int] = set()
        self._num_live = self.num_bytes = 0  # elements gathered; bytes of buffers and of what was copied out of them

    def fetch(self, step: int) -> int:
        """All-gathers what a turn needs, and waits for it; returns the bytes before the buffers are freed."""
        needed = self._visits[step].needed
        self._gather(each for each in needed if each not in self._whole)
        waited = [each for each in needed if each in self._in_flight]
        for each in waited:
            self._copy_out(self._in_flight[each])
        highest = self.num_bytes
        for each in waited:
            gather = self._in_flight.pop(each)
            gather.awaited.remove(each)
            if not gather.awaited and gather.has_buffer:
                self.num_bytes -= gather.num_bytes
        for _ in range(sum(self._fetched_for[each] < step for each in needed)):
            each, used_at = self._queue.popleft()
            self._fetched_for[each] = used_at
        return highest

    def prefetch(self) -> None:
        """All-gathers what comes next, as much as a bucket or what may be live, and goes over what is gathered already."""
        room = min(self._max_live - self._num_live, self._bucket)
        chosen: dict[int, None] = {}
        num_elements = 0
        while self._queue and num_elements < room:
            each, used_at = self._queue.popleft()
            self._fetched_for[each] = max(self._fetched_for[each], used_at)
            if each not in self._whole and each not in self._in_flight and each not in chosen:
                chosen[each] = None
                num_elements += self._parameters[each].num_elements
        self._gather(chosen)

    def release(self, step: int) -> None:
        """Frees what nobody needs after a turn; not what the next turn uses, nor what a prefetch went over for a later one."""
        following = next((visit.needed for visit in self._visits[step + 1 :] if visit.needed), ())
        for each in self._visits[step].done:
            if each not in following and self._fetched_for[each] <= step + 1:
                self._whole.remove(each)
                self.num_bytes -= self._parameters[each].num_bytes
                self._num_live -= self._parameters[each].num_elements

    def _gather(self, wanted: Iterable[int]) -> None:
        chosen = tuple(each for each in wanted if each not in self._in_flight)
        if chosen:
            num_bytes = sum(self._parameters[each].num_bytes for each in chosen)
            gather = _Gather(chosen, set(chosen), num_bytes, has_buffer=self._has_buffers and len(chosen) > 1)
            self._in_flight.update(dict.fromkeys(chosen, gather))
            self._num_live += sum(self._parameters[each].num_elements for each in chosen)
            self.num_bytes += num_bytes

    def _copy_out(self, gather: _Gather) -> None:
        if gather.is_copied:
            return
        gather.is_copied = True
        self._whole.update(gather.parameters)
        if gather.has_buffer:
            self.num_bytes += gather.num_bytes
