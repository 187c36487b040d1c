"""Advice about a run's length and batch, from published experience with LoRA; a run follows it or not, it is only told."""

from __future__ import annotations

from collections.abc import Iterator

from dist_lora.text import count

FEW_STEPS = 100
MANY_TOKENS = 262_144

_TINKER = "Tinker's guide to supervised learning (Thinking Machines)"


def advice_lines(*, num_steps: int, global_batch: int, target_tokens_per_step: float) -> Iterator[str]:
    """A line for each thing that LoRA is known to do badly with; none for most runs.

    Sources: Tinker's guide advises at least 100 steps, better 1,000, and small batches, like 128 sequences: of 2,048 tokens
    these are ``MANY_TOKENS``. "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025) finds that LoRA loses more
    than full fine-tuning with large batches, at any rank.

    Args:
        target_tokens_per_step: the mean number of tokens that a step trains on.
    """
    if num_steps < FEW_STEPS:
        more = "set train.steps or train.epochs higher"
        if global_batch > 1:
            more += f", or train.global_batch below {global_batch}"
        yield (
            f"advice    {count(num_steps, 'step is', 'steps are')} few for LoRA: B starts at zero and needs some to grow. At least {FEW_STEPS} are "
            f"advised, better 1,000 ({_TINKER}): {more}"
        )
    if target_tokens_per_step > MANY_TOKENS:
        smaller = max(1, int(global_batch * MANY_TOKENS / target_tokens_per_step))
        yield (
            f"advice    a step trains on about {target_tokens_per_step:,.0f} tokens: LoRA loses more than full fine-tuning "
            f'with large batches, at any rank ("LoRA Without Regret", Thinking Machines). Compare with '
            f"train.global_batch={smaller:,}, about {MANY_TOKENS:,} tokens"
        )
