"""Evaluation of a held-out set with a config's settings: the same for ``train``, between steps, and for ``eval``."""

from __future__ import annotations

from collections.abc import Callable

from dist_lora.config.schema import Config
from dist_lora.data.loader import EvalBatches
from dist_lora.data.token_set import TokenSet
from dist_lora.evaluation.evaluate import ExactMatch, HeldOut, exact_match, held_out_loss, never_stop
from dist_lora.evaluation.generate import stop_ids_of
from dist_lora.evaluation.predictions import Predictions
from dist_lora.train.build import Trainee
from dist_lora.world.world import World

ANSWERS_AT_ONCE = 32  # per rank, if eval.batch is not set


def loss_of(
    trainee: Trainee, tokens: TokenSet, *, config: Config, world: World, check_stop: Callable[[], None] = never_stop
) -> HeldOut:
    """The held-out loss of the trainee as it is now. All ranks call it. ``check_stop``: see ``held_out_loss``."""
    batches = EvalBatches(
        tokens,
        micro_batch=config.eval.batch or config.train.micro_batch,
        sequence_length=config.train.sequence_length,
        packing=config.train.packing,
        world_rank=world.world_rank,
        world_size=world.world_size,
    )
    return held_out_loss(trainee.model, batches, run=trainee.run, world=world, check_stop=check_stop)


def exact_match_of(
    trainee: Trainee,
    tokens: TokenSet,
    *,
    config: Config,
    world: World,
    check_stop: Callable[[], None] = never_stop,
    predictions: Predictions | None = None,
) -> ExactMatch:
    """How many of the trainee's answers match exactly. All ranks call it. See ``evaluation.evaluate.exact_match``."""
    return exact_match(
        trainee.model,
        trainee.engine,
        tokens,
        tokenizer=trainee.base.tokenizer,
        stop_ids=stop_ids_of(trainee.base.folder, trainee.base.tokenizer),
        max_new_tokens=config.eval.max_new_tokens,
        batch=config.eval.batch or ANSWERS_AT_ONCE,
        world=world,
        check_stop=check_stop,
        predictions=predictions,
    )
