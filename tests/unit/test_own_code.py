"""Code of a user's own is found by its path, hashed, and refused with a reason where it can't be used."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from dist_lora.config.schema import Config
from dist_lora.data.own_format import own_format
from dist_lora.errors import ConfigError, OwnCodeError
from dist_lora.own_code import all_of, hash_of, load_code
from dist_lora.train.callbacks import (
    HOOKS,
    Callback,
    Callbacks,
    StartedRun,
    check_hooks,
    class_of_callback,
    code_of_object,
)
from dist_lora.world.world import World
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


def test_faults_of_hooks_are_told_together_and_hooks_without_self_are_taken() -> None:
    class Odd:
        def on_0123456789(self) -> None: ...
        def on_save(self) -> None: ...

    class Plain:
        only = 1

        @staticmethod
        def on_step(line: dict) -> None: ...

        @classmethod
        def on_end(cls, summary: dict) -> None: ...

    with pytest.raises(ConfigError) as caught:
        check_hooks(code_of_object(Odd()))
    where = f"callbacks: {__name__}:{Odd.__qualname__}"
    assert str(caught.value).splitlines() == [
        f"{where}: on_0123456789 is no hook ({', '.join(HOOKS)})",
        f"{where}: on_save takes (self) -> 'None', and it is called with (self, step, folder)",
    ]
    check_hooks(code_of_object(Plain()))


def test_a_class_without_a_file_is_named_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # as in an interactive session
    for module in ("__main__", "nowhere"):
        code = code_of_object(type("Mine", (), {"__module__": module})())
        assert (code.path, code.file) == (f"{module}:Mine", Path())


class Told:
    """Keeps what it is told, under its name."""

    def __init__(self, name: str, told: list[Any]) -> None:
        self.name, self.told = name, told

    def on_step(self, line: dict[str, Any]) -> None:
        """Changes the line, which is the callbacks' own."""
        self.told.append((self.name, "step", line.pop("step")))
        line["step"] = 0

    def on_save(self, step: int, folder: Path) -> None:
        """See ``HOOKS``."""
        self.told.append((self.name, step, folder))

    on_evaluation = on_end = on_step


class Saved(Told):
    """Is told of checkpoints alone."""

    on_step = on_evaluation = on_end = None


def callbacks_of(named: list[str], given: list[Any]) -> Callbacks:
    settings = {"run": "a", "model": {"name": "b"}, "data": {"train": "c"}, "train": {"callbacks": named}}
    return Callbacks.of(Config.model_validate(settings), given, World.alone())


def test_hooks_are_called_in_order_and_none_can_change_what_the_run_writes() -> None:
    told: list[Any] = []
    callbacks = callbacks_of([], [Told("first", told), Saved("saved", told), Told("last", told)])
    line = {"step": 7}
    for call in (callbacks.step, callbacks.evaluated, callbacks.end):
        call(line)
    assert line == {"step": 7}
    assert told == [("first", "step", 7), ("last", "step", 0)] * 3


def test_a_checkpoint_is_told_once_and_the_one_that_a_run_resumes_from_never() -> None:
    told: list[Any] = []
    callbacks = callbacks_of([], [Saved("it", told)])
    two, four = Path("step-00000002"), Path("step-00000004")
    callbacks.start(StartedRun(cast(Any, None), Path(), 3, 4), last_saved=two)
    for newest in (None, two, four, four, None):
        callbacks.look_at(newest)
    assert told == [("it", 4, four)]


def test_a_hook_is_work_on_the_host_for_who_watches_whether_a_rank_hangs() -> None:
    world, noted = World.alone(), []

    class Looks:
        def on_step(self, line: dict) -> None:
            noted.extend((note.text, note.kind) for note in world.progress.notes())

    code = code_of_object(Looks())
    Callbacks([(code, Looks())], world).step({"step": 1})
    assert noted == [(f"callback {code.path}.on_step", "host")]


def test_an_error_of_a_callback_is_told_as_its_own_with_the_hook() -> None:
    callbacks = callbacks_of(["tests.own:RaisesAtTwo"], [Told("never", told := [])])
    with pytest.raises(
        OwnCodeError, match=r"^train\.callbacks: tests\.own:RaisesAtTwo\.on_step raised ZeroDiv"
    ) as caught:
        callbacks.step({"step": 2})
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and told == []
    assert "callback tests.own:RaisesAtTwo.on_step" in callbacks._world.progress.where(caught.value)
    with pytest.raises(OwnCodeError, match=r"tests\.own:Unmade\.__init__ raised KeyError: 'missing'"):
        callbacks_of(["tests.own:Unmade"], [])
