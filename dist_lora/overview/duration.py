"""How many steps a set makes, and how long the plan's steps take on the machines that a config names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.plan.command import MachineRequest
from dist_lora.plan.plan import make_plan
from dist_lora.plan.speed import speed_of


@dataclass(frozen=True)
class Steps:
    """The steps of a run, and the sequences of an epoch."""

    num_steps: int
    num_steps_of_epoch: int
    num_sequences: int
    tokens_of_sequence: float  # on average
    share_filled: float | None  # of packed sequences; None where each sample is a sequence of its own

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "steps": self.num_steps,
            "steps_per_epoch": self.num_steps_of_epoch,
            "sequences_per_epoch": self.num_sequences,
            "tokens_per_sequence": round(self.tokens_of_sequence, 1),
            "filled": None if self.share_filled is None else round(self.share_filled, 4),
        }


@dataclass(frozen=True)
class Hours:
    """What the plan says of the time, at best and at worst; or in ``unknown`` why it says nothing."""

    machines: str = ""
    step_s: tuple[float, float] | None = None
    hours: tuple[float, float] | None = None
    unknown: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def steps_of(config: Config, loader: Loader, *, num_steps: int) -> Steps:
    """The steps that the loader makes of the documents.

    Raises:
        ConfigError: see ``Loader.steps_in_epoch``.
    """
    average = loader.tokens_of_sequence
    return Steps(
        num_steps=num_steps,
        num_steps_of_epoch=loader.steps_in_epoch(0),
        num_sequences=loader.num_sequences,
        tokens_of_sequence=average,
        share_filled=average / config.train.sequence_length if config.train.packing else None,
    )


def hours_of(config: Config, shape: Shape, steps: Steps) -> Hours:
    """The plan's time of a step whose sequences are as long as these are on average, times the number of steps.

    The machines are the config's, or this one's GPUs.
    """
    try:
        request = MachineRequest.of(config, None, None, None, None, None, None)
        if not request.gpus and request.here is None:
            return Hours(unknown="machine.gpu isn't set, and there is no GPU here")
        planned = make_plan(config, request.single(), shape=shape)
    except ConfigError as error:
        return Hours(unknown=str(error))
    machines = str(planned.machines)
    if not planned.fits:
        return Hours(machines, unknown=f"the run doesn't fit on {machines}; `dist-lora plan` says what would")
    tokens = max(1, round(steps.tokens_of_sequence))
    setup = replace(planned.setup, sequence_tokens=tokens)
    speed = speed_of(setup, planned.machines.gpu, context=tokens)
    if speed is None:
        return Hours(machines, unknown=f"the speed of {machines} isn't known; `dist-lora plan` takes it with --tflops")
    low, high = speed.step_s
    return Hours(machines, (low, high), (steps.num_steps * low / 3600, steps.num_steps * high / 3600))
