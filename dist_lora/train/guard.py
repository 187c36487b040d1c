"""What a config says of a Guard's samples, for its model; which of them are held out; and what a Guard finds unsafe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.config.guard import CATEGORIES, GuardVersion
from dist_lora.config.schema import Config
from dist_lora.data.guard import GuardRules
from dist_lora.data.guard_ids import first_ids
from dist_lora.data.loader import EvalBatches, MicroBatch
from dist_lora.data.token_set import TokenSet, split_eval
from dist_lora.evaluation.guard import HeldOutVerdicts, verdict_margins
from dist_lora.evaluation.verdicts import Sample
from dist_lora.herd.shape import Shape
from dist_lora.train.build import ModelFiles, Trainee
from dist_lora.world.world import World

WIDTH_OF_1B = 2048


def guard_rules(config: Config, base: ModelFiles, *, augments: bool) -> GuardRules | None:
    """How a Guard's samples are written for this model; None for other formats.

    Args:
        augments: as training has them; else each sample has one form, with the categories in their order.
    """
    section = config.data
    if section.format != "guard":
        return None
    version = guard_version(section.guard_version, base.shape)
    return GuardRules(
        version=version,
        categories=section.categories() or CATEGORIES[version],
        augment=tuple(sorted(section.guard_augment)) if augments else (),
        seed=config.train.seed if augments and section.guard_augment else 0,
    )


def guard_version(chosen: GuardVersion | Literal["auto"], shape: Shape) -> GuardVersion:
    """Whose prompt a Guard is asked with; ``auto`` goes by the model's width."""
    if chosen != "auto":
        return chosen
    return "1b" if shape.hidden == WIDTH_OF_1B else "8b"


def split_judged(forms: TokenSet, whole: TokenSet, *, fraction: float, seed: int) -> tuple[TokenSet, TokenSet]:
    """(train, eval): no form of a sample that is held out is trained on, and what is held out has one form each.

    Args:
        forms: the samples in all their forms.
        whole: the same samples in one form each.

    Raises:
        DataError: see ``split_eval``.
    """
    held_out = split_eval(whole, fraction=fraction, seed=seed)[1]
    is_trained = ~np.isin(forms.sample_ids, held_out.sample_ids)
    return forms.select(np.flatnonzero(is_trained)), held_out


def logits_of(trainee: Trainee) -> Callable[[MicroBatch, Tensor], Tensor]:
    """A function that gives the logits ``(K, V)`` of the tokens after some of a micro-batch's, by their places ``(K,)``."""

    def logits(batch: MicroBatch, rows: Tensor) -> Tensor:
        forward = trainee.engine.forward_of(trainee.model)
        documents = Documents(batch.bounds, trainee.attention, batch.starts)
        found: Tensor = forward(batch.ids, positions=batch.positions, attention=documents, rows=rows)
        return found

    return logits


def unsafe_prompts(trainee: Trainee, prompts: Sequence[Sequence[int]], *, batch: int, world: World) -> list[bool]:
    """Which prompts a Guard answers with unsafe. All ranks call it with the same, and get the same.

    Args:
        trainee: a Guard, with its adapter loaded.
        prompts: ids of ``encode_guard_prompt``, none longer than the model's context.
        batch: prompts in a forward pass of a rank.

    Raises:
        DataError: the tokenizer isn't Llama 3's.
    """
    if not prompts:
        return []
    tokenizer = trainee.base.tokenizer
    tokens = _asked(prompts, answer=first_ids(tokenizer)[0])
    margins = verdict_margins(
        trainee.model,
        EvalBatches(
            tokens,
            micro_batch=batch,
            sequence_length=int(tokens.lengths.max()),
            packing=False,
            world_rank=world.world_rank,
            world_size=world.world_size,
        ),
        held_out=HeldOutVerdicts(
            (Sample((), ()),) * len(prompts), tokens.lengths - 1, {i: i for i in range(len(prompts))}
        ),
        tokenizer=tokenizer,
        logits=logits_of(trainee),
        world=world,
    )
    return [bool(margin > 0) for margin in margins]


def _asked(prompts: Sequence[Sequence[int]], *, answer: int) -> TokenSet:
    """Prompts as documents, each with one token more, the only target."""
    lengths = np.array([len(prompt) + 1 for prompt in prompts], np.int64)
    ends = np.cumsum(lengths)
    is_target = np.zeros(int(ends[-1]), bool)
    is_target[ends - 1] = True
    return TokenSet(
        ids=np.concatenate([np.array([*prompt, answer], np.uint32) for prompt in prompts]),
        is_target=is_target,
        starts=ends - lengths,
        lengths=lengths,
        num_targets=np.ones(len(prompts), np.int64),
        sample_ids=np.arange(len(prompts)),
        kinds=("guard",),
    )
