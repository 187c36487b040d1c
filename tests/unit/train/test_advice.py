"""What a run is advised, by its steps and by the tokens of a step."""

from __future__ import annotations

from typing import Any

import pytest

from dist_lora.train.advice import FEW_STEPS, MANY_TOKENS, advice_lines


@pytest.mark.parametrize(
    ("num_steps", "tokens", "told"),
    [
        (FEW_STEPS, MANY_TOKENS, []),
        (FEW_STEPS - 1, 1000.0, ["99 steps are few for LoRA"]),
        (1000, MANY_TOKENS * 4.0, ["about 1,048,576 tokens: LoRA loses more"]),
        (3, MANY_TOKENS + 1.0, ["3 steps are few", "about 262,145 tokens"]),
    ],
)
def test_only_short_runs_and_large_batches_are_advised(num_steps: int, tokens: float, told: list[str]) -> None:
    lines = list(advice_lines(num_steps=num_steps, global_batch=512, target_tokens_per_step=tokens))
    assert len(lines) == len(told)
    assert all(line.startswith("advice    ") and text in line for line, text in zip(lines, told, strict=True))


def advised(**more: Any) -> str:
    return "\n".join(advice_lines(**{"num_steps": 10, "global_batch": 512, "target_tokens_per_step": 1.0, **more}))


def test_the_batch_that_is_advised_has_that_many_tokens() -> None:
    assert "train.global_batch=128, about 262,144 tokens" in advised(target_tokens_per_step=4.0 * MANY_TOKENS)
    assert "or train.global_batch below 512" in advised() and "global_batch" not in advised(global_batch=1)
    assert "Tinker" in advised() and "1 step is few" in advised(num_steps=1)
