"""The work behind ``dist-lora plan --simulate``: the real step on fake tensors, compared with the plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from dist_lora.config.schema import Config
from dist_lora.plan.command import MachineRequest, check_fits
from dist_lora.plan.plan import Plan, make_plan
from dist_lora.plan.table import lines_of
from dist_lora.simulation.simulate import Simulation, as_json, simulate
from dist_lora.simulation.timeline import Limit, check_picture, write_timeline
from dist_lora.text import GIB, count, duration

log = logging.getLogger("dist_lora")


def simulate_plan(config: Config, request: MachineRequest, *, timeline: Path | None, prints_json: bool) -> None:
    """Print the plan, and memory and communication of the simulated step; with ``timeline`` draw its memory there.

    Raises:
        PlanError: the run doesn't fit; everything has been printed.
        ConfigError: see ``make_plan``; several types of machines; ``timeline`` isn't the name of a picture.
    """
    if timeline is not None:
        check_picture(timeline)
    planned = make_plan(config, request.single())
    machines, shape = planned.machines, planned.setup.shape
    log.info(f"simulating a step on {machines}: 8B takes about ten seconds on one core, 405B a minute")
    simulated = simulate(
        config,
        shape,
        num_nodes=machines.num_nodes,
        gpus_per_node=machines.gpus_per_node,
        device_bytes=machines.gpu.memory_bytes,
        device="gpu" if machines.gpu.is_gpu else "cpu",
        has_bf16=machines.gpu.has_bf16,
    )
    written = []
    if timeline is not None:
        title = f"{config.run}: {config.model.name} on {machines}"
        limit = Limit(machines.gpu.name, machines.gpu.memory_bytes, planned.reserve_bytes)
        written = write_timeline(simulated, timeline, title=title, limit=limit)
    if prints_json:
        print(json.dumps(planned.to_json() | {"simulated": as_json(simulated)}))
    else:
        print("\n".join([*lines_of(planned), "", *_lines_of(simulated, planned)]))
        for path in written:
            print(f"  {path}")
    check_fits(planned)


def _lines_of(simulated: Simulation, planned: Plan) -> Iterator[str]:
    difference = planned.memory.device / simulated.peak_bytes - 1
    yield f"The simulated step ({duration(round(simulated.seconds))}) peaks at {simulated.peak_bytes / GIB:.2f} GiB (the plan: {difference:+.1%}):"
    for kind, num_bytes in simulated.composition.items():
        if num_bytes:
            yield f"  {kind:30} {num_bytes / GIB:8.2f} GiB"
    yield "Its collectives, in bytes of whole tensors:"
    for sent in simulated.traffic:
        name = sent.kind.strip("_").removesuffix("_base")
        yield f"  {sent.count:,} x {name} over {count(sent.ranks, 'rank')} ({sent.axis}): {sent.num_bytes / 1e9:,.3f} GB"
    for assumption in simulated.assumptions:
        yield f"  assumed: {assumption}"
