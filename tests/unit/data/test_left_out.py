"""What a chat template leaves out is found by rendering it, and what it asks for it gets."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lora.data import left_out
from dist_lora.data.chat import encode_sample, load_tokenizer
from dist_lora.data.left_out import LeftOutError, left_out_of
from dist_lora.data.records import Chat
from dist_lora.data.token_cache import TokenRules, prepare_tokens
from dist_lora.data.turns import Turn
from dist_lora.errors import DataError
from dist_lora.world.world import World
from tests.conftest import save_byte_tokenizer

HEAD = "{% for m in messages %}<{{ m.role }}>"
TAIL = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = HEAD + "{{ m.content }};" + TAIL
THOUGHTFUL = (
    HEAD + "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }};" + TAIL
)
ASKS = (
    HEAD
    + "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %};"
    + TAIL
)
CALLS = HEAD + "{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %};" + TAIL
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": {"z": [2]}}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder, chat_template=None)


@pytest.fixture
def shown(tokenizer):
    """``shown(template, *messages)``: the document, its targets between brackets, and what is reported."""
    own = tokenizer.chat_template

    def show(
        template: str, *messages: dict[str, Any], train_on: Any = "assistant", **columns: Any
    ) -> tuple[str, tuple[str, ...]]:
        tokenizer.chat_template = template
        encoded = encode_sample(
            {"messages": list(messages), **columns}, tokenizer=tokenizer, fmt="messages", train_on=train_on
        )
        text, inside = "", False
        for token, is_target in zip(encoded.ids, encoded.is_target, strict=True):
            text += ("[" if is_target and not inside else "]" if inside and not is_target else "") + tokenizer.decode(
                [token]
            )
            inside = is_target
        return text.removeprefix("<|begin_of_text|>") + ("]" if inside else ""), encoded.reported

    yield show
    tokenizer.chat_template = own


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_the_reasoning_of_the_answer_is_learned_and_that_of_earlier_turns_is_reported(shown) -> None:
    first, last = turn("assistant", "a", reasoning_content="r"), turn("assistant", "b", reasoning_content="s")
    assert shown(THOUGHTFUL, turn("user", "q"), last) == ("<user>q;<assistant>[(s)b;]", ())
    text, reported = shown(THOUGHTFUL, turn("user", "q"), first, turn("user", "p"), last, train_on="last")
    assert text == "<user>q;<assistant>a;<user>p;<assistant>[(s)b;]"
    assert reported == ("the chat template leaves out reasoning_content of assistant turns",)
    with pytest.raises(LeftOutError, match="reasoning_content of the assistant turn 1: lost, the chat template"):
        shown(PLAIN, turn("user", "q"), last)


def test_a_reasoning_inside_the_text_is_judged_like_one_beside_it(shown) -> None:
    cuts = HEAD + "{{ m.content if loop.last else m.content.split('</think>')[-1] }};" + TAIL
    answers = [turn("assistant", "<think>r</think>a"), turn("user", "p"), turn("assistant", "<think>s</think>b")]
    text, reported = shown(cuts, turn("user", "q"), *answers, train_on="last")
    assert text.endswith("[<think>s</think>b;]")
    assert reported == ("the chat template leaves out the reasoning in the text of the assistant turn 1",)
    drops = HEAD + "{{ m.content.split('</think>')[-1] }};" + TAIL
    with pytest.raises(LeftOutError, match="the reasoning in the text of the assistant turn 1: lost"):
        shown(drops, turn("user", "q"), answers[-1])


def test_a_null_content_is_null_where_the_template_asks_and_empty_where_it_would_write_none(shown) -> None:
    messages = turn("user", "q"), turn("assistant", None, tool_calls=[CALL])
    call = '{"name": "add", "arguments": {"x": 1, "y": {"z": [2]}}}'
    for template in (ASKS, CALLS):
        assert shown(template, *messages) == (f"<user>q;<assistant>[{call};]", ())


@pytest.mark.parametrize(
    ("template", "messages", "columns", "told"),
    [
        (ASKS, [turn("assistant", "text", tool_calls=[CALL])], {}, "the argument 'x' of the assistant turn 0, call 0"),
        (PLAIN, [turn("user", "q"), turn("assistant", "", tool_calls=[CALL])], {}, "the name of the assistant turn 1, call 0"),
        (CALLS.replace("m.tool_calls", "(m.tool_calls or [])[:1]"), [turn("assistant", "", tool_calls=[CALL, {"name": "sub", "arguments": {}}])],
         {}, "the name of the assistant turn 0, call 1: lost"),
        (CALLS.replace("c.function |", "c.function.name |"), [turn("assistant", "", tool_calls=[CALL])], {}, "the argument 'x' of the assistant turn 0, call 0"),
        (PLAIN, [turn("user", "q"), turn("assistant", "a")], {"tools": [{"name": "f", "parameters": {}}]}, "tool 0: lost"),
        (HEAD + "{{ m.content if m.role != 'system' }};" + TAIL, [turn("system", "s"), turn("user", "q"), turn("assistant", "a")], {},
         "the text of the system turn 0: lost"),
    ],
)  # fmt: skip
def test_what_is_lost_of_targets_calls_tools_and_texts_is_refused(shown, template, messages, columns, told) -> None:
    with pytest.raises(LeftOutError) as refused:
        shown(template, *messages, **columns)
    assert told in str(refused.value) and "Set data.chat_template to a FILE" in str(refused.value)


def test_a_call_without_arguments_is_not_taken_for_the_tool_of_its_name(shown) -> None:
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + PLAIN
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [turn("user", "q"), turn("assistant", "text", tool_calls=[call])]
    with pytest.raises(LeftOutError, match="the name of the assistant turn 1, call 0: lost"):
        shown(template, *messages, tools=[tool])
    writes = template.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
    )
    assert shown(writes, *messages, tools=[tool])[0].endswith("[textnow;]")


def test_keys_that_no_template_knows_are_reported(shown) -> None:
    text, reported = shown(PLAIN, turn("user", "q", mood="good"), turn("assistant", "a"), id=3)
    assert text == "<user>q;<assistant>[a;]"
    assert reported == ("column 'id' is not used", "the chat template leaves out mood of user turns")


def test_a_template_that_refuses_marks_is_judged_by_the_texts_themselves(shown) -> None:
    picky = "{% if 'xq' in messages[0].content %}{{ raise_exception('no marks') }}{% endif %}" + PLAIN
    assert shown(picky, turn("user", "q"), turn("assistant", "a"))[0] == "<user>q;<assistant>[a;]"
    with pytest.raises(LeftOutError, match="the text of the user turn 0: lost"):
        shown(
            picky.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"),
            turn("user", "q"),
            turn("assistant", "a"),
        )


def test_records_of_one_structure_are_judged_once(shown, monkeypatch) -> None:
    judged: list[object] = []
    judge = left_out._judge
    monkeypatch.setattr(left_out, "_judge", lambda *known: judged.append(known) or judge(*known))
    template = CALLS + "{# of this test #}"
    for i in range(5):
        call = {"id": f"call{i}", "type": "function", "function": {"name": f"f{i}", "arguments": {"x": str(i)}}}
        shown(
            template,
            turn("user", f"q{i}"),
            turn("assistant", None, tool_calls=[call]),
            turn("tool", "1", tool_call_id=f"call{i}"),
        )
    assert len(judged) == 1


MARKED = (
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }};{% endgeneration %}{% else %}{{ m.content }};{% endif %}"
    + TAIL
)


def test_a_conversation_that_was_judged_is_not_kept(tokenizer) -> None:
    chat = Chat((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")))
    left_out._judged.cache_clear()
    left_out_of(chat, tokenizer=tokenizer)
    kept = weakref.ref(chat)
    del chat
    gc.collect()
    assert left_out._judged.cache_info().currsize == 1 and kept() is None


def test_what_a_template_marks_as_generated_is_the_target_as_in_transformers(shown, tokenizer) -> None:
    messages = turn("user", "q"), turn("assistant", "ab"), turn("user", "p"), turn("assistant", "c")
    text, _ = shown(MARKED, *messages)
    assert text == "<user>q;<assistant>[ab;]<user>p;<assistant>[c;]"
    theirs = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode_sample({"messages": list(messages)}, tokenizer=tokenizer, fmt="messages", train_on="assistant")
    assert np.array_equal(
        theirs["assistant_masks"], ours.is_target[1:]
    )  # without BOS, which this template doesn't write
    assert shown(MARKED, *messages, train_on="last")[0] == "<user>q;<assistant>ab;<user>p;<assistant>[c;]"
    assert shown(MARKED, messages[0], {**messages[1], "loss": False}, *messages[2:])[0].endswith(
        "<assistant>ab;<user>p;<assistant>[c;]"
    )


def test_a_flag_that_asks_for_a_users_turn_is_refused(shown) -> None:
    with pytest.raises(DataError, match="turn 0 is to be trained on by its flag, and its role is user"):
        shown(PLAIN, turn("user", "q", train=True), turn("assistant", "a"))


def test_what_is_not_used_is_reported_once_with_its_count_also_from_the_cache(tmp_path, tokenizer, caplog) -> None:
    file = tmp_path / "a.jsonl"
    row = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 1}\n'
    file.write_text(row * 3 + row.replace(', "id": 1', ""))
    caplog.set_level("INFO", "dist_lora")
    for _ in range(2):
        caplog.clear()
        prepare_tokens(str(file), which="train", rules=TokenRules(99), tokenizer=tokenizer, tokenizer_hash="h",
                       cache_dir=tmp_path / "cache", world=World.alone())  # fmt: skip
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warned == ["data.train: column 'id' is not used (in 3 of 4 samples)"]


def test_a_template_may_stand_in_the_config_itself(tmp_path) -> None:
    save_byte_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, chat_template=PLAIN).chat_template == PLAIN
