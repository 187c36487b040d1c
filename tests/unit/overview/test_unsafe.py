"""A sample as a Guard reads it, what it can't read, and what is no Guard."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_lora.data.guard_ids import encode_guard_prompt
from dist_lora.data.records import read_sample, recognize_format
from dist_lora.data.turns import Turn
from dist_lora.errors import ConfigError, DataError
from dist_lora.overview import unsafe
from dist_lora.overview.command import look
from dist_lora.overview.unsafe import Guard, UnsafeSamples, judged_turns, open_guard, unsafe_of
from dist_lora.world.world import World
from tests.ranks.tiny import config_of
from tests.unit.lora.test_find_base import RUN, written

CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"messages": [
                {"role": "system", "content": "Be brief."}, {"role": "user", "content": " a "}, {"role": "user", "content": "b"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "42"},
                {"role": "assistant", "content": "c"}, {"role": "user", "content": " "},
            ]},
            [("user", "a\n\nb"), ("assistant", "c")],
        ),
        ({"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "a"}]},
         [("assistant", "hello"), ("user", "a")]),
        ({"instruction": "add", "input": "1 1", "output": "2", "history": [["q", "a"]]},
         [("user", "q"), ("assistant", "a"), ("user", "add\n\n1 1"), ("assistant", "2")]),
        ({"prompt": "1+1=", "completion": " 2"}, [("user", "1+1="), ("assistant", "2")]),
        ({"text": "a story"}, [("user", "a story")]),
        ({"messages": [{"role": "tool", "content": "42"}]}, []),
    ],
)  # fmt: skip
def test_a_guard_reads_the_texts_of_user_and_assistant_by_turns(record: dict[str, Any], expected: Any) -> None:
    turns = judged_turns(read_sample(record, fmt=recognize_format(list(record))))
    assert [(turn.role, turn.content) for turn in turns] == expected


def test_token_ids_are_no_text_to_judge() -> None:
    with pytest.raises(DataError, match="holds token ids, and a Guard judges texts"):
        judged_turns(read_sample({"input_ids": [1, 2]}, fmt="tokens"))


def test_an_adapter_that_answers_and_a_folder_that_is_none_are_refused(tmp_path) -> None:
    adapter = written(tmp_path / "a", RUN)
    with pytest.raises(ConfigError, match=r"--guard: .*/a was trained on chat, so it answers and doesn't judge"):
        open_guard(str(adapter), World.alone())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: is empty; expected an adapter's folder"):
        open_guard(str(tmp_path / "empty"), World.alone())
    with pytest.raises(ConfigError, match=r"missing: .*no such folder.*; expected an adapter's folder"):
        open_guard(str(tmp_path / "missing"), World.alone())
    with pytest.raises(ConfigError, match=r"^--guard: found 'Llama-Guard-3-7B', expected a herd member"):
        open_guard("Llama-Guard-3-7B", World.alone())


def test_a_model_without_the_tokens_of_llama_3_is_no_guard(tiny_llama, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama("llama31"), other)
    for file in other.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|eot_id|>", "<|over|>"))
    with pytest.raises(
        ConfigError, match=r"^--guard: .*/other: format guard needs the special tokens <\|eot_id\|>, which"
    ):
        open_guard(str(other), World.alone())


def test_a_guard_is_refused_before_anything_is_tokenized_and_its_weights_are_read_after(
    tiny_llama, tmp_path, monkeypatch
) -> None:
    base = tiny_llama("llama31")
    data = {"train": str(tmp_path / "missing.jsonl"), "cache_dir": str(tmp_path / "cache")}
    config = config_of(base, data=data)
    with pytest.raises(ConfigError, match=r"^--guard: found 'Llama-Guard-3-7B', expected a herd member"):
        look(config, num_samples=0, as_json=False, guard="Llama-Guard-3-7B")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("dist_lora.chat.command.build", None)  # what reads weights
    with pytest.raises(DataError, match=r"data\.train: .*missing\.jsonl doesn't exist"):
        look(config, num_samples=0, as_json=False, guard=str(base))


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_each_message_is_judged_and_what_cannot_be_is_counted_apart(tiny_llama, tmp_path, monkeypatch, at_once) -> None:
    said = [["bad", "fine", "bad"], ["fine", "bad"], ["bad", "bad"], [], ["fine", "fine " * 40], ["fine"], ["bad"]]
    chats = [
        [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)] for texts in said
    ]
    chats[3] = [{"role": "tool", "content": "bad"}]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    opened = open_guard(str(tiny_llama("llama31")), World.alone())
    tokenizer = opened.model.base.tokenizer

    def by_last_message(trainee: Any, prompts: list[list[int]], *, batch: int, world: World) -> list[bool]:
        texts = [tokenizer.decode(ids).partition("<END CONVERSATION>")[0] for ids in prompts]
        return ["bad" in text.rpartition(": ")[2] for text in texts]

    monkeypatch.setattr(unsafe, "unsafe_prompts", by_last_message)
    monkeypatch.setattr(unsafe, "SAMPLES_AT_ONCE", at_once)
    turns = [Turn("user", "fine"), Turn("assistant", "fine " * 39 + "fine")]
    length = len(encode_guard_prompt(turns, opened.rules.categories, tokenizer=tokenizer, version="8b"))
    for context, num_too_long in ((length, 1), (length + 1, 0)):
        trainee = SimpleNamespace(base=SimpleNamespace(shape=SimpleNamespace(context=context)))
        model = SimpleNamespace(load=lambda world, loaded=trainee: loaded, base=opened.model.base)
        guard = Guard("g", cast(Any, model), opened.rules)
        found = unsafe_of(config_of(tmp_path, data={"train": str(file)}), guard, World.alone())
        where = tuple(f"{file}:{line}" for line in (1, 2, 3, 7))
        assert found == UnsafeSamples("g", 7, 6 - num_too_long, where, 3, 2, num_too_long, 1)


def test_a_record_that_cannot_be_read_is_named_by_its_place(tiny_llama, tmp_path, monkeypatch) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a"}\n{"text": 7}\n')
    guard = open_guard(str(tiny_llama("llama31")), World.alone())
    monkeypatch.setattr(unsafe, "unsafe_prompts", lambda *given, **named: [])
    model = SimpleNamespace(load=lambda world: SimpleNamespace(base=guard.model.base), base=guard.model.base)
    with pytest.raises(DataError, match=rf"^{file}:2: text is 7"):
        unsafe_of(config_of(tmp_path, data={"train": str(file)}), replace(guard, model=cast(Any, model)), World.alone())


def test_the_paragraph_counts_places_and_what_was_not_judged() -> None:
    where = tuple(f"a.jsonl:{line}" for line in range(1, 8))
    assert list(UnsafeSamples("g", 1003, 1000, where, 5, 4, 2, 1).lines()) == [
        "unsafe  by g",
        "  samples     7 of 1,000 (0.7%): 5 by a user's message, 4 by an assistant's",
        "  at          a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5 and 2 more (--json: all)",
        "  not judged  2 samples longer than the Guard's context",
        "  not judged  1 sample without a message that is text",
    ]
    assert list(UnsafeSamples("g", 1, 1, (), 0, 0, 0, 0).lines()) == ["unsafe  by g", "  samples     0 of 1 (0.0%)"]
