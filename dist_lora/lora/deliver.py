"""What ``gather`` and ``merge`` say and do with a folder that is ready: who can serve it, and its way to the hub. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lora.lora.push import push
from dist_lora.lora.servers import Served, lines_of, warning_of

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class Delivery:
    """Where a folder goes, and how that is told. ``again``: how to push it again, in an error."""

    repository: str | None
    is_public: bool
    is_json: bool
    again: str


def deliver(folder: Path, summary: str, *, served: Sequence[Served], delivery: Delivery) -> None:
    """Print what was made and which servers take it, and push it if that was asked for.

    Raises:
        ConfigError, SaveError: see ``push``.
    """
    if not delivery.is_json:
        print("\n".join([summary, *lines_of(served)]), flush=True)
    if warning := warning_of(served):
        log.warning(f"{folder}: {warning}")
    address = None
    if delivery.repository is not None:
        address = push(folder, repository=delivery.repository, is_public=delivery.is_public, again=delivery.again)
        if not delivery.is_json:
            print(f"pushed: {address}", flush=True)
    if delivery.is_json:
        servers = [each.to_json() for each in served]
        print(json.dumps({"folder": str(folder), "servers": servers, "pushed": address}), flush=True)
