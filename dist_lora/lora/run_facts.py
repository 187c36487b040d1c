"""What a run knows at its end about itself, in numbers and names that may be published: for the model card. Needs no torch.

A checkpoint's manifest has it in ``progress.card``, an adapter's ``dist_lora.json`` in ``training``. Files of versions that
wrote neither are read as well: what they don't say is None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dist_lora.config.changes import flat
from dist_lora.config.schema import OWN_TEMPLATES
from dist_lora.errors import AdapterError

T = TypeVar("T")

# The settings that a card shows, by full name; those that a config lacks (of another version) are left out.
SHOWN_SETTINGS = (
    "optim.lr", "optim.schedule", "optim.warmup_steps", "optim.weight_decay", "optim.max_grad_norm", "train.global_batch",
    "train.sequence_length", "train.packing", "train.seed", "data.format", "data.train_on", "data.chat_template",
    "model.quant", "model.dtype",
)  # fmt: skip


@dataclass(frozen=True)
class SetFacts:
    """A training or held-out set: what it is called, and how much of it there is. ``hub_ids``: those of the names that are."""

    names: tuple[str, ...] = ()
    hub_ids: tuple[str, ...] = ()
    samples: int | None = None
    tokens: int | None = None
    target_tokens: int | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a run had done when an adapter was saved. Empty for an adapter of PEFT.

    Args:
        step: the adapter's own; ``num_steps`` are those of the whole run.
        num_layers: of the base.
        tokens, target_tokens: of all steps so far, with repetitions.
        evaluation: the values of the last evaluation by their names in evaluations.jsonl, ``evaluated_step`` its step.
        settings: some of ``SHOWN_SETTINGS``, by full name.
        versions: of the libraries that trained it.
    """

    step: int | None = None
    num_steps: int | None = None
    num_layers: int | None = None
    tokens: int | None = None
    target_tokens: int | None = None
    train: SetFacts | None = None
    held_out: SetFacts | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    evaluated_step: int | None = None
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: no tuples."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @staticmethod
    def of_json(recorded: object, *, where: str) -> RunFacts:
        """The facts that a file recorded; empty ones for None. Names that this version doesn't know are left out.

        Raises:
            AdapterError: a value is of another type.
        """
        if recorded is None:
            return RunFacts()
        return validated(_FACTS, recorded, where=where)


_FACTS = TypeAdapter(RunFacts)


def validated(kind: TypeAdapter[T], recorded: object, *, where: str) -> T:
    """What a file recorded, which the error names as ``where``. Names that this version doesn't know are left out.

    Raises:
        AdapterError: a value is of another type.
    """
    try:
        return kind.validate_json(json.dumps(recorded))
    except (ValidationError, TypeError, ValueError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        named = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults) or str(error)
        raise AdapterError(f"{where}: {named}. The file is damaged.") from error


def public_name(name: str | None) -> str | None:
    """The name, or its last component if it is a path on this machine."""
    if name and (PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name[0] in "~."):
        return PureWindowsPath(name).name  # splits at both kinds of slash
    return name


def file_name(path: str) -> str:
    """The last component of a file's or folder's path, absolute or not, with neither kind of slash."""
    return PureWindowsPath(path).name or path


def shown_settings(config: str) -> dict[str, str | int | float | bool | None]:
    """The ``SHOWN_SETTINGS`` of a resolved config, which is YAML; {} for one that can't be read."""
    settings = flat(tree_of(config))
    found = {name: settings[name] for name in SHOWN_SETTINGS if isinstance(settings.get(name, ()), _SCALARS)}
    template = found.get("data.chat_template")
    if isinstance(template, str) and template not in OWN_TEMPLATES:
        found["data.chat_template"] = "its own"  # a file of this machine, or the text itself
    return found


_SCALARS = (str, int, float, bool, type(None))


def tree_of(config: str) -> Mapping[str, Any]:
    """The sections of a resolved config, which is YAML; {} for one that can't be read."""
    try:
        tree = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that isn't one is a ValueError
        return {}
    return tree if isinstance(tree, Mapping) else {}


def names_in(data: object) -> tuple[str, ...]:
    """What ``data.train`` or ``data.eval`` of a config's tree names, each by its last component.

    One name, a list of them, a list of sections with ``path``, or sets by their name.
    """
    if isinstance(data, str):
        return (file_name(data),)
    if isinstance(data, Mapping):
        return names_in(data["path"]) if "path" in data else names_in(list(data.values()))
    if isinstance(data, list | tuple):
        return tuple(name for entry in data for name in names_in(entry))
    return ()
