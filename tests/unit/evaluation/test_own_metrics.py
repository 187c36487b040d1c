"""Metrics of the user's own are called with what they ask for, and what isn't a number is named."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, OwnCodeError
from dist_lora.evaluation.own_metrics import Scores, own_metrics
from dist_lora.evaluation.predictions import Prediction
from dist_lora.evaluation.tool_calls import Counts, ToolCalls
from dist_lora.evaluation.verdicts import Sample, guard_report
from dist_lora.world.world import World


def config_of(*metrics: str) -> Config:
    return Config.model_validate(
        {"run": "a", "model": {"name": "b"}, "data": {"train": "c"}, "eval": {"metrics": list(metrics)}}
    )


def test_each_is_called_with_what_it_takes_and_the_mean_is_rounded_once() -> None:
    metrics = own_metrics(config_of("tests.own:length", "tests.own:prompted"))
    scores = Scores(metrics, num_samples=3, world=World.alone())
    for sample in range(3):
        scores.add(sample, Prediction("p" * sample, "e", "g" * (sample + 1), is_correct=False))
    means = scores.means()
    exact = sum(map(Fraction, (1 / 2, 1 / 3, 1 / 4)))
    assert means == {"length": 2.0, "prompted": float(exact) / 3}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_number", "returned 'good', expected a finite number"),
        ("not_finite", "returned nan, expected a finite number"),
        ("fails", "raised KeyError: 'missing' ("),
    ],
)
def test_what_is_no_number_is_told_with_its_sample(name: str, told: str) -> None:
    (metric,) = own_metrics(config_of(f"tests.own:{name}"))
    with pytest.raises(OwnCodeError) as caught:
        metric.of(Prediction("p", "e", "g", is_correct=False), sample=6)
    assert str(caught.value).startswith(f"eval.metrics: held-out sample 7: tests.own:{name} {told}")
    assert caught.value.exit_code == 2


def test_one_that_takes_too_little_is_refused_before_anything_is_generated() -> None:
    with pytest.raises(ConfigError) as caught:
        own_metrics(config_of("tests.own:one_argument", "tests.own:not_there"))
    first, second = str(caught.value).splitlines()
    assert first == (
        "eval.metrics: tests.own:one_argument takes (expected: 'str') -> 'float', and it is called with (expected, generated)"
    )
    assert "has no not_there" in second


def test_two_of_one_name_or_one_of_ours_are_refused() -> None:
    calls = ToolCalls({"f": Counts(wanted=1)}, answers=2, without=1)
    verdicts = guard_report([Sample((), ())], np.zeros(1))
    ours = [
        "loss",
        "exact_match",
        *(name.removeprefix("eval_") for name in calls.values()),
        *{*verdicts} - {"by_category"},
    ]
    assert {"tool_valid", "tool_unwanted", "average_precision"} <= {*ours}
    for metrics, name in ((("a:f", "b:f"), "f"), *(((f"a:{name}",), name) for name in ours)):
        with pytest.raises(ValueError, match=f"{name}: the name of another value of an evaluation"):
            config_of(*metrics)
