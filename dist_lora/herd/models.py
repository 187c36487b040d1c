"""What is known of a config's model without its weights: by its name, by its folder, or by sizes given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_lora.config.schema import ModelSection
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.shape import MEMBERS, Member, Shape, read_shape, resolve_model


@dataclass(frozen=True)
class KnownModel:
    """A model as far as arithmetic needs it; ``is_by_hand``: there is nothing but sizes."""

    title: str
    shape: Shape
    is_by_hand: bool = False


def known_model(section: ModelSection) -> KnownModel:
    """The model that a config means, without a look at its weights or at the network.

    Raises:
        ConfigError: no such model, sizes that no Llama has, or one on the hub of which nothing but the name is known.
        WeightsError: its folder's config.json is damaged.
    """
    if section.shape is not None:
        shape = _shape_by_hand(section)
        if shape.weights_of_a_layer() < 1:
            raise ConfigError(
                f"model.shape.num_parameters: found {shape.counted:,}, expected more than the {shape.weights_of_the_ends():,} "
                "of the embedding and the head (vocab_size x hidden_size each; one where they are tied)"
            )
        return KnownModel(section.name, shape, is_by_hand=True)
    resolved = resolve_model(section.name)
    if resolved.folder is not None:
        return KnownModel(section.name, read_shape(resolved.folder))
    if resolved.member is None:
        raise ConfigError(
            f"model.name: {resolved.hub_id} is no member of the herd, and its sizes lie on the hub. Expected a member, "
            "a folder with config.json, or sizes by hand: model.shape: {hidden_size: 4096, ...}, as its config.json has them"
        )
    return KnownModel(resolved.member.title, resolved.member.shape)


def refuse_shape(section: ModelSection) -> None:
    """Raise ``ConfigError`` where a config has sizes by hand, and so no weights."""
    if section.shape is not None:
        raise ConfigError(
            f"model.shape: {section.name} is given by its sizes, and has no weights: such a config is for plan and "
            "explain. To train, take model.shape out and give a member, a folder or a hub id as model.name"
        )


def _shape_by_hand(section: ModelSection) -> Shape:
    assert section.shape is not None
    sizes = section.shape.model_dump(exclude={"num_parameters"}, exclude_none=True)
    try:
        shape = Shape.from_config({"model_type": "llama", **sizes}, where="model.shape")
        return replace(shape, counted=section.shape.num_parameters)
    except WeightsError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:-1]]
        raise ConfigError("\n".join(f"model.shape.{fault}" for fault in faults)) from None


# The herd as a table


def herd_rows(members: Sequence[Member] = tuple(MEMBERS.values())) -> list[dict[str, Any]]:
    """What each member of the herd is and does, by column."""
    return [
        {
            "name": member.name,
            "parameters": member.shape.num_parameters(),
            "finetuned": member.is_finetuned,
            "multilingual": member.is_multilingual,
            "long context": member.has_long_context,
            "tool use": member.tool_use,
            "context": member.shape.context,
            "release": member.released.isoformat(),
            "licence": member.licence,
            "purpose": member.purpose,
            "hub id": member.hub_id,
        }
        for member in members
    ]


def herd_table() -> list[list[str]]:
    """The herd in words, its columns' names first."""
    columns = ["name", "parameters", "finetuned", "multilingual", "long context", "tool use", "tokens", "release",
               "licence", "purpose"]  # fmt: skip
    rows = [columns]
    for row in herd_rows():
        rows.append(
            [
                row["name"],
                f"{row['parameters'] / 1e9:.1f} B",
                *("yes" if row[fact] else "no" for fact in ("finetuned", "multilingual", "long context", "tool use")),
                f"{row['context']:,}",
                row["release"],
                row["licence"],
                row["purpose"].partition(" (")[0],  # the columns say what stands in brackets
            ]
        )
    return rows
