"""Evaluation of a held-out set with a config's settings: the same for ``train``, between steps, and for ``eval``."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.data.loader import EvalBatches
from dist_lora.data.token_set import TokenSet
from dist_lora.evaluation.answers import AnswerRule
from dist_lora.evaluation.evaluate import (
    ExactMatch,
    HeldOut,
    exact_match,
    expected_answers,
    held_out_loss,
    never_stop,
)
from dist_lora.evaluation.generate import stop_ids_of
from dist_lora.evaluation.guard import read_verdicts, verdict_margins
from dist_lora.evaluation.own_metrics import own_metrics
from dist_lora.evaluation.predictions import Prediction
from dist_lora.evaluation.tool_calls import check_expected
from dist_lora.evaluation.verdicts import guard_report
from dist_lora.pace import Advance, pace
from dist_lora.train.build import Base, Trainee
from dist_lora.train.guard import logits_of
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

ANSWERS_AT_ONCE = 32  # per rank, if eval.batch is not set


def held_out_prints(config: Config, held_out: Mapping[str, TokenSet], world: World) -> dict[str, str]:
    """The fingerprints of the held-out sets that are sources of their own, by name. All ranks call it; the first reads them."""

    def read() -> bytes:
        return json.dumps({name: held_out[name].fingerprint() for name in config.data.eval_files()}).encode()

    prints: dict[str, str] = json.loads(world.once("the held-out data", read))
    return prints


def loss_of(
    trainee: Trainee, tokens: TokenSet, *, config: Config, world: World, check_stop: Callable[[], None] = never_stop
) -> HeldOut:
    """The held-out loss of the trainee as it is now. All ranks call it. ``check_stop``: see ``held_out_loss``."""
    batches = _batches_of(tokens, config=config, world=world)
    with pace("evaluating", is_shown=_is_shown(world, check_stop)) as advance:
        paced = _counted(check_stop, advance, total=len(batches))
        return held_out_loss(trainee.model, batches, run=trainee.run, world=world, check_stop=paced)


def _batches_of(tokens: TokenSet, *, config: Config, world: World) -> EvalBatches:
    return EvalBatches(
        tokens,
        micro_batch=config.eval.batch or config.train.micro_batch,
        sequence_length=config.train.sequence_length,
        packing=config.train.packing,
        world_rank=world.world_rank,
        world_size=world.world_size,
    )


def verdicts_of(
    trainee: Trainee, tokens: TokenSet, *, config: Config, world: World, check_stop: Callable[[], None] = never_stop
) -> dict[str, Any]:
    """How well the trainee judges a held-out set of format guard: see ``guard_report``. All ranks call it, and get the same."""
    held_out = read_verdicts(tokens, tokenizer=trainee.base.tokenizer)
    batches = _batches_of(tokens, config=config, world=world)

    with pace("judging", is_shown=_is_shown(world, check_stop)) as advance:
        margins = verdict_margins(
            trainee.model,
            batches,
            held_out=held_out,
            tokenizer=trainee.base.tokenizer,
            logits=logits_of(trainee),
            world=world,
            check_stop=_counted(check_stop, advance, total=len(batches)),
        )
    return guard_report(held_out.samples, margins)


def _is_shown(world: World, check_stop: Callable[[], None]) -> bool:
    """Whether this process shows the pace: the first rank, but not below the bar that a terminal has while training."""
    is_training = check_stop is not never_stop
    return world.is_first and not (is_training and sys.stderr.isatty())


def _counted(check_stop: Callable[[], None], advance: Advance, *, total: int) -> Callable[[], None]:
    """``check_stop``, which is called before each of ``total`` batches, and tells of those that are done."""
    numbers = itertools.count()

    def check() -> None:
        advance(next(numbers), total)
        check_stop()

    return check


def exact_match_of(
    trainee: Trainee,
    tokens: TokenSet,
    *,
    config: Config,
    world: World,
    check_stop: Callable[[], None] = never_stop,
    predictions: dict[int, Prediction] | None = None,
) -> ExactMatch:
    """How many of the trainee's answers match exactly, and what ``eval.metrics`` find. All ranks call it. See ``evaluation.evaluate.exact_match``."""
    batch = config.eval.batch or ANSWERS_AT_ONCE
    total = math.ceil(math.ceil(len(tokens) / world.world_size) / batch)
    with pace("generating answers, batch by batch", is_shown=_is_shown(world, check_stop)) as advance:
        return exact_match(
            trainee.model,
            trainee.engine,
            tokens,
            tokenizer=trainee.base.tokenizer,
            stop_ids=stop_ids_of(trainee.base.folder, trainee.base.tokenizer),
            max_new_tokens=config.eval.max_new_tokens,
            batch=batch,
            world=world,
            check_stop=_counted(check_stop, advance, total=total),
            predictions=predictions,
            rule=AnswerRule.of(config.eval.answer),
            counts_calls=config.eval.tool_calls,
            metrics=own_metrics(config),
        )


def check_tool_calls(sets: Mapping[str, TokenSet], *, config: Config, base: Base, world: World) -> None:
    """Before anything is loaded: see ``check_expected``, of the answers of all held-out sets together. All ranks call it."""
    if not sets or not config.eval.tool_calls:
        return
    stop_ids = stop_ids_of(base.folder, base.tokenizer)
    answers = itertools.chain.from_iterable(
        expected_answers(tokens, tokenizer=base.tokenizer, stop_ids=stop_ids) for tokens in sets.values()
    )
    warning = world.on_first("eval.tool_calls", lambda: check_expected(answers))
    if warning is not None:
        log.warning(warning)
