"""Calls are read from an answer as every template writes them and as Meta's own decoder reads them, and nothing else is a call."""

from __future__ import annotations

import json
import keyword
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers import PreTrainedTokenizerBase

from dist_lora.data import chat as chat_module
from dist_lora.data.chat import load_tokenizer
from dist_lora.data.records import Chat
from dist_lora.data.template import Renderer
from dist_lora.data.turns import Turn
from dist_lora.evaluation.read_calls import Answer, Call, read_calls, same_json
from tests.conftest import save_byte_tokenizer

TEMPLATES = {
    name: (Path(chat_module.__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("llama3", "llama3.1", "llama3.2", "chatml")
}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
IDENTIFIERS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(Call, IDENTIFIERS, st.dictionaries(IDENTIFIERS, VALUES, max_size=3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder, chat_template=None)


def written(calls: list[Call], tokenizer: PreTrainedTokenizerBase, template: str, builtin: tuple[str, ...] = ()) -> str:
    """The calls as a template writes an assistant's turn."""
    tokenizer.chat_template = TEMPLATES[template]
    as_record = tuple({"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in calls)
    chat = Chat((Turn("user", "q"), Turn("assistant", "", as_record)), builtin_tools=builtin)
    render = Renderer(chat, tokenizer)
    text = render.upto(2).removeprefix(render.upto(1, has_prompt=True)).strip()
    return text.removesuffix("<|eot_id|>").removesuffix("<|eom_id|>").removesuffix("<|im_end|>")


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_that_a_template_writes_are_read_as_they_were(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(CALLS, min_size=1, max_size=3))
    def check(calls: list[Call]) -> None:
        read = read_calls(written(calls, tokenizer, template))
        assert not read.is_broken and len(read.calls) == len(calls)
        for found, call in zip(read.calls, calls, strict=True):
            assert found.name == call.name and same_json(found.arguments, call.arguments)

    check()


@pytest.mark.parametrize("template", ["llama3.1", "llama3.2"])
@pytest.mark.parametrize("query", ["gold price", 'the "best" of 2', "a\nb", ")"])
def test_built_in_calls_are_read_as_they_were(template: str, query: str, tokenizer: PreTrainedTokenizerBase) -> None:
    call = Call("brave_search", {"query": query})
    text = written([call], tokenizer, template, builtin=("brave_search",))
    assert text.startswith("<|python_tag|>brave_search.call(") and read_calls(text) == Answer((call,))
    code = Call("code_interpreter", {"code": f"print({query!r})"})
    text = written([code], tokenizer, template, builtin=("code_interpreter",))
    assert read_calls(text) == Answer((code,))


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "function", "name": "f", "parameters": {"a": 1, "b": ["x", null]}}',
        '<|python_tag|>{"name": "f", "parameters": {}}',
        '[f(a=1, b="x", c=[True, None])]',
        "[get_user_info(user_id=7890, special='black')]",
        '<|python_tag|>[get_weather(city="San Francisco", metric="celsius")]',
        '<|python_tag|>brave_search.call(query="latest price of 1oz gold")',
        '<|python_tag|>wolfram_alpha.call(query="100th decimal of pi")',
        "<|python_tag|>def f(n):\n    return n\n\nprint(f(7))",
        '<function=trending_songs>{"n": 10}</function>',
        "The sky is blue.",
    ],
)
def test_metas_own_decoder_reads_the_same(text: str) -> None:
    theirs = ChatFormat(MetaTokenizer.get_instance()).decode_assistant_message_from_content(text, None)
    wanted = [Call(getattr(call.tool_name, "value", call.tool_name), call.arguments) for call in theirs.tool_calls]
    assert read_calls(text) == Answer(tuple(wanted))


F, G = Call("f", {"a": 1}), Call("g", {})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', (F,)),
        ('  {"arguments": "{\\"a\\": 1}", "name": "f"}\n', (F,)),
        ('{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', (F,)),
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', (F, G)),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]', (F, G)),
        ("[f(a=1), math.g()]", (F, Call("math.g", {}))),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', (F, G)),
        ('Let me see.{"name": "f", "parameters": {"a": 1}}', (F,)),
        ("Let me see.\n[f(a=1)]", (F,)),
        ('See {"k": 1}:\n{"x": 2}\n{"name": "g", "parameters": {}}', (G,)),
        ('brave_search.call(query="a", n="b")', (Call("brave_search", {"query": "a", "n": "b"}),)),
    ],
)  # fmt: skip
def test_other_spellings_are_read(text: str, calls: tuple[Call, ...]) -> None:
    assert read_calls(text) == Answer(calls)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "[1, 2]", '{"a": 1}', '{"name": "Bob", "age": 3}', '[{"name": "Bob"}, {"name": "Al"}]', "see [f](x)", "f(a=1)", "[" * 9999],
)  # fmt: skip
def test_what_is_no_call_is_none(text: str) -> None:
    assert read_calls(text) == Answer()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "parameters": {"a": 1',
        '{"name": "f", "pa',
        '{"name": "f", "parameters": {"a": 1}} is what I would call',
        '{"name": "f", "parameters": 3}',
        '{"name": "f", "parameters": {}, "arguments": {}}',
        '{"name": "f", "parameters": {"a": 1, "a": 2}}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": 1, "parameters": {}}',
        '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}',
        "[f(1)]",
        "[f(a=1, a=2)]",
        "[f(a=b)]",
        "[f(a=true)]",
        "[f(a=(1, 2))]",
        "[f(a={{'x': 1}})]",
        "[f(a={[1]: 2})]",
        "[f(a=1e999)]",
        "[f(**{'a': 1})]",
        "[f(a=1), 2]",
        "[f(a=1",
        "[f(a=" + "[" * 300 + "]" * 300 + ")]",
        "[f(a=" + "-" * 5000 + "1)]",
        '{"name": "f", "parameters": {"a": ' + "[" * 200 + "]" * 200 + "}}",
        '{"name": "f", "parameters": {"a": ' + "[" * 99999,
        "<|python_tag|>",
        '<|python_tag|>{"name": "f", "para',
        '<tool_call>{"name": "f", "arguments": {}}',
        "<function=f>{}",
    ],
    ids=lambda text: text[:40],
)
def test_a_call_that_can_not_be_read_is_broken(text: str) -> None:
    assert read_calls(text) == Answer(is_broken=True)


PIECES = st.sampled_from(
    ['{"name": "f", ', '"parameters": {', "}", "[", "]", "f(", "a=1", ")", "<|python_tag|>", "<tool_call>", "</tool_call>", ".call(",
     'query="', '"', "<function=", ">", "\n", "\\", "'", ",", "{", "-", "lambda", "\x00", "\ud800", "1" * 5000]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
@example("[f(a='\\N{x}')]")
def test_any_text_is_read_without_an_error_and_what_is_read_are_json_values(text: str) -> None:
    answer = read_calls(text)
    assert not (answer.calls and answer.is_broken)
    for call in answer.calls:
        assert same_json(json.loads(json.dumps(call.arguments)), call.arguments)


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_values_are_equal_where_their_json_says_the_same(one: Any, other: Any) -> None:
    assert same_json(one, json.loads(json.dumps(one)))
    if same_json(one, other):
        assert one == other  # Python also takes True for 1


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (1, "1", False),
        (None, False, False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ([1, 2], [2, 1], False),
        ([True], [1], False),
        ({"a": {"b": 1}}, {"a": {"b": True}}, False),
        ("a", "A", False),
    ],
)
def test_json_values_are_compared_as_json(one: Any, other: Any, is_same: bool) -> None:
    assert same_json(one, other) is same_json(other, one) is is_same
