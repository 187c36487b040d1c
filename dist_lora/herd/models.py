"""Resolves ``model.name``, and the model's shape without its weights: by name, from a folder, or from sizes given by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from dist_lora.config.schema import ModelSection
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.members import MEMBERS, Member
from dist_lora.herd.shape import Shape, no_config, read_shape, refuse_adapter_inside
from dist_lora.text import nearest_few


@dataclass(frozen=True)
class ResolvedModel:
    """The model that ``model.name`` names: a folder or a model on the hub, with its herd member if it is one."""

    name: str
    folder: Path | None
    hub_id: str | None
    member: Member | None


def resolve_model(name: str) -> ResolvedModel:
    """A member's name (in any case), an existing folder, or a hub id (``org/name``), in this order.

    Nothing is fetched, and a hub id is not checked for existence. ``./`` before a folder's name keeps it from being taken
    for a member.

    Raises:
        ConfigError: it is none of the three (with the nearest members), or a folder without config.json, or with an
            adapter beside it.
    """
    member = MEMBERS.get(name.lower())
    if member is not None:
        return ResolvedModel(name=member.name, folder=None, hub_id=member.hub_id, member=member)
    folder = _existing_folder(name)
    if folder is not None:
        try:
            has_config = (folder / "config.json").is_file()
        except PermissionError as error:
            raise ConfigError(f"model.name: {folder} can't be opened by this user: {error.strerror}") from None
        if not has_config:
            raise ConfigError(no_config(folder))
        refuse_adapter_inside(folder)
        return ResolvedModel(name=name, folder=folder, hub_id=None, member=None)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return ResolvedModel(name=name, folder=None, hub_id=name, member=member_of(name))
    raise ConfigError(
        f"model.name: found {name!r}, expected a herd member, an existing folder or a hub id (org/name); "
        f"{_nearest_members(name)}"
    )


def member_of(hub_id: str | None) -> Member | None:
    """The herd member that has this hub id; None for any other name: a folder may be called anything."""
    known = {_plain_hub_id(member.hub_id): member for member in MEMBERS.values()}
    return None if hub_id is None else known.get(_plain_hub_id(hub_id))


def _existing_folder(name: str) -> Path | None:
    """The folder of that name; None also if no folder can have that name."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, with NUL, or the home of an unknown user
        return None


def _plain_hub_id(hub_id: str) -> str:
    """Without the prefix: Meta renamed Meta-Llama-3.1-8B to Llama-3.1-8B on the hub, where both names work."""
    return hub_id.lower().replace("/meta-llama-", "/llama-")


def _nearest_members(name: str) -> str:
    plain = re.sub(r"[\s_]+", "-", name.lower()).removeprefix("meta-").removeprefix("llama").lstrip("-")
    return nearest_few(plain, MEMBERS, otherwise=f"members: {', '.join(MEMBERS)}")


@dataclass(frozen=True)
class KnownModel:
    """A model as far as planning needs it; ``is_by_hand``: its sizes are given in the config, without weights."""

    title: str
    shape: Shape
    is_by_hand: bool = False


def known_model(section: ModelSection) -> KnownModel:
    """The model that a config names, without reading weights or using the network.

    A hub id that is no member of the herd is known once its config.json is in the hub's cache.

    Raises:
        ConfigError: no such model, one that is no Llama, sizes that no Llama can have, or a hub id of which nothing but the
            name is known.
        WeightsError: its config.json is damaged.
    """
    if section.shape is not None:
        shape = _shape_by_hand(section)
        if shape.weights_of_a_layer() < 1:
            raise ConfigError(
                f"model.shape.num_parameters: found {shape.given_parameters:,}, expected more than the {shape.weights_of_embedding_and_head():,} "
                "of the embedding and the head (vocab_size x hidden_size each; one where they are tied)"
            )
        return KnownModel(section.name, shape, is_by_hand=True)
    resolved = resolve_model(section.name)
    if resolved.folder is not None:
        return KnownModel(section.name, read_shape(resolved.folder))
    if resolved.member is None:
        assert resolved.hub_id is not None
        cached = _cached_folder(resolved.hub_id)
        if cached is not None:
            return KnownModel(section.name, read_shape(cached))
        raise ConfigError(
            f"model.name: {resolved.hub_id} is not a herd member, and its sizes are on the hub. Fetch them: hf download "
            f"{resolved.hub_id} config.json. Or name a member, a folder with config.json, or give the sizes by hand: "
            "model.shape: {hidden_size: 4096, ...}, as in its config.json"
        )
    return KnownModel(resolved.member.title, resolved.member.shape)


def _cached_folder(hub_id: str) -> Path | None:
    """The folder in the hub's cache that holds the config.json of a model's main revision; None where it isn't there."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json", cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def refuse_shape(section: ModelSection) -> None:
    """Raise ``ConfigError`` if a config gives sizes by hand, so that there are no weights."""
    if section.shape is not None:
        raise ConfigError(
            f"model.shape: {section.name} is given by its sizes alone and has no weights: such a config is for plan and "
            "explain. To train, remove model.shape and set model.name to a member, a folder or a hub id"
        )


def _shape_by_hand(section: ModelSection) -> Shape:
    assert section.shape is not None
    sizes = section.shape.model_dump(exclude={"num_parameters"}, exclude_none=True)
    try:
        shape = Shape.from_config({"model_type": "llama", **sizes}, where="model.shape")
        return replace(shape, given_parameters=section.shape.num_parameters)
    except WeightsError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:-1]]
        raise ConfigError("\n".join(f"model.shape.{fault}" for fault in faults)) from None
