"""Which settings may change when a run resumes from a checkpoint: one table, used by resume and printed in docs/resume.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["free", "logged", "refused"]


@dataclass(frozen=True)
class Rule:
    """Settings by full name (a section's name covers all its settings), the effect of a change, and why."""

    settings: tuple[str, ...]
    effect: Effect
    why: str


RULES = (
    Rule(("run", "runs_dir", "log", "checkpoint", "data.cache_dir"), "free", "locations and logging"),
    Rule(("machine",), "free", "describes the machines; training doesn't use it"),
    Rule(
        ("parallel", "train.micro_batch", "train.activation_checkpointing", "train.fused_kernels", "train.deterministic", "model.attention"),
        "free",
        "how the work is distributed: engine, ranks, nodes, offload. Global batches and losses (to 1e-5) stay the same",
    ),
    Rule(
        ("model.name", "data.train", "data.mix", "data.format", "data.columns", "data.train_on",
         "data.on_no_target", "data.on_too_long", "data.untrained_tokens", "data.chat_template", "data.guard_version",
         "data.guard_categories", "data.guard_augment", "lora.start_from"),
        "free",
        "what they name must be the same: the base's weights, tokenized samples and shares of a mixture are compared",
    ),
    Rule(
        ("eval", "data.eval", "train.callbacks"),
        "free",
        "has no effect on a step; `eval.patience` decides when the run ends. With another set, or a changed one, the best step is "
        "looked for anew, and the log says so. A fraction is taken from `data.train`, whose samples are compared",
    ),
    Rule(("train.steps", "train.epochs"), "logged", "stretches the schedule: other learning rates from here on"),
    Rule(("optim",), "logged", "other updates from here on"),
    Rule(("lora.dropout",), "logged", "other masks from here on"),
    Rule(("model.shape", "model.quant", "model.dtype"), "refused", "training would continue on another base"),
    Rule(
        ("lora.rank", "lora.alpha", "lora.scaling", "lora.ranks", "lora.alphas", "lora.targets", "lora.layers", "lora.modules",
         "lora.train_tokens"),
        "refused",
        "they set the shape and the scale of the adapters, and the tokens whose rows are trained",
    ),
    Rule(("train.unfreeze",), "refused", "it decides which weights are trained"),
    Rule(
        ("train.seed", "train.global_batch", "train.sequence_length", "train.packing"),
        "refused",
        "they decide which samples a step has",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A setting whose value in the config differs from the one that the run started with."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {short(self.before)} -> {short(self.now)}"


def short(value: Any) -> str:
    """A value as it is written in a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


_WHOLE = ("data.columns",)  # settings whose value is a mapping: setting one where none was is a change


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by full name: ``{"lora": {"rank": 16}}`` becomes ``{"lora.rank": 16}``."""
    if not isinstance(tree, Mapping) or prefix in _WHOLE:
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}.{name}".strip(".")).items()}


def rule_of(name: str) -> Rule | None:
    """The rule for a setting; None for an unknown (or removed) setting."""
    return next((rule for rule in RULES for s in rule.settings if name == s or name.startswith(f"{s}.")), None)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs between two configs, as trees. A setting that only one of them has is no change."""
    old, new = flat(before), flat(now)
    return [Change(name, old[name], new[name]) for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]


def markdown() -> str:
    """The table of docs/resume.md."""
    words = {"free": "may change", "logged": "may change, is logged", "refused": "may not (exit 2)"}
    lines = ["| setting | on resume | because |", "|---|---|---|"]
    for rule in RULES:
        names = ", ".join(f"`{name}`" for name in rule.settings)
        lines.append(f"| {names} | {words[rule.effect]} | {rule.why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
