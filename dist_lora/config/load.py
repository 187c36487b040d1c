"""Reading a run's settings: one YAML file, then ``key=value`` arguments over it.

Everything that is wrong with both is reported in one error, each fault with its file and line. Run as a module, it prints
the JSON schema with which editors complete a config:
``python -m dist_lora.config.load > configs/schema.json``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_lora.config.faults import Fault, SettingPath, dotted, faults_of, show
from dist_lora.config.schema import INVALID_TEXT, Config
from dist_lora.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (PyYAML 6 reads it as text, for lack of a dot)."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits; one of ten thousand digits can't even be printed."""
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """A text that is a valid file name and valid UTF-8: escapes may contain what is neither."""
        value = str(super().construct_yaml_str(node))
        if INVALID_TEXT.search(value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text with NUL or an unpaired surrogate", node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as numbers, and escapes YAML's line breaks.

    PyYAML (6.0) folds a text at such a character, and what it writes for ``\\x85`` reads back as a space.
    """

    def represent_text(self, text: str) -> yaml.Node:
        """A text in a style that is read back unchanged."""
        style = '"' if any(end in text for end in "\n\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


_MAX_BYTES = 2**20
"""A longer file isn't a config but was named by mistake."""

_MAX_VALUES = 10_000
"""The most values in a file with all aliases expanded: aliases of aliases double with every line."""

_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class _Source:
    """Settings as read, and the line or argument of each."""

    settings: dict[str, Any]
    root: yaml.Node | None
    arguments: dict[SettingPath, str] = field(default_factory=dict)

    def line_of(self, path: SettingPath) -> int | None:
        """Line (from 1) of a setting in the file, or of the nearest setting around it; None at the top."""
        node, line = self.root, None
        for part in path:
            child = _child(node, part)
            if child is None:
                break
            key, node = child
            line = key.start_mark.line + 1
        return line

    def argument_of(self, path: SettingPath) -> str | None:
        """The argument that sets this setting, or the section around it."""
        matching = [text for setting, text in self.arguments.items() if path[: len(setting)] == setting]
        return matching[-1] if matching else None

    def order_of(self, path: SettingPath) -> tuple[bool, int]:
        """Sort key of faults: in the order of the file, then those of arguments."""
        return self.argument_of(path) is not None, self.line_of(path) or 0


def load_config(path: Path, *, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run, from a YAML file and arguments that override it.

    Paths in them (``data.train``, ``model.name``, ``runs_dir``, ...) are relative to the current folder, not to the file's.
    An argument ``train.steps=10`` also removes the file's ``train.epochs`` (and the other way round), since a run has only
    one of them.

    Args:
        path: the YAML file.
        overrides: ``section.setting=value``, values in YAML: ``lora.targets=[q_proj,v_proj]``; the last one wins.

    Raises:
        ConfigError: the file can't be read, or settings are wrong: all faults, with line and nearest name.
    """
    return _accepted(*_read(path), path=path, overrides=overrides)


def load_settings(settings: Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run from a mapping, as ``load_config`` reads them from a file.

    Raises:
        ConfigError: settings are wrong: all faults, with the nearest name.
    """
    source = _Source(settings=_with_text_keys(copy.deepcopy(dict(settings))), root=None)
    return _accepted(source, [], path=Path("the given settings"), overrides=overrides)


def _accepted(source: _Source, unreadable: list[str], *, path: Path, overrides: Sequence[str]) -> Config:
    faults = unreadable + list(_apply(overrides, source=source))
    in_order = sorted(faults_of(source.settings), key=lambda fault: source.order_of(fault.path))
    faults += [_located(fault, source=source, path=path) for fault in in_order]
    if faults:
        raise ConfigError(_message(path, faults))
    return Config.model_validate(source.settings)


def dump_config(config: Config) -> str:
    """All settings as YAML, defaults too; ``load_config`` reads it back to an equal Config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, with a description and the choices of every setting."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _message(path: Path, faults: list[str]) -> str:
    head = f"1 setting of {path} is wrong:" if len(faults) == 1 else f"{len(faults)} settings of {path} are wrong:"
    return "\n".join([head, *(f"  {fault}" for fault in faults)])


def _located(fault: Fault, *, source: _Source, path: Path) -> str:
    """A fault's message with its argument, or its file and line."""
    argument = source.argument_of(fault.path)
    if argument is not None:
        setting = dotted(fault.path)
        same = argument.partition("=")[0] == setting
        return f"{argument} (argument): {'' if same else setting + ': '}{fault.message}"
    line = source.line_of(fault.path)
    return f"{path}{'' if line is None else f':{line}'}: {dotted(fault.path)}: {fault.message}"


def _read(path: Path) -> tuple[_Source, list[str]]:
    """The file's settings, and a message for each key that is set twice."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: is longer than {_MAX_BYTES:,} bytes; expected a YAML file of settings")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give the path of a YAML file, like configs/quickstart.yaml") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 (byte {error.start}); expected a YAML file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: can't be read: {why}; expected a YAML file") from None
    value, root = _parse(text, complain=lambda line, what: f"{path}{line}: not YAML: {what}")
    if value is None:
        raise ConfigError(f"{path}: has no settings; expected at least run, model.name and data.train")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: found {show(value)}, expected settings with names, like\n"
            "  run: my-run\n  model: {name: 3.1-8b-instruct}\n  data: {train: train.jsonl}"
        )
    twice = [f"{path}:{line}: {name}: set twice (first in line {first})" for name, line, first in _repeated(root)]
    settings = _with_text_keys(value)
    # A section of comments alone is none; `lora: null` says that there is no adapter.
    if _is_empty(_child(root, "lora")):
        settings.pop("lora", None)
    return _Source(settings=settings, root=root), twice


def _parse(text: str, *, complain: Callable[[str, str], str]) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its nodes, which know their lines."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if _num_values(root) > _MAX_VALUES:
            raise ConfigError(complain("", f"more than {_MAX_VALUES:,} values with its aliases expanded"))
        # Constructing merges `<<` into the nodes, so repeated keys are looked for in a copy.
        value = None if root is None else loader.construct_document(root)
        return value, None if root is None else _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(complain(line, ", ".join(filter(None, (error.context, error.problem))))) from None
    except RecursionError:
        raise ConfigError(complain("", "nested too deeply")) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(complain("", " ".join(str(error).split()))) from None


def _num_values(node: yaml.Node | None, *, known: dict[int, int] | None = None) -> int:
    """The number of values in a node with all aliases expanded; a node that contains itself is counted once."""
    known = {} if known is None else known
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] += sum(_num_values(part, known=known) for part in inner)
    return known[id(node)]


def _with_text_keys(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Keys as text (YAML reads ``on:`` as true and ``1:`` as a number); empty sections are dropped, but for ``lora``."""
    named = {str(key): value for key, value in settings.items()}
    for name, section in list(named.items()):
        if isinstance(section, dict):
            named[name] = {str(key): value for key, value in section.items()}
            shape = named[name].get("shape")
            if name == "model" and isinstance(shape, dict):
                named[name]["shape"] = {str(key): value for key, value in shape.items()}
        elif section is None and name in Config.model_fields and name != "lora":
            del named[name]
    return named


def _is_empty(value: tuple[yaml.Node, yaml.Node] | None) -> bool:
    """Whether nothing stands after a key, where null doesn't either."""
    return value is not None and isinstance(value[1], yaml.ScalarNode) and not value[1].value


def _repeated(root: yaml.Node | None, *, seen: set[int] | None = None, at: str = "") -> Iterator[tuple[str, int, int]]:
    """(full name, line, first line) of each repeated key of a mapping."""
    seen = set() if seen is None else seen
    if root is None or id(root) in seen:
        return
    seen.add(id(root))
    if isinstance(root, yaml.SequenceNode):
        for item in root.value:
            yield from _repeated(item, seen=seen, at=at)
    if isinstance(root, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in root.value:
            name, line = f"{at}{key.value}", key.start_mark.line + 1
            if name in first:
                yield name, line, first[name]
            first.setdefault(name, line)
            yield from _repeated(value, seen=seen, at=f"{name}.")


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """(node with the line, node of the value) of a mapping's key or a list's item."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == part:
                return key, value
        merged = [value for key, value in node.value if isinstance(key, yaml.ScalarNode) and key.value == "<<"]
        return next(filter(None, (_child(value, part) for value in merged)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        # An argument may have set a longer list than the file's.
        return (node.value[part], node.value[part]) if part < len(node.value) else None
    return None


def _apply(overrides: Sequence[str], *, source: _Source) -> Iterator[str]:
    """Override the file's settings with the arguments; yields a message for each malformed one."""
    for text in overrides:
        if INVALID_TEXT.search(text):
            yield f"{text!a} (argument): not text in UTF-8"
            continue
        name, equals, written = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or name.startswith("-"):
            yield f"{text} (argument): expected setting=value, like train.steps=10"
            continue
        try:
            value, root = _parse(written, complain=lambda line, what: f"not YAML: {what}")
        except ConfigError as error:
            yield f"{text} (argument): {error}"
            continue
        for repeated, _, _ in _repeated(root):
            yield f"{text} (argument): {repeated}: set twice"
        blocked = _set(source, tuple(parts), value, text=text)
        if blocked is not None:
            yield f"{text} (argument): no such setting: {blocked} is not a section"


def _set(source: _Source, path: tuple[str, ...], value: Any, *, text: str) -> str | None:
    """Set one value; returns the name of the setting that should be a section but isn't, else None."""
    settings = source.settings
    for depth, part in enumerate(path[:-1], start=1):
        if not isinstance(settings.setdefault(part, {}), dict):
            return ".".join(path[:depth])
        settings = settings[part]
    settings[path[-1]] = value
    source.arguments.pop(path, None)
    source.arguments[path] = text
    other = {"train.steps": "epochs", "train.epochs": "steps"}.get(".".join(path))
    if other is not None and value is not None and source.argument_of(("train", other)) is None:
        settings.pop(other, None)
    return None


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
