"""A judge's words, and what is taken of what it prints; runs with one are in ``tests/ranks/test_evaluations.py``."""

from __future__ import annotations

import re

import pytest

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.train.judge import OWN_NAMES, check_command, read_numbers, words_of


def test_words_are_a_shell_s_and_places_are_filled_in_within_them() -> None:
    facts = {"adapter": "/runs/my run/step-4", "run": "/runs/my run", "step": "4"}
    command = "judge --adapter={adapter} '{\"other\": 1}' 'two words' {step}"
    assert words_of(command, facts) == ["judge", "--adapter=/runs/my run/step-4", '{"other": 1}', "two words", "4"]


def test_the_last_line_counts() -> None:
    output = 'loading\n{"score": 1}\n{"score": 0.5, "by/tool": 3, "n": -1e3}\n\n'
    assert read_numbers(output, taken=OWN_NAMES) == {"eval_score": 0.5, "eval_by/tool": 3.0, "eval_n": -1000.0}


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("", "has printed nothing; expected one JSON object of numbers"),
        ("\n \n", "has printed nothing"),
        (
            '{"a": 1}\nbye',
            "has printed 'bye' last; expected one JSON object of numbers, like {\"score\": 0.5}, as the last line",
        ),
        ("[1]", "has printed '[1]' last"),
        ("{}", "has printed '{}' last"),
        ("7", "has printed '7' last"),
        ('{"a": 1', "has printed '{\"a\": 1' last"),
        (
            '{"a": "x", "b": true, "c": NaN, "d": 1, "e": null}',
            '4 values that can\'t be recorded: a: "x", which is no finite number; b: true',
        ),
        ('{"a": 1e999}', "a: Infinity, which is no finite number"),
        (f'{{"a": {10**400}}}', "which is no finite number"),
        ('{"a b": 1}', "1 value that can't be recorded: the name 'a b' (letters, digits"),
        ('{"loss": 1}', "the name 'loss', which the evaluation has itself"),
        ('{"loss/long": 1}', "the name 'loss/long', which the evaluation has itself"),
    ],
)
def test_what_are_no_numbers_is_told(output: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        read_numbers(output, taken=OWN_NAMES | {"eval_loss/long"})


def test_a_program_that_is_not_there_is_refused_before_anything_is_loaded() -> None:
    settings = {"run": "it", "model": {"name": "3.2-1b"}, "data": {"train": "x"}}
    for command in (None, "python judge.py", "/bin/sh -c true"):
        check_command(Config.model_validate({**settings, "eval": {"command": command}}))
    with pytest.raises(ConfigError, match=r"eval.command: 'no-such-judge' is no program that this process finds"):
        check_command(Config.model_validate({**settings, "eval": {"command": "no-such-judge {adapter}"}}))
