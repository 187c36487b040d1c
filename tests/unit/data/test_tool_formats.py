"""Conversations with tools in Llama's formats: 200 drawn ones each have the ids of Meta's own encoder, or of transformers'."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_models.datatypes import RawMessage, StopReason, ToolCall, ToolPromptFormat
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tool_utils import ToolUtils, parse_python_list_for_function_calls

from dist_lora.data.chat import encode_prompt, encode_sample, load_tokenizer
from dist_lora.data.left_out import LeftOutError
from dist_lora.data.records import read_sample
from dist_lora.errors import DataError

# The chat template of a model of the herd, as its folder has it.
# A template that has one call in a turn, as those of Llama 3.1's own models have, and loses a text beside it.
ONE_CALL = (
    "{{ bos_token }}{{ builtin_tools | default([]) | join(', ') }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}"
    "{% endif %}"
    "{{ message.tool_calls[0].function | tojson }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
HOW = {
    "llama3.1": 'You may call these functions. To call one, answer only with JSON: {"type": "function", "name": FUNCTION, '
    '"parameters": {NAME: VALUE}}.\n',
    "llama3.2": "You may call these functions. To call them, answer only with a list: [FUNCTION(NAME=VALUE, NAME=VALUE), "
    "FUNCTION(NAME=VALUE)].\n",
}
SEARCHES = ("brave_search", "wolfram_alpha")
TEXTS = (
    "What is it?",
    "  two  spaces ",
    "日本語 é 🎉",
    "<|eot_id|> is <|python_tag|>",
    "line\n\nline",
    "{'a': 1}",
    "3.14",
    "[f(x)]",
)
NAMES = ("get_weather", "f", "convert_2", "sendMail")
Record = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer_of(llama3_folder: Path) -> Callable[[str], Any]:
    """``tokenizer_of(template)``: Llama 3's tokenizer with that template, read once."""
    return functools.cache(lambda template: load_tokenizer(llama3_folder, chat_template=template))


def drawn(num_chats: int, *, seed: str, most_calls: int, texts: tuple[str, ...] = TEXTS) -> list[Record]:
    """Conversations of one to three questions with calls, answers of tools and texts; half have builtin_tools."""
    rng = random.Random(seed)
    return [_chat(rng, most_calls, texts) for _ in range(num_chats)]


def _chat(rng: random.Random, most_calls: int, texts: tuple[str, ...]) -> Record:
    builtin = list(rng.choice(([], [], ["code_interpreter"], [*SEARCHES], ["brave_search", "code_interpreter"])))
    turns: list[Record] = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": rng.choice(texts)})
        if rng.random() < 0.8:
            if builtin and rng.random() < 0.5:
                calls = [_built_in(rng, rng.choice(builtin))]
            else:
                calls = [_call(rng) for _ in range(rng.randint(1, most_calls))]
            turns.append({"role": "assistant", "content": None, "tool_calls": calls})
            for _ in calls:
                turns.append({"role": rng.choice(("tool", "ipython")), "content": rng.choice(texts)})
        turns.append({"role": "assistant", "content": rng.choice(texts)})
    if turns[-2]["role"] in ("tool", "ipython") and rng.random() < 0.7:  # ends with a call
        while "tool_calls" not in turns[-1]:
            turns.pop()
    record: Record = {"messages": turns}
    if rng.random() < 0.5:
        schema = {"type": "object", "properties": {"a": {"type": "string", "description": rng.choice(texts)}}}
        record["tools"] = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in NAMES]
    if builtin:
        record["builtin_tools"] = builtin
    return record


def _call(rng: random.Random) -> Record:
    # ASCII: ChatFormat writes other letters as \u00e9, and all templates, as transformers' tojson, as they are.
    values = ("x", "New York, NY", "", "it's", 1, -3, 2.5, 1e20, True, None, [1, "b"], [], [True, None])
    keys = rng.sample(("a", "city", "n_days"), rng.randint(0, 3))
    return {
        "type": "function",
        "function": {"name": rng.choice(NAMES), "arguments": {key: rng.choice(values) for key in keys}},
    }


def _built_in(rng: random.Random, name: str) -> Record:
    arguments = (
        {"code": "print(1)\nx = 'é'"}
        if name == "code_interpreter"
        else {"query": rng.choice(("gold price", "3x+1=7", "日本"))}
    )
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def reference(record: Record, template: str, meta: Any) -> tuple[list[int], list[bool]]:
    """Ids and targets of a conversation by Meta's ChatFormat, message by message."""
    chat_format = ChatFormat(meta)
    ids, is_target = [meta.special_tokens["<|begin_of_text|>"]], [False]
    builtin = record.get("builtin_tools", [])
    for message in _with_listing(record, template):
        calls = [call["function"] for call in message.get("tool_calls", [])]
        encoded = _encoded(message, calls, builtin, template, chat_format)
        num_header = len(chat_format._encode_header("ipython" if message["role"] == "tool" else message["role"]))
        ids += encoded
        is_target += [message["role"] == "assistant" and place >= num_header for place in range(len(encoded))]
    return ids, is_target


def _with_listing(record: Record, template: str) -> list[Record]:
    builtin, tools, turns = record.get("builtin_tools", []), record.get("tools", []), list(record["messages"])
    searches = ", ".join(name for name in builtin if name != "code_interpreter")
    parts = []
    if builtin:
        parts.append("Environment: ipython\n" + (f"Tools: {searches}\n" if searches else ""))
    if tools:
        parts.append(HOW[template] + "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools))
    own = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    parts += [own] if own is not None else []
    return [{"role": "system", "content": "\n".join(parts)}, *turns] if parts else turns


def _encoded(
    message: Record, calls: list[Record], builtin: list[str], template: str, chat_format: ChatFormat
) -> list[int]:
    is_builtin = bool(calls) and calls[0]["name"] in builtin
    is_list = template == "llama3.2" and calls and not is_builtin
    theirs = [ToolCall(call_id="", tool_name=call["name"], arguments=call["arguments"]) for call in calls]
    content = (message["content"] or "").strip()
    if is_list:  # ChatFormat writes a list for each call; the published format is one list
        content += (
            "["
            + ", ".join(ToolUtils.encode_tool_call(call, ToolPromptFormat.python_list)[1:-1] for call in theirs)
            + "]"
        )
        theirs = []
    ends_message = bool(calls) and (is_builtin if template == "llama3.2" else bool(builtin))
    raw: Record = {"role": "tool" if message["role"] == "ipython" else message["role"], "content": content}
    if message["role"] == "assistant":
        raw |= {
            "tool_calls": theirs,
            "stop_reason": StopReason.end_of_message if ends_message else StopReason.end_of_turn,
        }
    ids, _ = chat_format.encode_message(RawMessage(**raw), ToolPromptFormat.json)
    if is_builtin and calls[0]["name"] in SEARCHES:  # ChatFormat forgets the tag that its own prompt format shows
        place = len(chat_format._encode_header("assistant"))
        ids = [*ids[:place], chat_format.tokenizer.special_tokens["<|python_tag|>"], *ids[place:]]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llama3.1", "llama3.2"])
def test_ids_and_targets_of_200_chats_with_tools_are_those_of_metas_chat_format(template, tokenizer_of, meta) -> None:
    tokenizer = tokenizer_of(template)
    chats = drawn(200, seed=template, most_calls=3)
    assert sum(len(turn.get("tool_calls", [])) > 1 for chat in chats for turn in chat["messages"]) > 50
    for record in chats:
        encoded = encode_sample(record, tokenizer=tokenizer, fmt="messages", train_on="assistant")
        ids, is_target = reference(record, template, meta)
        assert encoded.ids == ids, record
        assert encoded.is_target == is_target, record
        assert encoded.reported == ()


def asked(*calls: Record, **columns: Any) -> Record:
    turn = {"role": "assistant", "content": None, "tool_calls": list(calls)}
    return {"messages": [{"role": "user", "content": "q"}, turn], **columns}


def call(name: str, **arguments: Any) -> Record:
    return {"function": {"name": name, "arguments": arguments}}


def learned_of(record: Record, tokenizer: Any) -> str:
    encoded = encode_sample(record, tokenizer=tokenizer, fmt="messages", train_on="assistant")
    return str(tokenizer.decode([i for i, is_target in zip(encoded.ids, encoded.is_target, strict=True) if is_target]))


def test_a_python_list_is_python_where_metas_own_encoder_writes_none(tokenizer_of) -> None:
    arguments = {"text": 'say "é"\n\\ <|eot_id|>', "deep": {"k": [{"x": None}, False]}, "n": -1.5}
    learned = learned_of(asked(call("f", **arguments), call("math.g")), tokenizer_of("llama3.2"))
    assert learned == (
        '[f(text="say \\"é\\"\\n\\\\ <|eot_id|>", deep={"k": [{"x": None}, False]}, n=-1.5), math.g()]<|eot_id|>'
    )
    alone = learned_of(asked(call("f", **arguments)), tokenizer_of("llama3.2")).removesuffix("<|eot_id|>")
    assert parse_python_list_for_function_calls(alone) == [("f", arguments)]


SEVERAL = (call("f", x=1), call("g"))


@pytest.mark.parametrize(
    ("template", "record", "told"),
    [
        (ONE_CALL, asked(*SEVERAL), r"only supports single tool-calls at once! \(turn 1 has 2 calls\)\. For several calls in a turn "
         r"set data\.chat_template: llama3\.1 \(JSON\) or llama3\.2"),
        ("llama3.1", asked(call("brave_search", query="q"), call("f"), builtin_tools=["brave_search"]), "stands alone in its turn, without a text or another call$"),
        ("llama3.1", asked(call("brave_search", q="q"), builtin_tools=["brave_search"]), "refuses the turns 'user assistant': 'dict object' has no attribute 'query'"),
        ("llama3.1", asked(call("code_interpreter"), builtin_tools=["code_interpreter"]), "has no attribute 'code'"),
        ("llama3.1", asked(call("brave_search", query="q", n=2), builtin_tools=["brave_search"]), "the argument 'n' of the assistant turn 1, call 0: lost"),
        ("llama3.2", asked(call("f", **{"from": 1})), "'from' can't be the name of a function or of an argument in Python"),
        ("llama3.2", asked(call("get-weather")), "'get-weather' can't be the name of a function"),
        ("llama3", asked(call("f"), builtin_tools=["brave_search"]), r"builtin_tools: lost, the chat template \(data.chat_template: llama3\) doesn't render it"),
        ("llama3.1", asked(call("f"), builtin_tools="brave_search"), "builtin_tools is the string \"brave_search\", which is not JSON"),
        ("llama3.1", asked(call("f"), builtin_tools=[{"type": "brave_search"}]), "builtin_tools is .* a list of names is expected, such as brave_search"),
    ],
)  # fmt: skip
def test_what_a_format_can_not_write_is_refused_by_what_it_is(template, record, told, tokenizer_of) -> None:
    with pytest.raises(DataError, match=told):
        learned_of(record, tokenizer_of(template))


def test_a_text_beside_a_built_in_call_is_refused_and_beside_json_it_comes_first(tokenizer_of) -> None:
    record = asked(call("f", x="é"), builtin_tools=["code_interpreter"])
    record["messages"][1]["content"] = "Let me see.\n"
    learned = learned_of(record, tokenizer_of("llama3.1"))
    assert learned == 'Let me see.{"type": "function", "name": "f", "parameters": {"x": "é"}}<|eom_id|>'
    record["messages"][1]["tool_calls"] = [call("code_interpreter", code="1")]
    with pytest.raises(DataError, match="stands alone in its turn"):
        learned_of(record, tokenizer_of("llama3.1"))
    with pytest.raises(LeftOutError, match="the text of the assistant turn 1: lost"):
        learned_of(record, tokenizer_of(ONE_CALL))


def test_special_tokens_in_the_names_of_tools_and_in_code_are_text(tokenizer_of) -> None:
    tokenizer = tokenizer_of("llama3.1")
    record = asked(call("code_interpreter", code="'<|eom_id|>'"), builtin_tools=["code_interpreter", "a<|eot_id|>"])
    ids = encode_sample(record, tokenizer=tokenizer, fmt="messages", train_on="assistant").ids
    assert [
        ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    ] == [1, 2, 1]


def test_builtin_tools_stand_beside_messages_of_any_kind_and_a_prompt_has_them(tokenizer_of) -> None:
    record = asked(call("brave_search", query="q"), builtin_tools='["brave_search"]')
    prompt, completion = record["messages"][:1], record["messages"][1:]
    whole = read_sample(record, fmt="messages")
    split = read_sample(
        {"prompt": prompt, "completion": completion, "builtin_tools": ["brave_search"]}, fmt="prompt-completion"
    )
    assert whole.builtin_tools == split.builtin_tools == ("brave_search",)  # type: ignore[union-attr]
    for fmt, text in (("text", {"text": "t"}), ("prompt-completion", {"prompt": "p", "completion": "c"})):
        with pytest.raises(DataError, match="builtin_tools"):
            read_sample({**text, "builtin_tools": ["brave_search"]}, fmt=fmt)  # type: ignore[arg-type]
    tokenizer = tokenizer_of("llama3.1")
    ids = encode_prompt(prompt, tokenizer=tokenizer, beside={"builtin_tools": ["brave_search"]})
    assert ids == encode_sample(record, tokenizer=tokenizer, fmt="messages", train_on="assistant").ids[: len(ids)]
    assert "Tools: brave_search" in tokenizer.decode(ids)
