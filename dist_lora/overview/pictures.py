"""The overview as text: tables, a histogram in bars, samples with their targets marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dist_lora.config.schema import Config
from dist_lora.data.chat import print_sample
from dist_lora.data.duplicates import Duplicates, shared_line
from dist_lora.data.token_set import TokenSet
from dist_lora.overview.duration import Hours, Steps
from dist_lora.overview.figures import Bar, SetFigures
from dist_lora.text import count, figure, first_few, in_columns, time_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAR_WIDTH = 40  # characters of the longest bar
MAX_SHOWN = 2000  # tokens of a sample
_PARTS = " ▏▎▍▌▋▊▉█"  # eighths of a character


def lines_of(config: Config, sets: Mapping[str, SetFigures], steps: Steps, hours: Hours) -> Iterator[str]:
    """The overview, in lines."""
    for name, figures in sets.items():
        yield from _of_set(name, figures, config)
        yield ""
    yield from _of_training(config, steps, hours)


def print_document(tokens: TokenSet, index: int, *, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a document with what is trained on marked; of a long one the begin."""
    ids, is_target = tokens.document(index)
    print_sample(
        ids[:MAX_SHOWN].tolist(),
        is_target[:MAX_SHOWN].tolist(),
        tokenizer=tokenizer,
        title=f"\nSample {tokens.sample_ids[index] + 1:,}: {count(len(ids), 'token')}, {tokens.num_targets[index]:,} trained on "
        "(green, or between ⟦ and ⟧)\n",
    )
    if len(ids) > MAX_SHOWN:
        print(f"... and {count(len(ids) - MAX_SHOWN, 'token')} more")


def _of_set(name: str, figures: SetFigures, config: Config) -> Iterator[str]:
    counts = figures.counts
    yield f"{name}  {first_few(figures.sources)}"
    is_part = figures.num_documents + counts.num_too_long + counts.num_without_targets < counts.num_samples
    yield (
        f"  samples     {figures.num_documents:,}"
        + (f" of {counts.num_samples:,}" if is_part else "")
        + _dropped(figures)
    )
    share = figures.num_targets / figures.num_tokens
    yield f"  tokens      {figures.num_tokens:,}, {figures.num_targets:,} trained on ({share:.1%})"
    if counts.num_truncated:
        yield f"  truncated   {_truncated(figures, config)}"
    yield f"  duplicates  {_duplicates(figures.duplicates, figures.num_documents)}"
    if figures.shared is not None:
        yield f"  in train    {_in_train(figures.shared, figures.num_documents)}"
    for what, number in sorted(counts.unused.items(), key=lambda item: -item[1]):
        yield f"  remark      {what} (in {number:,} of {count(counts.num_samples, 'sample')})"
    yield ""
    heads = [{0: "least", 50: "median", 100: "most"}.get(percent, f"{percent}%") for percent in figures.lengths]
    rows = [["tokens of a sample", *heads]]
    for title, values in (("all", figures.lengths), ("trained on", figures.targets)):
        rows.append([title, *(f"{value:,}" for value in values.values())])
    yield from in_columns(rows, indent="  ", has_numbers=True)
    yield ""
    yield from _histogram(figures.bars)


def _dropped(figures: SetFigures) -> str:
    counts = figures.counts
    reasons = [
        f"{number:,} {why}"
        for number, why in ((counts.num_too_long, "too long"), (counts.num_without_targets, "without target tokens"))
        if number
    ]
    return f"; of {counts.num_samples:,} read, dropped {' and '.join(reasons)}" if reasons else ""


def _truncated(figures: SetFigures, config: Config) -> str:
    counts = figures.counts
    lost = (
        (counts.num_cut_answers, "the end of an answer and its end token"),
        (counts.num_lost_answers, "a whole answer"),
    )
    losses = [f"{number:,} lost {what}" for number, what in lost if number]
    return (
        f"{counts.num_truncated:,} of {count(counts.num_samples, 'sample')}, to {config.train.sequence_length:,} tokens: "
        f"{', '.join(losses) or 'they lost text that is not trained on'}"
    )


def _duplicates(duplicates: Duplicates, num_documents: int) -> str:
    if not duplicates.num_documents:
        return "none"
    examples = ", ".join(f"{later + 1:,} equals {earlier + 1:,}" for later, earlier in duplicates.examples)
    more = ", ..." if duplicates.num_documents > len(duplicates.examples) else ""
    equal = count(duplicates.num_documents, "sample equals", "samples equal")
    return f"{equal} an earlier one ({duplicates.num_documents / num_documents:.1%}): {examples}{more}"


def _in_train(shared: Duplicates, num_documents: int) -> str:
    return shared_line(shared, num_documents) if shared.num_documents else "none"


def _histogram(bars: tuple[Bar, ...]) -> Iterator[str]:
    most = max(bar.num_documents for bar in bars)
    rows = [["tokens", "samples", ""]]
    for bar in bars:
        length = f"{bar.first:,} to {bar.last:,}" if bar.last > bar.first else f"{bar.first:,}"
        rows.append([length, f"{bar.num_documents:,}", _bar(bar.num_documents / most)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for length, number, drawn in rows:
        yield f"  {length:>{widths[0]}}  {number:>{widths[1]}}  {drawn}".rstrip()


def _bar(share: float) -> str:
    """A bar in eighths of a character; what isn't nothing can be seen."""
    eighths = round(share * BAR_WIDTH * 8)
    if share and not eighths:
        eighths = 1
    return "█" * (eighths // 8) + _PARTS[eighths % 8].strip()


def _of_training(config: Config, steps: Steps, hours: Hours) -> Iterator[str]:
    train = config.train
    what = "packed sequence" if train.packing else "sequence"
    filled = "" if steps.share_filled is None else f" ({steps.share_filled:.1%} of {train.sequence_length:,})"
    yield (
        f"training  {count(steps.num_sequences, what)} of {figure(steps.tokens_of_sequence)} tokens on average{filled}: "
        f"{count(steps.num_steps_of_epoch, 'step')} an epoch at global_batch {train.global_batch:,}"
    )
    given = f"train.steps: {train.steps:,}" if train.steps is not None else f"train.epochs: {train.epochs or 1:g}"
    epochs = steps.num_steps / steps.num_steps_of_epoch
    yield f"          {count(steps.num_steps, 'step')} in all, {figure(epochs)} epochs ({given})"
    if hours.step_s is None or hours.hours is None:
        yield f"time      unknown: {hours.unknown}"
        return
    low, high = hours.hours
    yield (
        f"time      {time_range(3600 * low, 3600 * high)} on {hours.machines}, by the plan: {time_range(*hours.step_s)} a step"
    )
