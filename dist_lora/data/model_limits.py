"""Documents that the model can't take: longer than its context, or with ids that it has no row for."""

from __future__ import annotations

import logging

import numpy as np

from dist_lora.data.token_set import TokenSet
from dist_lora.errors import ConfigError, DataError
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


def check_limits(token_set: TokenSet, *, which: str, context: int, vocab: int, world: World) -> None:
    """Check that every document fits the model. All ranks call it; the first reads the ids once, on behalf of all.

    Documents that are packed into one sequence don't see each other, so that each is judged by its own length.

    Args:
        context: ``max_position_embeddings`` of the model, in tokens: the positions that it was trained for.
        vocab: rows of its embedding.

    Raises:
        ConfigError: some documents are longer than the context.
        DataError: an id is not below ``vocab``.
    """

    def check() -> None:
        _check_context(token_set, which=which, context=context)
        _check_ids(token_set, which=which, vocab=vocab)

    world.on_first(f"the limits of the model for data.{which}", check)


def _check_context(token_set: TokenSet, *, which: str, context: int) -> None:
    too_long = np.flatnonzero(token_set.lengths > context)
    if len(too_long):
        longest = int(token_set.lengths.argmax())
        raise ConfigError(
            f"data.{which}: {len(too_long):,} of {len(token_set):,} samples are longer than the model's context of "
            f"{context:,} tokens (max_position_embeddings in its config.json): the longest, sample "
            f"{int(token_set.sample_ids[longest]) + 1:,}, has {int(token_set.lengths[longest]):,}. At positions that it "
            f"never saw, a model's answers are arbitrary. Set train.sequence_length to {context:,} or less "
            "(data.on_too_long says what becomes of longer samples: truncate, drop, error), shorten the samples, or take a "
            "model with a longer context"
        )


def _check_ids(token_set: TokenSet, *, which: str, vocab: int) -> None:
    for _, ids in token_set.pieces(token_set.ids):
        largest = int(ids.max())
        if largest >= vocab:
            raise DataError(
                f"data.{which}: the tokenizer writes id {largest} and the model has {vocab:,} rows (ids 0 to "
                f"{vocab - 1}). They don't belong together, or tokens were added; use the model's own tokenizer"
            )


def warn_of_context(*, sequence_length: int, context: int, world: World) -> None:
    """Warn, before data are read, that a sequence may hold more tokens than a single sample may have."""
    if sequence_length > context and world.is_first:
        log.warning(
            f"train.sequence_length: {sequence_length:,} is more than the model's context of {context:,} tokens "
            "(max_position_embeddings): shorter samples may be packed together, and a sample that is longer than the context "
            "will be refused"
        )
