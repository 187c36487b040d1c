"""The base to load with an adapter: the one that is named, that of its run's config, or the one that its files name."""

from __future__ import annotations

from pathlib import Path

from dist_lora.base.hub import fetch_model
from dist_lora.errors import ConfigError
from dist_lora.files import no_folder
from dist_lora.herd.models import resolve_model
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.origin import origin_of


def base_name(adapter: Path, base: str | None) -> str:
    """The base to load with ``adapter``: ``base``, the one that its run recorded, or the one that its files name.

    Raises:
        ConfigError: the adapter names none, or a folder that isn't here.
    """
    if base is not None:
        return base
    name = origin_of(adapter).model or open_adapter(adapter).base.name
    if not name:
        raise ConfigError(f"{adapter} doesn't say which model it was trained on; name it: --base MODEL")
    if Path(name).is_absolute() and no_folder(Path(name)):
        raise ConfigError(
            f"{adapter} was trained on the model in {name}, which isn't here; name where it is now: --base MODEL"
        )
    return name


def find_base(adapter: Path, base: str | None) -> Path:
    """The folder of the base that ``adapter`` belongs to; one of the hub is downloaded.

    Raises:
        ConfigError: it is neither here nor on the hub.
    """
    resolved = resolve_model(base_name(adapter, base))
    if resolved.folder is not None:
        return resolved.folder
    assert resolved.hub_id is not None
    return fetch_model(resolved.hub_id, revision=_revision(adapter) if base is None else None)


def _revision(adapter: Path) -> str | None:
    """The commit of the base that an adapter was trained on, as its run or PEFT recorded it."""
    origin = origin_of(adapter)
    return origin.revision if origin.model else open_adapter(adapter).base.revision
