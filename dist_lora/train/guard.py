"""What a config says of a Guard's samples, for its model; and the part of them that is held out."""

from __future__ import annotations

import numpy as np

from dist_lora.config.guard import CATEGORIES, GuardVersion
from dist_lora.config.schema import Config
from dist_lora.data.guard import GuardRules
from dist_lora.data.token_set import TokenSet, split_eval
from dist_lora.train.build import Base

WIDTH_OF_1B = 2048


def guard_rules(config: Config, base: Base, *, augments: bool) -> GuardRules | None:
    """How a Guard's samples are written for this model; None for other formats.

    Args:
        augments: as training has them; else each sample has one form, with the categories in their order.
    """
    section = config.data
    if section.format != "guard":
        return None
    version: GuardVersion = "1b" if base.shape.hidden == WIDTH_OF_1B else "8b"
    if section.guard_version != "auto":
        version = section.guard_version
    return GuardRules(
        version=version,
        categories=section.categories() or CATEGORIES[version],
        augment=tuple(sorted(section.guard_augment)) if augments else (),
        seed=config.train.seed if augments and section.guard_augment else 0,
    )


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
