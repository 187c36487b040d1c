"""Which base to load beside an adapter: the one that is named, that of its run's config, or what the adapter says itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from dist_lora.base.hub import fetch_model
from dist_lora.errors import ConfigError
from dist_lora.herd.models import resolve_model
from dist_lora.lora.adapter_reader import open_adapter


@dataclass(frozen=True)
class RunOrigin:
    """What the config of the run that an adapter lies in says of it; nothing where it lies elsewhere."""

    model: str | None = None
    quant: str | None = None
    chat_template: str | None = None
    is_plain: bool = False


def origin_of(adapter: Path) -> RunOrigin:
    """The origin of an adapter, by the ``config.yaml`` beside its folder."""
    path = adapter.resolve().parent / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        model, data = settings["model"], settings["data"]
        is_plain = data.get("format") in ("text", "prompt-completion")
        template = data.get("chat_template")
        return RunOrigin(
            model=str(model["name"]),
            quant=str(model.get("quant", "none")),
            chat_template=template if isinstance(template, str) else None,
            is_plain=is_plain,
        )
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError):
        return RunOrigin()  # there is none, or it is no run's: an adapter may lie anywhere


def base_name(adapter: Path, base: str | None) -> str:
    """What to load beside ``adapter``: what was said, what its run's config says, or what the adapter itself does."""
    name = base or origin_of(adapter).model or open_adapter(adapter).base.name
    if name is None:
        raise ConfigError(f"{adapter} does not say which model it was trained on; name it: --base MODEL")
    return name


def find_base(adapter: Path, base: str | None) -> Path:
    """The folder of the base that ``adapter`` belongs to; one of the hub is fetched.

    Raises:
        ConfigError: it is neither here nor on the hub.
    """
    resolved = resolve_model(base_name(adapter, base))
    if resolved.folder is not None:
        return resolved.folder
    assert resolved.hub_id is not None
    return fetch_model(resolved.hub_id)
