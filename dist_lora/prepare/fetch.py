"""The work behind ``fetch``: everything that a config names on the hub, in the caches that ``train`` reads."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from dist_lora.base.hub import fetch_model, missing_bytes
from dist_lora.base.index import open_index
from dist_lora.config.schema import Config
from dist_lora.data.chat import check_template, load_tokenizer
from dist_lora.data.columnar import LoadedRows
from dist_lora.data.columns import sources_of
from dist_lora.data.own_format import own_format
from dist_lora.data.records import named_format
from dist_lora.data.sources import read_records
from dist_lora.errors import SaveError
from dist_lora.herd.models import refuse_shape, resolve_model
from dist_lora.text import gib, size

OFFLINE = "HF_HUB_OFFLINE=1"


def fetch_all(config: Config, *, report: Callable[[str], None]) -> None:
    """``dist-lora fetch``: model, tokenizer and data in their caches, each opened as ``train`` opens it.

    Downloads what is missing and asks the hub for newer versions of the rest. ``report`` is given a line for each.

    Raises:
        ConfigError: the hub has no such model, access to it is refused, or there is no network.
        DataError: a data set can't be fetched or is of no known format.
        WeightsError: what was fetched is damaged.
        SaveError: the model needs more space than is free.
    """
    folder = _fetch_base(config, report)
    tokenizer = load_tokenizer(folder, chat_template=config.data.chat_template)
    report(f"tokenizer  {len(tokenizer):,} tokens, in {folder}")
    section = config.data
    own = own_format(section.format)
    fmt = None if own is not None else named_format(section.format)
    if own is not None:
        report(str(own.code))
    for which in ("train", *(f"eval.{name}".rstrip(".") for name in section.eval_files())):
        names, readings = sources_of(section, which)
        records = read_records(names, fmt=fmt, which=which, readings=readings, own=own)
        check_template(tokenizer, formats=records.formats)
        for source, start, stop in zip(records.sources, records.starts, records.starts[1:], strict=False):
            where = source.folder if isinstance(source, LoadedRows) else Path(source.name).absolute()
            report(f"data       data.{which}: {source.name}: {stop - start:,} records, in {where}")
    report(f"\nNo network is needed from now on, with the same caches:\nexport {' '.join(_environment())}")


def _fetch_base(config: Config, report: Callable[[str], None]) -> Path:
    refuse_shape(config.model)
    resolved = resolve_model(config.model.name)
    if resolved.folder is not None:
        folder, what = resolved.folder, "a folder, nothing to fetch"
    else:
        assert resolved.hub_id is not None
        _check_space(resolved.hub_id)
        folder = fetch_model(resolved.hub_id)
        what = f"{resolved.hub_id} at {folder.name[:12]}"
    num_bytes = open_index(folder, allow_bytes=True).num_bytes  # also checks that all of its files are whole
    report(f"model      {config.model.name}: {what}, {size(num_bytes)} of weights, in {folder.absolute()}")
    return folder


def _check_space(hub_id: str) -> None:
    missing, cache = missing_bytes(hub_id)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise SaveError(
            f"{hub_id} needs {gib(missing)} more in the hub's cache, {cache}, and {gib(free)} are free there. Free some "
            "space, or set HF_HOME to another disk, here and where it is trained."
        )


def _environment() -> list[str]:
    """What to set where the run is started: no requests, and the caches where they were moved to."""
    moved = [name for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE") if os.environ.get(name)]
    return [OFFLINE, *(f"{name}={shlex.quote(os.environ[name])}" for name in moved)]
