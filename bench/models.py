"""What the shipped configs need and how fast they will be, by the plan: ``python -m bench.models`` prints README's table."""

from __future__ import annotations

import argparse

from dist_lora.plan.presets import SHIPPED, presets
from dist_lora.text import GIB, time_range

TOKENS = 10_000_000


def main() -> None:
    """Print a line for each config."""
    print(
        "| config | GPUs | sequences x tokens per GPU | GiB per GPU | tokens/s | 10 million tokens take |\n|---|---|---|---|---|---|"
    )
    for name in SHIPPED:
        preset = presets()[name]
        plan, gpu, train = preset.plan, preset.machine.gpu, preset.config.train
        assert plan.speed is not None, f"{gpu.name} is in the table, with its speed"
        slow, fast = plan.speed.tokens_per_s
        print(
            f"| `{name}` | {plan.machines} | {train.micro_batch} x {train.sequence_length:,} | {plan.device_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} | "
            f"{slow:,.0f} to {fast:,.0f} | {time_range(TOKENS / fast, TOKENS / slow)} |"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
