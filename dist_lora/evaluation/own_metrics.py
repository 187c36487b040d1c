"""Metrics of the user's own: functions of an expected and a generated answer, averaged over the samples."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_lora.config.schema import Config
from dist_lora.errors import OwnCodeError
from dist_lora.evaluation.predictions import Prediction
from dist_lora.own_code import OwnCode, all_of, check_arguments, load_code
from dist_lora.world.world import World

SETTING = "eval.metrics"
_ARGUMENTS = ("expected", "generated", "prompt")


@dataclass(frozen=True)
class OwnMetric:
    """One function that ``eval.metrics`` names; ``num_arguments`` is 3 if it takes the prompt too."""

    code: OwnCode
    num_arguments: int

    @property
    def name(self) -> str:
        """Under which its mean is reported."""
        return self.code.name

    def of(self, prediction: Prediction, *, sample: int) -> float:
        """Its value for one answer; ``sample`` counts from 0, for errors.

        Raises:
            OwnCodeError: it raised an error, or returned no finite number.
        """
        texts = (prediction.expected, prediction.generated, prediction.prompt)[: self.num_arguments]
        where = f"{SETTING}: held-out sample {sample + 1:,}"
        try:
            value = self.code.value(*texts)
        except Exception as error:
            raise OwnCodeError(f"{where}: {self.code.raised(error)}") from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise OwnCodeError(f"{where}: {self.code.path} returned {value!r:.60}, expected a finite number")
        return float(value)


class Scores:
    """The values of all metrics for the samples of this rank."""

    def __init__(self, metrics: Sequence[OwnMetric], *, num_samples: int, world: World) -> None:
        self._metrics, self._world = metrics, world
        self._values = torch.zeros(len(metrics), num_samples, dtype=torch.float64)

    def add(self, sample: int, prediction: Prediction) -> None:
        """Judge the answer to a sample, which counts from 0 over all ranks."""
        for row, metric in enumerate(self._metrics):
            self._values[row, sample] = metric.of(prediction, sample=sample)

    def means(self) -> dict[str, float]:
        """The mean of each metric over all samples, the same number on any number of ranks. All ranks call it.

        Each sample is one rank's, and zero on the others, so that the sum over ranks adds nothing up; the sum over samples is
        rounded once (``math.fsum``).
        """
        if not self._metrics:
            return {}
        values = self._world.sum(self._values.to(self._world.device)).cpu()
        return {
            metric.name: math.fsum(row.tolist()) / len(row) for metric, row in zip(self._metrics, values, strict=True)
        }


def own_metrics(config: Config) -> list[OwnMetric]:
    """The functions that ``eval.metrics`` names, imported.

    Raises:
        ConfigError: some can't be imported, or don't take an expected and a generated answer; all faults.
    """
    return all_of([functools.partial(_load, path) for path in config.eval.metrics])


def _load(path: str) -> OwnMetric:
    code = load_code(path, setting=SETTING)
    check_arguments(code, code.value, arguments=_ARGUMENTS[:2] if not _takes_prompt(code) else _ARGUMENTS)
    return OwnMetric(code, 3 if _takes_prompt(code) else 2)


def _takes_prompt(code: OwnCode) -> bool:
    """Whether a function has a parameter called ``prompt``, its third."""
    try:
        return list(inspect.signature(code.value).parameters)[2:3] == ["prompt"]
    except (TypeError, ValueError):
        return False
