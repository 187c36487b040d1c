"""The work behind ``dist-lora plan --simulate``: the real step on pretended tensors, beside what the plan says of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from dist_lora.config.schema import Config
from dist_lora.plan.command import Fleets, refuse_what_does_not_fit
from dist_lora.plan.plan import Plan, make_plan
from dist_lora.plan.table import lines_of
from dist_lora.simulation.simulate import Simulation, as_json, simulate
from dist_lora.simulation.timeline import Limit, check_picture, write_timeline
from dist_lora.text import GIB

log = logging.getLogger("dist_lora")


def simulate_plan(config: Config, fleets: Fleets, *, timeline: Path | None, prints_json: bool) -> None:
    """Print the plan and what the simulated step holds and sends; with ``timeline`` draw it there.

    Raises:
        PlanError: the run does not fit; all has been printed.
        ConfigError: see ``make_plan``; several kinds of machines; ``timeline`` is no picture's name.
    """
    if timeline is not None:
        check_picture(timeline)
    found = make_plan(config, fleets.single())
    machines, shape = found.machines, found.setup.shape
    log.info(f"simulating a step on {machines}: 8B takes some ten seconds of one core, 405B a minute")
    simulated = simulate(
        config,
        shape,
        num_nodes=machines.num_nodes,
        gpus_per_node=machines.gpus_per_node,
        device_bytes=machines.gpu.memory_bytes,
        device="gpu" if machines.gpu.is_gpu else "cpu",
    )
    written = []
    if timeline is not None:
        title = f"{config.run}: {config.model.name} on {machines}"
        limit = Limit(machines.gpu.name, machines.gpu.memory_bytes, found.reserve_bytes)
        written = write_timeline(simulated, timeline, title=title, limit=limit)
    if prints_json:
        print(json.dumps(found.to_json() | {"simulated": as_json(simulated)}))
    else:
        print("\n".join([*lines_of(found), "", *_lines_of(simulated, found)]))
        for path in written:
            print(f"  {path}")
    refuse_what_does_not_fit(found)


def _lines_of(simulated: Simulation, planned: Plan) -> Iterator[str]:
    off = planned.memory.device / simulated.peak_bytes - 1
    yield f"The simulated step ({simulated.seconds:.0f} s) holds {simulated.peak_bytes / GIB:.2f} GiB at most (the plan: {off:+.1%}):"
    for kind, num_bytes in simulated.composition.items():
        if num_bytes:
            yield f"  {kind:30} {num_bytes / GIB:8.2f} GiB"
    yield "It sends, of whole tensors:"
    for each in simulated.traffic:
        name = each.kind.strip("_").removesuffix("_base")
        yield f"  {each.count:,} x {name} over {each.ranks} ranks ({each.axis}): {each.num_bytes / 1e9:,.3f} GB"
    for sentence in simulated.pretended:
        yield f"  pretended: {sentence}"
