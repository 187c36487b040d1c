"""What a plan takes from the adapter that a run is to start from: no base is opened, and maybe the adapter is elsewhere."""

from __future__ import annotations

import logging

from dist_lora.config.schema import Config
from dist_lora.files import file_exists
from dist_lora.herd.models import known_model
from dist_lora.lora.origin import CONFIG_FILE
from dist_lora.lora.patterns import with_linears

log = logging.getLogger("dist_lora")


def with_adapter(config: Config) -> Config:
    """The config with the settings that it leaves to the adapter of ``lora.start_from``, and with its patterns resolved.

    An adapter that isn't on this machine, on which nothing is trained, is a warning.

    Raises:
        ConfigError, AdapterError: see ``open_adapter``, ``check_fit`` and ``with_patterns``.
    """
    folder = config.lora.start_from
    if folder is None:
        if not config.lora.has_patterns and config.train.unfreeze is None:
            return config  # whose model may not be here yet
        return with_linears(config, known_model(config.model).shape)
    if not file_exists(folder / CONFIG_FILE):
        log.warning(
            f"lora.start_from: {folder} isn't on this machine. The plan takes rank {config.lora.rank} on "
            f"{' '.join(config.lora.target_names())}; the run takes what the adapter has"
        )
        return config
    # These import torch, which a plan without an adapter does without.
    from dist_lora.lora.adapter_reader import open_adapter
    from dist_lora.lora.fit import check_fit, with_settings_of

    adapter = open_adapter(folder)
    shape = known_model(config.model).shape
    check_fit(adapter, config=config, shape=shape)
    return with_linears(with_settings_of(config, adapter), shape)
