"""Turns pydantic's errors into sentences that name the setting, what was found and what was expected."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dist_lora.config.other_trainers import advice_for
from dist_lora.config.schema import Config, Expected, Section, SettingFaults
from dist_lora.text import nearest

SettingPath = tuple[str | int, ...]
"""The path of a setting: ("lora", "targets", 2) is lora.targets[2]."""


@dataclass(frozen=True)
class Fault:
    """One wrong setting."""

    path: SettingPath
    message: str


def dotted(path: SettingPath) -> str:
    """The setting's full name: ``lora.targets[2]``."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def faults_of(settings: Mapping[str, Any]) -> list[Fault]:
    """Everything that is wrong with ``settings``; an empty list if they make a valid ``Config``."""
    try:
        Config.model_validate(settings)
    except ValidationError as error:
        faults = list(_translate(error, settings=settings))
        return faults + list(_hidden_faults(settings, known=faults))
    return []


def _hidden_faults(settings: Mapping[str, Any], *, known: list[Fault]) -> Iterator[Fault]:
    """Conflicts between the valid settings of a section, which its invalid settings have hidden.

    pydantic runs a section's own validator only if each of its settings is valid, so each faulty section is validated
    again without its invalid settings.
    """
    for name, field in Config.model_fields.items():
        wrong = {fault.path[1] for fault in known if fault.path[0] == name and len(fault.path) > 1}
        model, given = field.annotation, settings.get(name)
        if not wrong or not isinstance(given, Mapping) or not _is_section(model):
            continue
        valid = {key: value for key, value in given.items() if key not in wrong}
        try:
            model.model_validate(valid)
        except ValidationError as error:
            for details in error.errors():
                conflict = details.get("ctx", {}).get("error")
                if isinstance(conflict, SettingFaults):
                    for involved, message in conflict.faults:
                        if not wrong.intersection(involved):
                            yield Fault((name, _blamed(involved, given)), message)


def _translate(error: ValidationError, *, settings: Mapping[str, Any]) -> Iterator[Fault]:
    """One fault per setting: pydantic reports each branch of a union, we report the setting once."""
    grouped: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for details in error.errors():
        grouped.setdefault(_setting_of(details["loc"]), []).append(details)
    for path, group in grouped.items():
        from_schema = [details for details in group if details["type"] == "value_error"]
        if from_schema:
            for details in from_schema:
                yield from _from_schema(details, settings=settings)
        elif group[0]["type"] == "extra_forbidden":
            yield Fault(path, unknown_setting(path))
        elif group[0]["type"] == "missing" and len(group[0]["loc"]) == len(path):  # not a part of the setting's value
            yield from _missing(path)
        else:
            yield Fault(path, _found_and_expected(path, found=_value_at(settings, path)))


def _setting_of(loc: SettingPath) -> SettingPath:
    """The part of pydantic's location that is a setting: the names of its sections and its own."""
    model: type[Section] | None = Config
    depth = 0
    while model is not None and depth < len(loc):
        field = model.model_fields.get(str(loc[depth]))
        model = None if field is None else _section_of(field.annotation)
        depth += 1
    return loc[:depth]


def _from_schema(details: ErrorDetails, *, settings: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults with a message of the schema's own validators."""
    error = details["ctx"]["error"]
    loc = details["loc"]
    if isinstance(error, SettingFaults) and not loc:  # between sections: the setting at fault, by its full name
        for (at_fault, *_), message in error.faults:
            yield Fault(tuple(at_fault.split(".")), message)
    elif isinstance(error, SettingFaults):
        given = settings.get(str(loc[0]), {})
        for involved, message in error.faults:
            yield Fault((loc[0], _blamed(involved, given)), message)
    else:
        path = _setting_of(loc)
        items = [part for part in loc[len(path) :] if isinstance(part, int)]
        yield Fault((*path, *items), str(error))


def _blamed(involved: Sequence[str], given: Mapping[str, Any]) -> str:
    """The first involved setting that the user has set."""
    return next((name for name in involved if given.get(name) is not None), involved[0])


def _missing(path: SettingPath) -> Iterator[Fault]:
    field = _field_at(path)
    assert field is not None, path
    section = _section_of(field.annotation)
    if section is not None:
        for name, inner in section.model_fields.items():
            if inner.is_required():
                yield from _missing((*path, name))
    else:
        yield Fault(path, f"is missing. {field.description}")


def unknown_setting(path: SettingPath) -> str:
    """What to write instead of a setting that doesn't exist, guessed from its name."""
    *section, name = (str(part) for part in path)
    field = _field_at(tuple(section))
    model = (None if field is None else _section_of(field.annotation)) or Config
    elsewhere = [full for full in setting_names() if full.rpartition(".")[2] == name]
    near = nearest(name, model.model_fields)
    advice = advice_for(name)
    if elsewhere:
        return f"no such setting (did you mean {' or '.join(elsewhere)}?)"
    if advice:
        return f"no such setting: {advice}"
    if near is None and not section:
        near = nearest(name, (full.rpartition(".")[2] for full in setting_names()))
        near = next((full for full in setting_names() if full.rpartition(".")[2] == near), None)
    if near is not None:
        return f"no such setting (nearest: {near})"
    return f"no such setting ({'.'.join(section) + ' has' if section else 'there are'} {', '.join(model.model_fields)})"


def setting_names() -> list[str]:
    """Full names of all settings, like ``optim.lr``, in the order of the schema."""
    names: list[str] = []
    for name, field in Config.model_fields.items():
        inner = field.annotation.model_fields if _is_section(field.annotation) else None
        names += [name] if inner is None else [f"{name}.{setting}" for setting in inner]
    return names


def _found_and_expected(path: SettingPath, *, found: Any) -> str:
    field = _field_at(path)
    assert field is not None, path
    section = _section_of(field.annotation)
    if section is not None:
        inner = ", ".join(section.model_fields)
        return f"found {show(found)}, expected settings, like {path[-1]}: {{...}} with {inner}"
    expected = _expected(field.annotation, field.metadata)
    return f"found {show(found)}, expected {expected}{_hint(field.annotation, found=found, expected=expected)}"


# What a choice is called elsewhere (bitsandbytes, transformers, axolotl): quantizations by their bits or method.
_SYNONYMS = {
    **dict.fromkeys(("on", "yes"), "all"),
    **dict.fromkeys(("off", "no"), "none"),
    **dict.fromkeys(("int4", "fp4", "4bit", "4", "uint4", "qlora", "bnb4bit", "loadin4bit", "nf4dq", "bnb"), "nf4"),
    **dict.fromkeys(("8bit", "8", "int8bit", "llmint8", "bnb8bit", "loadin8bit", "w8", "uint8"), "int8"),
    **dict.fromkeys(("bfloat16", "half", "float16", "fp16"), "bf16"),
    **dict.fromkeys(("float32", "float", "full"), "fp32"),
}


def _hint(annotation: Any, *, found: Any, expected: str) -> str:
    """What the user probably meant, in brackets; empty if there is no guess."""
    choices = [choice for choice in _choices(annotation) if isinstance(choice, str)]
    if isinstance(found, str):
        if found in choices:
            return f" (a list: [{found}])"
        near = _SYNONYMS.get(found.lower().replace("-", "").replace("_", ""), nearest(found, choices))
        near = near if near in choices else nearest(found, choices)
        return f" (nearest: {near})" if near else ""
    if expected.startswith("text") and "number" not in expected and isinstance(found, int | float | date):
        return ' (YAML doesn\'t read it as text: put it in quotes, "...")'
    return ""


def show(value: Any) -> str:
    """A value as the user could have written it, shortened to 60 characters."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str | list | dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that a type accepts, in words: ``a whole number of at least 1``, ``auto, bf16 or fp32``."""
    words = _alternatives(annotation, metadata)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    marked = [mark.words for mark in metadata if isinstance(mark, Expected)]
    origin = get_origin(annotation)
    if marked or annotation is type(None):
        return marked or ["null"]
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _alternatives(inner, [*_flat(more), *metadata])
    if origin in (Union, types.UnionType):
        return [word for branch in _branches(annotation) for word in _alternatives(branch, metadata)]
    if origin is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if origin is list:
        return [f"a list of {_plural(get_args(annotation)[0])}"]
    if annotation is bool:
        return ["true", "false"]
    words = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return [words[annotation] + _bounds(metadata)]


def _plural(item: Any) -> str:
    choices = _choices(item)
    if choices:
        return " ".join(map(str, choices))
    one = _expected(item)
    return one.removeprefix("a ").replace("number", "numbers") if one.startswith("a ") else f"{one}s"


def _flat(metadata: Sequence[Any]) -> list[Any]:
    """Annotated's metadata, with the bounds that pydantic's ``Field()`` contains."""
    return [mark for entry in metadata for mark in (entry, *getattr(entry, "metadata", []))]


def _bounds(metadata: Sequence[Any]) -> str:
    words = {
        annotated_types.Ge: ("of at least", "ge"),
        annotated_types.Gt: ("above", "gt"),
        annotated_types.Le: ("of at most", "le"),
        annotated_types.Lt: ("below", "lt"),
    }
    bounds = [
        f"{words[type(mark)][0]} {getattr(mark, words[type(mark)][1])}" for mark in metadata if type(mark) in words
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _branches(annotation: Any) -> list[Any]:
    """A union's types, null last."""
    return sorted(get_args(annotation), key=lambda branch: branch is type(None))


def _choices(annotation: Any) -> list[Any]:
    """All literal values of a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a type is, optional or not."""
    if _is_section(annotation):
        return annotation
    return next((branch for branch in get_args(annotation) if _is_section(branch)), None)


def _field_at(path: SettingPath) -> FieldInfo | None:
    model: Any = Config
    field = None
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = _section_of(field.annotation)
    return field


def _value_at(settings: Any, path: SettingPath) -> Any:
    for part in path:
        settings = settings[part]
    return settings
