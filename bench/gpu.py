"""A training step of a few layers of 8B on one GPU: its memory beside the plan's, its speed beside a large product's.

    python -m bench.gpu                       # 4 layers of 8B, 2 x 4,096 tokens, with and without recomputation
    python -m bench.gpu --quant nf4
    python -m bench.gpu --offload base        # layers in host memory: as fast as the copies or the products, the slower of both

Weights are random and made on the GPU; nothing is read. Rates are of one run: tokens/s, and the share of what a product of 8,192 x
8,192 matrices reaches in the same process. Time for a whole model is scaled by its layers, without the embedding's and the head's
part, which is measured once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lora.base.index import WeightIndex
from dist_lora.base.llama import Llama
from dist_lora.base.quant.published import BaseOnDisk
from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import Config
from dist_lora.engines.precision import set_products
from dist_lora.herd.members import MEMBERS
from dist_lora.layout.memory import memory_of, setup_of
from dist_lora.lora.origin import BaseIdentity
from dist_lora.plan.speed import flops_per_token
from dist_lora.simulation.simulate import full_batches
from dist_lora.train.build import Base, Trainee, shard_model
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World, device_bytes

LAYERS, STEPS, PRODUCT = 4, 5, 8192


@dataclass(frozen=True)
class Measured:
    """A step on this GPU: bytes at its peak, as measured and as planned, and seconds."""

    config: Config
    peak_bytes: int
    planned_bytes: int
    step_s: float
    tokens: int


def config_of(**settings: dict[str, Any]) -> Config:
    """A config of full sequences on one GPU; sections are given as mappings."""
    tree: dict[str, Any] = {
        "run": "gpu",
        "model": {"name": "3.1-8b-instruct"},
        "data": {"train": "-"},
        "train": {"steps": STEPS, "global_batch": 2, "micro_batch": 2, "sequence_length": 4096},
        "parallel": {"engine": "none"},
    }
    for section, values in settings.items():
        tree[section] = {**tree.get(section, {}), **values}
    return Config.model_validate(tree)


def measure(config: Config, *, num_layers: int = LAYERS) -> Measured:
    """Run some steps of the config's model with ``num_layers`` layers and random weights."""
    world = World.alone()
    assert world.device.type == "cuda", "this measures a GPU"
    set_products(is_deterministic=False)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    member = MEMBERS[config.model.name]
    shape = dataclasses.replace(member.shape, num_layers=num_layers)
    sharded = shard_model(config, shape, world, name=config.model.name)
    model, engine = sharded.model, sharded.engine
    engine.materialize(model)
    _fill(model, {(slot.name, slot.part): slot.destination for slot in engine.slots(model)}, world)
    adapters = engine.adapters(sharded.tensors)
    adapters.initialize(0)
    adapters.start_training(config.optim)
    base = Base(Path(), {}, shape, BaseOnDisk(WeightIndex(Path(), {}), {}), None, BaseIdentity(member.name))
    trainee = Trainee(base, model, engine, adapters, sharded.choices.attention, sharded.precision, {})
    loader = full_batches(config, world)
    step = TrainStep(config, trainee, loader=loader, num_steps=10 * STEPS, saver=Saver(world), world=world)
    model.train()
    step.take(1)
    step.take(2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started_s = time.perf_counter()
    for number in range(3, 3 + STEPS):
        line, _ = step.take(number)
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - started_s) / STEPS
    setup = setup_of(config, shape, num_nodes=1, gpus_per_node=1, device_bytes=device_bytes(world))
    return Measured(
        config, torch.cuda.max_memory_allocated() - before, memory_of(setup).device, step_s, int(line["tokens"])
    )


def _fill(model: Llama, destinations: dict[tuple[str, str], Tensor], world: World) -> None:
    """Random weights, of which the parts and places are as in a run; norms are ones."""
    for name, linear in model.linears().items():
        width = (linear.out_features, linear.in_features)
        rows = torch.randn(width, device=world.device, dtype=model.model.embed_tokens.weight.dtype) * 0.02
        for part, values in linear.fmt.quantize_rows(rows).items():
            destinations.pop((f"{name}.weight", part)).copy_(values.view(-1))
        del rows
    for (name, _), values in destinations.items():
        if "norm" in name:
            values.fill_(1.0)
        else:
            values.normal_(0, 0.02)


def product_flops_per_s(size: int = PRODUCT) -> float:
    """FLOP/s of a large bf16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(20):
        a @ b
    last.record()
    last.synchronize()
    return 20 * 2 * size**3 / (first.elapsed_time(last) / 1e3)


def main() -> None:
    """Print the table, with the card and the versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", choices=["none", "nf4", "int8"], default="none")
    parser.add_argument("--offload", choices=["none", "base", "optimizer", "all"], default="none")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    product = product_flops_per_s()
    print(f"A product of {PRODUCT:,} x {PRODUCT:,} in bf16: {product / 1e12:.0f} TFLOP/s\n")
    print("| recomputation | peak | planned | tokens/s, of 4 layers | of the product's speed |")
    print("|---|---|---|---|---|")
    for recompute in (True, False):
        config = config_of(
            model={"quant": options.quant},
            train={"activation_checkpointing": recompute},
            parallel={"offload": options.offload},
        )
        found = measure(config)
        shape = dataclasses.replace(MEMBERS[config.model.name].shape, num_layers=LAYERS)
        setup = setup_of(config, shape, num_nodes=1, gpus_per_node=1, device_bytes=2**40)
        flops = flops_per_token(setup, context=config.train.sequence_length) * found.tokens
        print(
            f"| {'on' if recompute else 'off'} | {found.peak_bytes / 2**30:.2f} GiB | {found.planned_bytes / 2**30:.2f} GiB | "
            f"{found.tokens / found.step_s:,.0f} | {flops / found.step_s / product:.0%} |"
        )


if __name__ == "__main__":
    main()
