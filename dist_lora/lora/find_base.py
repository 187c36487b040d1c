"""The base to load with an adapter: the one that is named, that of its run's config, or the one that its files name."""

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
    """What the config of an adapter's run says of it; empty where the adapter isn't in a run's folder."""

    model: str | None = None
    quant: str | None = None
    chat_template: str | None = None
    is_plain: bool = False


def origin_of(adapter: Path) -> RunOrigin:
    """The origin of an adapter, by the ``config.yaml`` next to its folder."""
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
        return RunOrigin()  # there is none, or not a run's: an adapter may be in any folder


def base_name(adapter: Path, base: str | None) -> str:
    """The base to load with ``adapter``: ``base``, that of its run's config, or the one that the adapter names."""
    name = base or origin_of(adapter).model or open_adapter(adapter).base.name
    if name is None:
        raise ConfigError(f"{adapter} doesn't say which model it was trained on; name it: --base MODEL")
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
    return fetch_model(resolved.hub_id)
