"""What a message says is kept: each key goes to the template or is refused, in OpenAI's and ShareGPT's spellings."""

from __future__ import annotations

from typing import Any

import pytest

from dist_lora.data.records import Chat, Format, Instruction, read_sample, unused_columns
from dist_lora.data.turns import Turn
from dist_lora.errors import DataError

USER = {"role": "user", "content": "q"}


def chat_of(*messages: dict[str, Any], **columns: Any) -> Chat:
    sample = read_sample({"messages": list(messages), **columns}, fmt="messages")
    assert isinstance(sample, Chat)
    return sample


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_mask": 0}, {"loss_scale": 0}, {"trainable": False}, {"training": False}],
    ids=str,
)  # fmt: skip
def test_a_turn_is_left_out_by_the_flag_of_any_trainer(flag: dict[str, Any]) -> None:
    (name, value) = next(iter(flag.items()))
    _, left_out, kept = chat_of(
        USER, {"role": "assistant", "content": "a", **flag}, {"role": "assistant", "content": "b", name: not value}
    ).turns
    assert not left_out.is_trained and not left_out.extras
    assert kept.is_trained and kept.is_asked and not kept.extras
    other = read_sample({"conversations": [{"from": "gpt", "value": "a", **flag}]}, fmt="messages")
    assert isinstance(other, Chat) and not other.turns[0].is_trained


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"messages\[1\] says of one turn that it is trained on and that it isn't: weight: 1, loss"
    ):
        chat_of(USER, {"role": "assistant", "content": "a", "weight": 1, "loss": False})
    with pytest.raises(DataError, match=r"messages\[0\].loss is \"no\"; true or false is expected"):
        chat_of({"role": "assistant", "content": "a", "loss": "no"})


def test_all_other_keys_of_a_message_go_to_the_template() -> None:
    answer = {"role": "tool", "content": "12", "name": "weather", "tool_call_id": "c1"}
    thought = {"role": "assistant", "content": "b", "reasoning_content": "since", "mood": {"x": 1}, "none": None}
    found = chat_of(USER, answer, thought).turns
    assert found[1].as_message() == answer
    assert found[2].as_message() == {k: v for k, v in thought.items() if v is not None}


def test_a_null_content_stays_null_beside_calls_and_is_refused_elsewhere() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call]},
    ):
        assert chat_of(message).turns == (Turn("assistant", None, (call,)),)
    with pytest.raises(DataError, match=r"messages\[0\].content is null"):
        chat_of({"role": "assistant", "content": None})


def test_openais_older_functions_and_calls_are_the_tools_and_calls_of_today() -> None:
    schema = {"name": "f", "parameters": {"type": "object"}}
    older = chat_of(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
        functions=[schema],
    )
    newer = chat_of(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "name": "f", "content": "2"},
        tools=[{"type": "function", "function": schema}],
    )  # fmt: skip
    assert older == newer
    with pytest.raises(DataError, match="the record has tools and functions"):
        chat_of(USER, functions=[schema], tools=[schema])


def test_messages_calls_and_tools_that_a_file_stored_as_json_texts_are_read() -> None:
    call = '{"function": {"name": "f", "arguments": "{}"}}'
    assert chat_of(
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [call]},
        tools=['{"name": "f"}'],
    ) == chat_of(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}, tools=[{"name": "f"}])
    texts = read_sample({"messages": ['{"role": "user", "content": "q"}']}, fmt="messages")
    assert texts == chat_of(USER)


def test_a_system_message_beside_the_turns_is_their_first() -> None:
    for name in ("system", "system_prompt"):
        found = read_sample({name: "s", "conversations": [{"from": "human", "value": "q"}]}, fmt="messages")
        assert found == Chat((Turn("system", "s"), Turn("user", "q")))
    with pytest.raises(DataError, match='system is "s", and messages has a system turn: "t"'):
        chat_of({"role": "system", "content": "t"}, USER, system="s")


def test_alpaca_has_a_system_a_history_and_tools() -> None:
    record = {
        "instruction": "q",
        "input": "",
        "output": "a",
        "system": "s",
        "history": [["b", "c"]],
        "id": 7,
        "text": "",
    }
    assert read_sample(record, fmt="alpaca") == Instruction("q", "", "a", "s", (("b", "c"),))
    assert unused_columns(record, fmt="alpaca") == ["id"]
    same = {"prompt": "q", "completion": "a", "system": "s", "history": [["b", "c"]]}
    assert read_sample(same, fmt="alpaca") == read_sample(record, fmt="alpaca")
    assert read_sample({"prompt": "q", "completion": "a"}, fmt="alpaca") == Instruction("q", "", "a")
    assert unused_columns({**record, "prompt": "p"}, fmt="alpaca") == ["id", "prompt"]
    with pytest.raises(DataError, match=r'history\[0\] is "b"; \[question, answer\] is expected'):
        read_sample({**record, "history": ["b"]}, fmt="alpaca")


def test_of_two_pairs_alpaca_reads_instruction_and_output_and_reports_the_other() -> None:
    messages = {"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}]}
    pair = {"instruction": "q", "output": "a"}
    for beside in ({"prompt": [USER]}, messages):
        assert read_sample({**pair, **beside}, fmt="alpaca") == Instruction("q", "", "a")
        assert unused_columns({**pair, **beside}, fmt="alpaca") == list(beside)
    texts = {"prompt": "p", "completion": "c", "instruction": "i"}
    assert read_sample(texts, fmt="alpaca") == Instruction("p", "", "c")
    assert unused_columns(texts, fmt="alpaca") == ["instruction"]
    assert unused_columns({**messages, "input": "x"}, fmt="alpaca") == ["input"]
    assert read_sample({**pair, "input": None}, fmt="alpaca") == Instruction("q", "", "a")
    with pytest.raises(DataError, match="input is 0; a string is expected"):
        read_sample({**pair, "input": 0}, fmt="alpaca")


def test_a_turn_of_sharegpt_may_have_openais_calls() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    spelled = chat_of({"role": "assistant", "content": "", "tool_calls": [call]})
    for calls in ({"tool_calls": [call]}, {"function_call": call["function"]}):
        shared = {"conversations": [{"from": "gpt", "value": "", **calls}]}
        assert read_sample(shared, fmt="messages") == spelled
    with pytest.raises(DataError, match=r"conversations\[0\] has tool_calls and role user"):
        read_sample({"conversations": [{"from": "human", "value": "q", "tool_calls": [call]}]}, fmt="messages")
    with pytest.raises(DataError, match="is a function_call and has tool_calls beside its value"):
        read_sample({"conversations": [{"from": "function_call", "value": "{}", "tool_calls": [call]}]}, fmt="messages")


def test_a_call_without_arguments_may_have_an_empty_list_or_nothing() -> None:
    spelled = [chat_of({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]})]
    for beside in (
        {"arguments": []},
        {"arguments": "[]"},
        {"arguments": ""},
        {},
        {"arguments": "{}", "parameters": {}},
    ):
        spelled.append(chat_of({"role": "assistant", "tool_calls": [{"function": {"name": "f", **beside}}]}))
    assert all(chat == spelled[0] for chat in spelled)
    filled = [{"arguments": {"a": 1}}, {"parameters": {"a": 1}}, {"arguments": {"a": 1}, "parameters": []}]
    chats = [chat_of({"role": "assistant", "tool_calls": [{"function": {"name": "f", **beside}}]}) for beside in filled]
    assert all(chat == chats[0] != spelled[0] for chat in chats)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ({"name": "f", "arguments": 0}, r"arguments is 0; an object is expected"),
        ({"name": "f", "parameters": [1]}, r"parameters is \[1\]; an object is expected"),
        ({"name": "f", "arguments": {}, "parameters": {"a": 1}}, "has arguments and parameters, and they differ"),
    ],
)
def test_arguments_that_can_not_be_are_refused(function: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        chat_of({"role": "assistant", "content": "", "tool_calls": [{"function": function}]})


@pytest.mark.parametrize(
    ("fmt", "record", "told"),
    [
        ("prompt-completion", {"prompt": "q", "completion": "a", "history": [["b", "c"]]}, "history is a part of what is"),
        ("prompt-completion", {"prompt": "q", "completion": "a", "system": "s"}, "system is a part of what is trained on"),
        ("text", {"text": "t", "tools": [{"name": "f"}]}, "tools is a part of what is trained on, which format text can't"),
        ("messages", {"messages": [USER], "rejected": "no"}, "rejected is a preference pair"),
        ("prompt-completion", {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "tools: lost, since plain text"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER], "history": [["a", "b"]]}, "history is a part of"),
        ("alpaca", {"prompt": [{"role": "system", "content": "t"}, USER], "completion": [USER], "system": "s"}, "prompt has a system"),
        ("messages", {"messages": [USER], "conversations": [USER]}, "the record has messages and conversations"),
        ("prompt-completion", {"prompt": "q", "completion": "a", "label": False}, "label is false: it says what of a sample"),
        ("messages", {"messages": [USER], "loss_mask": [0, 1]}, r"loss_mask is \[0, 1\]: it says what of a sample is trained on"),
        ("text", {"text": "t", "weight": 0}, "weight is 0: it says what of a sample is trained on, and only turns can"),
        ("text", {"text": "t", "sample_weight": 0.5}, "sample_weight is 0.5: it says what of a sample is trained on"),
        ("messages", {"messages": [USER], "images": ["a.png"]}, "images is other media than text"),
        ("messages", {"messages": [{**USER, "images": ["a.png"]}]}, r"messages\[0\] has images; only text is supported"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_take_is_refused(fmt: Format, record: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_sample(record, fmt=fmt)
