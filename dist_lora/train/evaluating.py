"""An evaluation of all held-out sets of a run: what is recorded of it, and which loss decides what is best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dist_lora.config.schema import Config
from dist_lora.data.token_set import TokenSet
from dist_lora.evaluation.answers import AnswerRule
from dist_lora.evaluation.evaluate import ExactMatch, HeldOut, expected_answers, never_stop
from dist_lora.evaluation.generate import stop_ids_of
from dist_lora.evaluation.predictions import Prediction
from dist_lora.evaluation.tool_calls import ToolCalls
from dist_lora.text import count
from dist_lora.train.build import Base, Trainee
from dist_lora.train.held_out import exact_match_of, loss_of, verdicts_of
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

HeldOutSets = Mapping[str, TokenSet]
"""The held-out sets by name, in the config's order; a single one's name is empty."""


@dataclass(frozen=True)
class Evaluation:
    """What was found on each held-out set, by name; empty is what wasn't asked for.

    ``matches``: of generated answers exact matches, which are shown if ``compares``, tool calls, and metrics of the user's own.
    ``verdicts``: a Guard's scores, see ``verdicts.guard_report``. ``answers``: this rank's, by the number of their sample over
    all sets.
    """

    losses: Mapping[str, HeldOut]
    matches: Mapping[str, ExactMatch] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compares: bool = True
    answers: dict[int, Prediction] = field(default_factory=dict)

    @property
    def of_all(self) -> HeldOut:
        """The loss over the target tokens of all sets: a set counts by its tokens."""
        total = sum(held.target_tokens for held in self.losses.values())
        if len(self.losses) == 1:
            return next(iter(self.losses.values()))
        return HeldOut(sum(held.loss * held.target_tokens for held in self.losses.values()) / total, total)

    @property
    def matches_of_all(self) -> ExactMatch:
        """The exact matches of all sets' samples, and the means of the metrics over them."""
        found = list(self.matches.values())
        if len(found) == 1:
            return found[0]
        total = sum(match.total for match in found)
        names = found[0].metrics if found else ()
        means = {name: math.fsum(match.metrics[name] * match.total for match in found) / total for name in names}
        return ExactMatch(sum(match.correct for match in found), total, metrics=means)

    def deciding_loss(self, best_set: str | None) -> float | None:
        """The loss by which the best step is found: of all sets, or of ``eval.best_set``; None without held-out data."""
        if not self.losses:
            return None
        return self.of_all.loss if best_set is None else self.losses[best_set].loss

    def values(self) -> dict[str, float]:
        """The numbers under the names that files and trackers have: of all sets, then ``eval_loss/NAME`` of each named one."""
        if not self.losses:
            return {}
        values = self._values(self.of_all, self.matches_of_all if self.matches else None, suffix="")
        for name, held in self.losses.items():
            if name:
                values |= self._values(held, self.matches.get(name), suffix=f"/{name}")
        scores = {
            name: {f"eval_{score}": value for score, value in report.items() if isinstance(value, float)}
            for name, report in self.verdicts.items()
        }
        for of_sets in (scores, {name: calls.values() for name, calls in self.tool_calls.items()}):
            for name, numbers in of_sets.items():
                values |= {f"{key}/{name}" if name else key: value for key, value in numbers.items()}
        return values

    @property
    def tool_calls(self) -> dict[str, ToolCalls]:
        """The tool calls of the answers, where they were counted."""
        return {name: match.tool_calls for name, match in self.matches.items() if match.tool_calls is not None}

    def to_json(self, of_base: Evaluation | None) -> dict[str, Any]:
        """What ``eval`` prints: of all sets, and by name under ``sets`` where they have names; with the losses of the base."""
        base = of_base.of_all if of_base is not None else None
        result = self._facts(self.of_all, self.matches_of_all if self.matches else None, base)
        named = {
            name: self._facts(held, self.matches.get(name), None if of_base is None else of_base.losses[name])
            for name, held in self.losses.items()
            if name
        }
        result |= {"sets": named} if named else {}
        if self.verdicts:
            result["guard"] = self.verdicts[""] if "" in self.verdicts else dict(self.verdicts)
        return result | ({"tool_calls": calls} if (calls := self.tool_counts()) else {})

    def tool_counts(self) -> dict[str, Any]:
        """The counts of ``ToolCalls.as_json``, by set where sets have names; empty where tool calls weren't counted."""
        calls = {name: of_set.as_json() for name, of_set in self.tool_calls.items()}
        return calls.get("", calls)

    def _facts(self, held: HeldOut, match: ExactMatch | None, base: HeldOut | None) -> dict[str, Any]:
        facts: dict[str, Any] = {"loss": held.loss, "perplexity": held.perplexity, "target_tokens": held.target_tokens}
        if base is not None:
            facts["base_loss"] = base.loss
        if match is not None and self.compares:
            facts["exact_match"] = {"correct": match.correct, "total": match.total}
        return facts | (dict(match.metrics) if match is not None else {})

    def _values(self, held: HeldOut, match: ExactMatch | None, *, suffix: str) -> dict[str, float]:
        values = {f"eval_loss{suffix}": held.loss, f"eval_perplexity{suffix}": held.perplexity}
        if match is not None and self.compares:
            values[f"eval_exact_match{suffix}"] = match.correct / match.total
        own = match.metrics if match is not None else {}
        return values | {f"eval_{name}{suffix}": mean for name, mean in own.items()}


def evaluate_sets(
    trainee: Trainee,
    sets: HeldOutSets,
    *,
    config: Config,
    world: World,
    check_stop: Callable[[], None] = never_stop,
    keeps_predictions: bool = False,
) -> Evaluation:
    """Losses, and what else is asked for, of the trainee as it is now. All ranks call it.

    Args:
        check_stop: see ``held_out_loss``.
        keeps_predictions: answers are generated and compared in any case.
    """
    section = config.eval
    arguments: dict[str, Any] = {"config": config, "world": world, "check_stop": check_stop}
    losses = {name: loss_of(trainee, tokens, **arguments) for name, tokens in sets.items()}
    verdicts: dict[str, Mapping[str, Any]] = {}
    if config.data.format == "guard":
        verdicts = {name: verdicts_of(trainee, tokens, **arguments) for name, tokens in sets.items()}
    compares = section.exact_match or keeps_predictions
    if not (compares or section.tool_calls or section.metrics):
        return Evaluation(losses, verdicts=verdicts)
    matches: dict[str, ExactMatch] = {}
    answers: dict[int, Prediction] = {}
    num_before = 0
    for name, tokens in sets.items():
        of_set: dict[int, Prediction] = {}
        matches[name] = exact_match_of(trainee, tokens, predictions=of_set, **arguments)
        answers |= {num_before + index: replace(answer, set=name or None) for index, answer in of_set.items()}
        num_before += len(tokens)
    return Evaluation(losses, matches, verdicts, compares, answers)


def warn_of_answers(sets: HeldOutSets, *, config: Config, base: Base, world: World) -> None:
    """Warn if ``eval.answer`` finds nothing in expected answers, which are then compared whole. Only the first rank looks."""
    rule = AnswerRule.of(config.eval.answer)
    if rule is None or not world.is_first:
        return
    stop_ids = stop_ids_of(base.folder, base.tokenizer)
    for name, tokens in sets.items():
        expected = expected_answers(tokens, tokenizer=base.tokenizer, stop_ids=stop_ids)
        without = [text for text in expected if rule.answer_in(text) is None]
        if without:
            setting = f"data.eval.{name}".rstrip(".")
            log.warning(
                f"eval.answer: {config.eval.answer!r} matches nothing in {len(without):,} of "
                f"{count(len(tokens), 'expected answer')} of {setting}, like {without[0][-80:]!r}: these are compared whole"
            )
