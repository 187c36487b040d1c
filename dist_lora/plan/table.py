"""A plan as text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_lora.plan.plan import Machines, Plan
from dist_lora.plan.speed import flops_per_token
from dist_lora.plan.traffic import received_bytes
from dist_lora.text import GIB, span


def lines_of(plan: Plan) -> Iterator[str]:
    """The lines of a plan."""
    setup, machines, memory = plan.setup, plan.machines, plan.memory
    shape, train = setup.shape, plan.config.train
    kind = {2: "bf16", 4: "fp32"}[setup.item_bytes]
    stored = f"{setup.quant} base, computed in {kind}" if setup.quant != "none" else kind
    yield f"{plan.config.run}: {plan.config.model.name} ({stored}) with LoRA rank {span(plan.config.lora.ranks())} on {machines}"
    note = "" if shape.given_parameters is None else " (as given; computed as a Llama of these sizes)"
    yield f"  {shape.num_parameters():,} frozen weights{note}, {setup.trained_weights:,} trained"
    if machines.assumed:
        yield f"  {_assumed(machines)}"
    for reason in setup.choices.reasons:
        yield f"  {reason}"
    for note in plan.notes:
        yield f"  note      {note}"
    yield (
        f"  batch     {train.micro_batch} x {train.sequence_length:,} tokens per micro-batch on each GPU, "
        f"{setup.accumulation_steps} accumulation step{'s' * (setup.accumulation_steps > 1)}"
    )
    yield ""
    yield f"Peak memory of the fullest GPU, {memory.when}:"
    parts = {
        "its shard of the base": memory.base,
        "adapters, gradients, AdamW": memory.adapters + memory.gradients + memory.optimizer,
        "all-gathered base weights": memory.gathered,
        "activations": memory.activations,
        "logits": memory.loss,
        "gradients of activations": memory.workspace,
        "CUDA, NCCL, fragmentation": plan.reserve_bytes,
    }
    for name, num_bytes in parts.items():
        if num_bytes:
            yield f"  {name:30} {num_bytes / GIB:8.2f} GiB"
    result = "fits" if plan.fits else "doesn't fit"
    yield f"  {'total':30} {plan.device_bytes / GIB:8.2f} GiB of {machines.gpu.memory_bytes / GIB:.1f}: {result}"
    host = f" of {machines.host_bytes / GIB:.0f}" if machines.host_bytes is not None else ""
    yield f"  {'host memory per node':30} {plan.host_bytes / GIB:8.2f} GiB{host}"
    yield f"  {'checkpoints':30} {plan.disk_bytes / GIB:8.2f} GiB, {memory.disk / GIB:.2f} each"
    yield ""
    yield from _of_speed(plan)
    if not plan.fits:
        yield ""
        yield "It would fit with:" if plan.changes else "No change that was tried makes it fit."
        yield from (f"  {change}" for change in plan.changes)


def _of_speed(plan: Plan) -> Iterator[str]:
    speed, setup = plan.speed, plan.setup
    inside, between = received_bytes(setup)
    low, high = speed.step_s
    slow, fast = speed.tokens_per_s
    flops = flops_per_token(setup, context=plan.config.train.sequence_length)
    yield f"A step of {speed.tokens_per_step:,} tokens ({flops / 1e9:,.0f} GFLOP per token) takes {low:.3g} to {high:.3g} s:"
    yield f"  {slow:,.0f} to {fast:,.0f} tokens/s over all GPUs; bound by {speed.bound_by}"
    yield f"  each GPU receives {inside / 1e9:,.2f} GB within its node and {between / 1e9:,.3f} GB from other nodes per step"
    hours, gpus = plan.hours, setup.num_ranks
    if hours is not None:
        yield (
            f"  {plan.steps:,} steps: {hours[0]:,.2g} to {hours[1]:,.2g} hours, "
            f"{hours[0] * gpus:,.3g} to {hours[1] * gpus:,.3g} GPU hours"
        )
    price = plan.config.machine.price_per_gpu_hour
    if plan.cost is not None:
        yield f"  cost: {plan.cost[0]:,.2f} to {plan.cost[1]:,.2f}, at {price:g} per GPU hour (machine.price_per_gpu_hour)"
    elif price is not None:
        yield "  cost: unknown, since the number of steps is unknown: set train.steps, or data.train to a local file"


def sweep_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """One line per plan, from the smallest memory to the largest."""
    if plans and plans[0].machines.assumed:
        yield _assumed(plans[0].machines)
    yield f"{'GiB per GPU':>11}  {'step, s':>14}  {'tokens/s':>20}  with"
    for plan in plans:
        (low, high), (slow, fast) = plan.speed.step_s, plan.speed.tokens_per_s
        setup, layout = plan.setup, plan.setup.layout
        options = (
            f"{plan.machines}: quant {setup.quant}, {layout.engine}, base_shard {layout.base_shard}, "
            f"micro_batch {plan.config.train.micro_batch}, recompute {str(setup.recompute).lower()}"
        )
        steps, tokens = f"{low:.3g}-{high:.3g}", f"{slow:,.0f}-{fast:,.0f}"
        yield f"{plan.device_bytes / GIB:11.1f}  {steps:>14}  {tokens:>20}  {options}"


def _assumed(machines: Machines) -> str:
    return f"machines  {machines.assumed}: set the config's machine section, or --gpu and --gpus-per-node"
