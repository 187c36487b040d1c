"""What a run tells of its data in the model card: names that may be published, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dist_lora.data.hub import HUB_ID
from dist_lora.data.sources import is_of_hub
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import DataError
from dist_lora.lora.run_facts import RunFacts, SetFacts, file_name


def data_facts(
    train: str | Sequence[str],
    held_out: str | float | Sequence[str] | None,
    *,
    train_sets: Sequence[TokenSet],
    held_out_sets: Sequence[TokenSet],
) -> RunFacts:
    """The facts about the data, all others empty. Local; looks whether names are files here.

    Args:
        train, held_out: ``data.train`` and ``data.eval`` of the config: names, or a fraction.
    """
    names = () if held_out is None or isinstance(held_out, float) else held_out
    facts = RunFacts(train=_set_facts(train, "train", train_sets))
    return replace(facts, held_out=_set_facts(names, "eval", held_out_sets)) if held_out_sets else facts


def _set_facts(named: str | Sequence[str], which: str, sets: Sequence[TokenSet]) -> SetFacts:
    names = [named] if isinstance(named, str) else list(named)
    hub_ids = {name: match["name"] for name in names if _is_of_hub(name, which) and (match := HUB_ID.fullmatch(name))}
    return SetFacts(
        names=tuple(name if name in hub_ids else file_name(name) for name in names),
        hub_ids=tuple(dict.fromkeys(hub_ids.values())),
        samples=sum(map(len, sets)),
        tokens=sum(each.num_tokens for each in sets),
        target_tokens=sum(each.num_target_tokens for each in sets),
    )


def _is_of_hub(name: str, which: str) -> bool:
    try:
        return is_of_hub(name, which)
    except DataError:  # removed since it was read
        return False
