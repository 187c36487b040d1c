"""Every setting with its values, its default and what it does: the tables of docs/settings.md, from the schema of configs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dist_lora.config.load import json_schema


def markdown() -> str:
    """All settings, a table for each section; those that lie deeper stand after the setting that they belong to."""
    schema = json_schema()
    sections = {name: _target(schema, field) for name, field in schema["properties"].items()}
    return "\n".join(
        [
            *_table(
                "", {name: schema["properties"][name] for name, inside in sections.items() if inside is None}, schema
            ),
            *(
                line
                for name, inside in sections.items()
                if inside is not None
                for line in _section(name, inside, schema)
            ),
        ]
    ).rstrip()


def _section(name: str, section: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield section["description"]
    yield ""
    yield from _table(name, section["properties"], schema, required=section.get("required", ()))


def _table(
    prefix: str, fields: Mapping[str, Mapping[str, Any]], schema: Mapping[str, Any], required: Any = ("run",)
) -> Iterator[str]:
    yield "| setting | values | default | |"
    yield "|---|---|---|---|"
    yield from _rows(prefix, fields, schema, required)
    yield ""


def _rows(
    prefix: str, fields: Mapping[str, Mapping[str, Any]], schema: Mapping[str, Any], required: Any
) -> Iterator[str]:
    for name, field in fields.items():
        full = f"{prefix}.{name}".strip(".")
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        yield f"| `{full}` | {_values(field)} | {default} | {field['description'].replace('|', '&#124;')} |"
        inside, is_list = _inside(field, schema)
        if inside is not None:
            yield from _rows(full + "[]" * is_list, inside["properties"], schema, inside.get("required", ()))


def _target(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a setting refers to, if it is one."""
    choices = [field, *field.get("anyOf", ())]
    names = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
    return schema["$defs"][names[0]] if names else None


def _inside(field: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """The settings within a setting, and whether it is a list of them."""
    for choice in (field, *field.get("anyOf", ())):
        if "items" in choice and (found := _target(schema, choice["items"])) is not None:
            return found, True
    return _target(schema, field), False


def _values(field: Mapping[str, Any]) -> str:
    """What a setting may be, in words; null isn't said where it is the default."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_values(choice) for choice in field["anyOf"] if choice.get("type") != "null"))
    if "$ref" in field:
        return "settings, below"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array":
        of_items = _values(field["items"])
        return f"a list of {of_items.replace('a text', 'texts').replace('an integer', 'integers')}"
    if field["type"] == "object":
        values = field["additionalProperties"]
        return "names, each with settings" if values.get("type") == "object" else f"names, each with {_values(values)}"
    words = {"boolean": "`true`, `false`", "integer": "an integer", "number": "a number"}
    return words.get(field["type"], "a path" if field.get("format") == "path" else "a text") + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    said = [f"{word} {field[name]}" for name, word in bounds.items() if name in field]
    return f" {' and '.join(said)}" if said else ""


if __name__ == "__main__":
    print(markdown())
