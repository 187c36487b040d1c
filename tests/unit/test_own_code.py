"""Code of a user's own is found by its path, hashed, and refused with a reason where it can't be used."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_lora.data.own_format import own_format
from dist_lora.errors import ConfigError
from dist_lora.own_code import all_of, hash_of, load_code
from dist_lora.train.callbacks import HOOKS, Callback, check_hooks, class_of_callback, code_of_object
from tests import own


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where modules are made that this process forgets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(path: str, load: Any = functools.partial(load_code, setting="data.format")) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def test_a_function_in_the_current_folder_is_found_with_the_hash_of_its_file(here: Path) -> None:
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    file = here / "pack" / "mine_of_folder.py"
    file.write_text("class Outer:\n    @staticmethod\n    def inner(record):\n        return record\n")
    code = load_code("pack.mine_of_folder:Outer.inner", setting="data.format")
    assert (code.value({"a": 1}), code.name, code.file) == ({"a": 1}, "inner", file)
    assert code.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sys.path[-1] == str(here), "nothing here may hide what is installed"


def test_a_hash_is_taken_without_running_the_module(here: Path) -> None:
    (here / "never_run.py").write_text("raise SystemExit('was run')\n")
    assert hash_of("never_run:f", setting="data.format") == hashlib.sha256(b"raise SystemExit('was run')\n").hexdigest()
    assert "never_run" not in sys.modules


def test_what_cannot_be_used_is_refused_with_the_reason(here: Path) -> None:
    (here / "breaks.py").write_text("x = 1\ny = x / 0\n")
    found = "Install it, or set PYTHONPATH to its folder, or start in it"
    assert refusal("not_there:f") == f"data.format: not_there:f: there is no module not_there. {found}"
    assert "module not_there.deeper can't be found: No module named 'not_there'" in refusal("not_there.deeper:f")
    assert refusal("breaks:f") == (
        f"data.format: breaks:f: importing breaks failed: ZeroDivisionError: division by zero ({here / 'breaks.py'}:2)"
    )
    assert refusal("tests.own:chta") == f"data.format: tests.own:chta: {own.__file__} has no chta (nearest: chat)"
    assert refusal("tests.own:NUMBER") == "data.format: tests.own:NUMBER is a int; a function or a class is expected"
    for path in ("sys:exit", "subprocess:call", "os.path:join"):
        assert "is a module of Python's own; a module of yours is expected" in refusal(path)
    (here / "only_a_folder").mkdir()
    assert "module only_a_folder has no source file, whose hash a run records" in refusal("only_a_folder:f")
    assert refusal("tests.own:length", own_format) == (
        "data.format: tests.own:length takes (expected: 'str', generated: 'str') -> 'int', and it is called with (record)"
    )


def test_all_faults_are_told_at_once() -> None:
    loads = [functools.partial(load_code, path, setting="eval.metrics") for path in ("nowhere:f", "tests.own:g")]
    with pytest.raises(ConfigError) as caught:
        all_of([*loads, lambda: 1])
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == ["eval.metrics"] * 2
    assert all_of([lambda: 1, lambda: 2]) == [1, 2]


def test_a_callback_is_a_class_with_hooks_and_none_that_nobody_calls() -> None:
    assert class_of_callback("tests.own:Notes").value is own.Notes
    assert refusal("tests.own:Misspelt", class_of_callback).splitlines() == [
        "train.callbacks: tests.own:Misspelt: on_save takes (self, step: 'int') -> 'None', and it is called with "
        "(self, step, folder)",
        "train.callbacks: tests.own:Misspelt: on_stpe is no hook (nearest: on_step)",
    ]
    assert refusal("tests.own:Hookless", class_of_callback) == (
        f"train.callbacks: tests.own:Hookless: it has none of the hooks {', '.join(HOOKS)}"
    )
    assert "tests.own:Needy takes (key: 'str') -> 'None', and it is called with ()" in refusal(
        "tests.own:Needy", class_of_callback
    )
    assert "tests.own:chat is a function; a class with hooks is expected" in refusal(
        "tests.own:chat", class_of_callback
    )


def test_the_class_to_inherit_from_has_each_hook_and_objects_are_checked_as_classes_are() -> None:
    assert {name for name in vars(Callback) if name.startswith("on_")} == set(HOOKS)
    check_hooks(code_of_object(Callback()))
    with pytest.raises(ConfigError, match=r"callbacks: tests\.own:Misspelt: on_stpe is no hook"):
        check_hooks(code_of_object(own.Misspelt()))
