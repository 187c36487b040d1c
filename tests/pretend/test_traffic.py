"""What the count of a step takes from formulas, against the simulated step of the real engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.traffic.cuda import bytes_of, tensors_of
from bench.traffic.totals import gather_copies_bytes
from dist_lora.config.schema import Config
from dist_lora.herd.members import MEMBERS
from dist_lora.layout.memory import setup_of
from dist_lora.simulation import simulate
from dist_lora.simulation.tracker import Tracker

GIB = 2**30


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_copies_around_gathers_are_those_that_fsdp2_makes(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied_bytes = []

    class Copies(Tracker):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "fsdp::all_gather_copy_in":
                copied_bytes.append(2 * sum(map(bytes_of, args[0])))
            elif func._schema.name == "fsdp::split_with_sizes_copy":
                copied_bytes.append(bytes_of(args[0]) + sum(map(bytes_of, tensors_of(kwargs["out"]))))
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(simulate, "Tracker", Copies)
    shape = replace(
        MEMBERS["3.1-8b"].shape, hidden=256, ffn=512, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, vocab=1024
    )
    config = Config.model_validate(
        {
            "run": "t",
            "model": {"name": "3.1-8b", "quant": quant},
            "data": {"train": "unused"},
            "train": {"micro_batch": 1, "global_batch": 8, "sequence_length": 64},
            "parallel": {"base_shard": "node"},
        }
    )
    simulate.simulate(config, shape, num_nodes=1, gpus_per_node=8, device_bytes=80 * GIB)
    setup = setup_of(config, shape, num_nodes=1, gpus_per_node=8, device_bytes=80 * GIB)
    assert gather_copies_bytes(setup) == sum(copied_bytes) > 0
