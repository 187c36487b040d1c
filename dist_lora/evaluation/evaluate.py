"""How good a model is on held-out data: loss, perplexity, and exact match of generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dist_lora.base.llama import Llama
from dist_lora.data.loader import MicroBatch
from dist_lora.data.prefetch import on_device
from dist_lora.data.token_set import TokenSet
from dist_lora.engines.engine import Engine
from dist_lora.evaluation.answers import AnswerRule
from dist_lora.evaluation.generate import base_fits_whole, generate
from dist_lora.evaluation.own_metrics import OwnMetric, Scores
from dist_lora.evaluation.predictions import Prediction
from dist_lora.evaluation.tool_calls import ToolCalls, summed
from dist_lora.world.world import World


@dataclass(frozen=True)
class HeldOut:
    """Loss over all target tokens of a held-out set, the mean in nats per token."""

    loss: float
    target_tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def never_stop() -> None:
    """The ``check_stop`` of an evaluation that can't be interrupted."""


@torch.no_grad()
def held_out_loss(
    model: Llama,
    batches: Iterable[MicroBatch],
    *,
    run: Callable[[MicroBatch], torch.Tensor],
    world: World,
    check_stop: Callable[[], None] = never_stop,
) -> HeldOut:
    """The loss over every sample once, whatever the number of ranks. All ranks call it.

    Args:
        run: returns the sum of a micro-batch's losses.
        check_stop: called before each micro-batch; what it raises, on all ranks, ends the evaluation.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    try:
        for batch in on_device(batches, world.device):
            check_stop()
            sums[0] += run(batch)
            sums[1] += len(batch.labels)
            world.progress.advance()
    finally:
        model.train(was_training)
    world.sum(sums)
    return HeldOut(float(sums[0] / sums[1]), int(sums[1]))


@dataclass(frozen=True)
class ExactMatch:
    """How many generated answers equal the expected ones, character by character, ignoring surrounding whitespace.

    With an ``AnswerRule`` only what it finds in both is compared. ``metrics``: the mean of each metric of the user's own, by name.
    """

    correct: int
    total: int
    tool_calls: ToolCalls | None = None  # of the same answers, where they are counted
    metrics: Mapping[str, float] = field(default_factory=dict)


def exact_match(
    model: Llama,
    engine: Engine,
    tokens: TokenSet,
    *,
    tokenizer: Any,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    batch: int,
    world: World,
    check_stop: Callable[[], None] = never_stop,
    predictions: dict[int, Prediction] | None = None,
    rule: AnswerRule | None = None,
    counts_calls: bool = False,
    metrics: Sequence[OwnMetric] = (),
) -> ExactMatch:
    """Generate the last answer of each sample from what comes before it, and compare. All ranks call it.

    Each rank takes every ``world_size``-th sample; if memory allows, the base stays gathered throughout. ``check_stop``
    is called before each batch of answers, see ``held_out_loss``. ``predictions`` gets this rank's answers by their sample, and ``metrics``
    judge each; ``rule`` says what of two texts is compared.
    """
    mine = [last_answer(*tokens.document(i)) for i in range(world.world_rank, len(tokens), world.world_size)]
    per_rank = math.ceil(len(tokens) / world.world_size)
    was_training = model.training
    model.eval()
    is_gathered = base_fits_whole(model, world)
    engine.keep_gathered(model, is_gathered)
    correct, scores = 0, Scores(metrics, num_samples=len(tokens), world=world)
    calls = ToolCalls() if counts_calls else None
    try:
        for first in range(0, per_rank, batch):
            check_stop()
            samples = mine[first : first + batch]
            answers = generate(
                model,
                [prompt for prompt, _ in samples],
                stop_ids=stop_ids,
                max_new_tokens=max_new_tokens,
                world=world,
            )
            for i, ((prompt, expected), ids) in enumerate(zip(samples, answers, strict=True), first):
                wanted, found = (tokenizer.decode(ids) for ids in (until_stop(expected, stop_ids), ids))
                is_correct = rule.is_match(found, wanted) if rule is not None else found.strip() == wanted.strip()
                correct += is_correct
                if calls is not None:
                    calls.add(wanted, found)
                if predictions is not None or metrics:
                    sample = world.world_rank + i * world.world_size
                    prediction = Prediction(tokenizer.decode(prompt), wanted, found, is_correct)
                    scores.add(sample, prediction)
                    if predictions is not None:
                        predictions[sample] = prediction
    finally:
        engine.keep_gathered(model, False)
        model.train(was_training)
    total = world.sum(torch.tensor([float(correct)], device=world.device))
    return ExactMatch(int(total), len(tokens), None if calls is None else summed(calls, world), scores.means())


def until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids before the first that ends an answer: what a template puts after it (a newline) is not part of the answer."""
    for i, token in enumerate(ids):
        if token in stop_ids:
            return list(ids[:i])
    return list(ids)


def expected_answers(tokens: TokenSet, *, tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[str]:
    """The text of each sample's last answer, with which the generated one is compared."""
    for index in range(len(tokens)):
        yield tokenizer.decode(until_stop(last_answer(*tokens.document(index))[1], stop_ids))


def last_answer(ids: np.ndarray, is_target: np.ndarray) -> tuple[list[int], list[int]]:
    """A sample's prompt, up to its last run of targets, and that run."""
    stop = len(ids)
    while stop > 0 and not is_target[stop - 1]:
        stop -= 1
    start = stop
    while start > 1 and is_target[start - 1]:
        start -= 1
    return [int(i) for i in ids[:start]], [int(i) for i in ids[start:stop]]
