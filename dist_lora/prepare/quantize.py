"""The work behind ``quantize``: a base found, stored in NF4, with the identity of the original beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dist_lora.base.hub import fetch_model
from dist_lora.base.quant.writer import quantize_base
from dist_lora.herd.models import resolve_model
from dist_lora.lora.origin import identify_base
from dist_lora.pace import pace
from dist_lora.text import size


def quantize_model(model: str, *, out: Path) -> str:
    """``dist-lora quantize``: writes ``out`` and returns what to tell the user.

    Raises:
        ConfigError: no such model, it can't be stored in NF4, or ``out`` exists.
        WeightsError: the model is damaged.
        SaveError: not enough space, or the system refuses to write.
    """
    resolved = resolve_model(model)
    folder, revision = resolved.folder, None
    if folder is None:
        assert resolved.hub_id is not None
        folder = fetch_model(resolved.hub_id)
        revision = folder.name  # the hub's cache names a snapshot by its commit
    identity = identify_base(folder, name=resolved.hub_id, revision=revision)
    with pace("quantizing", unit=size) as advance:
        report = quantize_base(folder, out=out, identity=dataclasses.asdict(identity), on_progress=advance)
    return (
        f"{out}: {report.linears:,} linears in nf4, {size(report.bytes_after)} instead of {size(report.bytes_before)}, "
        f"in {report.seconds:.1f} s\nto train on it: model.name={out.absolute()} model.quant=nf4"
    )
