"""A plan as text, for the terminal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence

from dist_lora.herd.unfrozen import describe_unfrozen
from dist_lora.plan.plan import Machines, Plan, settings_of
from dist_lora.plan.speed import flops_per_token
from dist_lora.plan.traffic import received_bytes
from dist_lora.text import GIB, count, figure, in_columns, span, time_range


def lines_of(plan: Plan) -> Iterator[str]:
    """The lines of a plan."""
    setup, machines, memory = plan.setup, plan.machines, plan.memory
    shape, train = setup.shape, plan.config.train
    kind = {2: "bf16", 4: "fp32"}[setup.item_bytes]
    stored = f"{setup.quant} base, computed in {kind}" if setup.quant != "none" else kind
    ranks = plan.config.lora.all_ranks()
    yield f"{plan.config.run}: {plan.config.model.name} ({stored}) {f'with LoRA rank {span(ranks)}' if ranks else 'without adapters'} on {machines}"
    note = "" if shape.given_parameters is None else " (as given; computed as a Llama of these sizes)"
    frozen = shape.num_parameters() - shape.unfrozen_weights(setup.unfrozen)
    yield f"  {frozen:,} frozen weights{note}, {setup.trained_weights:,} trained"
    if setup.unfrozen:
        yield f"  unfrozen  {describe_unfrozen(setup.unfrozen)}"
    if machines.assumed:
        yield f"  {_assumed(machines)}"
    for reason in setup.choices.reasons:
        yield f"  {reason}"
    for note in plan.notes:
        yield f"  note      {note}"
    yield (
        f"  batch     {setup.micro_sequences} x {train.sequence_length:,} tokens per micro-batch on each GPU, "
        f"{count(setup.accumulation_steps, 'accumulation step')}"
    )
    yield from _of_mixture(plan)
    yield ""
    yield f"Peak memory of the fullest GPU, {memory.when}:"
    parts = {
        "the base" if setup.layout.has_whole_base else "its shard of the base": memory.base,
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
    yield f"  {'total':30} {plan.device_bytes / GIB:8.2f} GiB of {machines.gpu.memory_bytes / GIB:.1f}: {plan.result}"
    host = f" of {machines.host_bytes / GIB:.0f}" if machines.host_bytes is not None else ""
    yield f"  {'host memory per node':30} {plan.host_bytes / GIB:8.2f} GiB{host}"
    yield f"  {'checkpoints':30} {plan.disk_bytes / GIB:8.2f} GiB, {memory.disk / GIB:.2f} each"
    if plan.fits:
        yield f"  {'the largest that fits':30} {_largest(plan)}"
    yield ""
    yield from _of_speed(plan)
    if not plan.fits:
        yield ""
        yield "It would fit with:" if plan.changes else "No change that was tried makes it fit."
        yield from (f"  {change}" for change in plan.changes)


def _of_mixture(plan: Plan) -> Iterator[str]:
    data = plan.config.data
    what = {"samples": "samples", "target_tokens": "trained tokens"}[data.mix]
    shares = data.shares()
    for path, share in shares.items():
        yield f"  mixture   {share:.2%} of the {what} from {path}"
    if shares and plan.config.train.steps is None and plan.steps is not None:
        yield "  mixture   the steps until each set was seen are estimated by the sizes of the files"


def _largest(plan: Plan) -> str:
    train, largest = plan.config.train, plan.largest
    share = math.ceil(train.global_batch / plan.setup.num_ranks)
    micro, length = largest.micro_batch, largest.sequence_length
    assert micro is not None and length is not None, "the plan fits"
    why_micro = ", a rank's share of a step" if micro >= share else ""
    why_length = ", the model's context" if length >= plan.setup.shape.context else ""
    return (
        f"micro_batch {micro:,} (at this sequence_length{why_micro}), "
        f"sequence_length {length:,} (at this micro_batch{why_length})"
    )


def _of_speed(plan: Plan) -> Iterator[str]:
    speed, setup = plan.speed, plan.setup
    inside, between = received_bytes(setup)
    flops = flops_per_token(setup, context=plan.config.train.sequence_length)
    step = f"A step of {setup.step_tokens:,} tokens ({flops / 1e9:,.0f} GFLOP per token)"
    if speed is None:
        yield f"{step} takes a time that isn't known, since the speed of this GPU isn't:"
        yield "  give the TFLOPS of its dense matmuls in its data sheet (without sparsity), like --tflops 150"
    else:
        slow, fast = speed.tokens_per_s
        yield f"{step} takes {time_range(*speed.step_s)}:"
        yield f"  {figure(slow)} to {figure(fast)} tokens/s over all GPUs; bound by {speed.bound_by}"
        if speed.uncounted:
            yield f"  not counted, since this GPU's aren't known: {', '.join(speed.uncounted)}"
    yield f"  each GPU receives {inside / 1e9:,.2f} GB within its node and {between / 1e9:,.3f} GB from other nodes per step"
    yield from _of_all_steps(plan)


def _of_all_steps(plan: Plan) -> Iterator[str]:
    hours, gpus = plan.hours, plan.setup.num_ranks
    if hours is not None:
        yield (
            f"  {count(plan.steps or 0, 'step')}: {time_range(3600 * hours[0], 3600 * hours[1])}, "
            f"{figure(hours[0] * gpus)} to {figure(hours[1] * gpus)} GPU hours"
        )
    price = plan.config.machine.price_per_gpu_hour
    if plan.cost is not None:
        yield f"  cost: {plan.cost[0]:,.2f} to {plan.cost[1]:,.2f}, at {price:g} per GPU hour (machine.price_per_gpu_hour)"
    elif price is not None and plan.speed is None:
        yield "  cost: unknown, since the GPU's speed is unknown"
    elif price is not None:
        yield "  cost: unknown, since the number of steps is unknown: set train.steps, or data.train to a local file"


def sweep_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """One line per plan, from the smallest memory to the largest, each ending with what to add to a command."""
    if plans and plans[0].machines.assumed:
        yield _assumed(plans[0].machines)
    rows = [("GiB per GPU", "step", "tokens/s", "dist-lora plan CONFIG ...")]
    for plan in plans:
        step, tokens = "unknown", "unknown"
        if plan.speed is not None:
            slow, fast = plan.speed.tokens_per_s
            step, tokens = time_range(*plan.speed.step_s), f"{figure(slow)} to {figure(fast)}"
        options = shlex.join([*settings_of(plan), *plan.machines.options])
        rows.append((f"{plan.device_bytes / GIB:.1f}{' (tight)' * plan.is_tight}", step, tokens, options))
    if plans:
        yield from in_columns(rows)


def _assumed(machines: Machines) -> str:
    return f"machines  {machines.assumed}: set the config's machine section, or --gpu and --gpus-per-node"
