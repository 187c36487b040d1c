"""Configs of which only the section ``lora`` matters."""

from __future__ import annotations

from typing import Any

from dist_lora.config.schema import Config, LoraSection


def config_of(section: LoraSection | None = None, **sections: Any) -> Config:
    """A config with this section; the settings that it leaves out are left out."""
    whole = {"run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x"}, **sections}
    return Config.model_validate(whole).model_copy(update={"lora": section or LoraSection()})
