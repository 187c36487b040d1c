"""A file of prompts: what each line asks, and every line that can't be asked with its number."""

from __future__ import annotations

import json

import pytest

from dist_lora.chat.prompts import encode_prompts, given_prompts, read_prompts, write_answers
from dist_lora.errors import ConfigError, DataError
from dist_lora.files import refuse_file


def test_a_text_a_line_and_objects_are_read_with_their_lines(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\r\n\ntwo\n")
    assert [(p.where.rpartition(":")[2], p.record) for p in read_prompts(tmp_path / "a.txt")] == [
        ("1", {"prompt": "one"}),
        ("3", {"prompt": "two"}),
    ]
    record = {"id": 7, "messages": [{"role": "user", "content": "one"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert [p.record for p in read_prompts(tmp_path / "a.jsonl")] == [record]


def test_every_line_that_is_no_prompt_is_told_with_its_number(tmp_path) -> None:
    turn = {"role": "assistant", "content": "-"}
    lines = ['{"prompt": "a"}', "{", '{"text": "a"}', '{"prompt": 3}', json.dumps({"messages": [turn]}),
             '{"prompt": "a", "generated": "b"}']  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as raised:
        read_prompts(tmp_path / "a.jsonl")
    told = str(raised.value).splitlines()
    assert told[0] == "--prompts: 5 lines can't be asked:" and raised.value.exit_code == 2
    for number, line in zip(range(2, 7), told[1:], strict=True):
        assert line.startswith(f"  {tmp_path}/a.jsonl:{number}: ")
    assert "found text, expected either prompt (a text) or messages (a list)" in told[2]
    assert "the last one is the assistant's" in told[4] and "it has 'generated' already" in told[5]


def test_half_a_character_anywhere_in_a_line_is_told_before_anything_is_answered(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "id": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: a text has U\+D83D, an unpaired surrogate"):
        read_prompts(tmp_path / "a.jsonl")


def test_no_prompts_a_missing_file_and_an_existing_answer_are_the_users_mistakes(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "has no prompts"), ("none.txt", "can't be read: No such file")):
        with pytest.raises(ConfigError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(ConfigError, match="exists already"):
        refuse_file(tmp_path / "empty.txt", option="--out")
    with pytest.raises(ConfigError, match="its folder: no such folder"):
        refuse_file(tmp_path / "no" / "a.jsonl", option="--out")


def test_chats_are_refused_where_plain_text_is_continued(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    prompts = read_prompts(tmp_path / "a.jsonl")
    for kind, system, told in (("text", None, "plain text is continued"), ("chat", "b", "--system is for prompts")):
        with pytest.raises(DataError, match=told):
            encode_prompts(prompts, tokenizer=None, kind=kind, system=system, context=99)


def test_answers_stand_in_the_order_of_the_prompts_each_in_its_record(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("0\n1\n2\n3\n4\n")
    write_answers(read_prompts(tmp_path / "a.txt"), [f"answer {i}" for i in range(5)], out=tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"prompt": str(i), "generated": f"answer {i}"} for i in range(5)]


def test_what_a_script_asks_is_a_text_or_a_chat() -> None:
    chat = [{"role": "user", "content": "a"}]
    assert [prompt.record for prompt in given_prompts(["a", chat])] == [{"prompt": "a"}, {"messages": chat}]
    with pytest.raises(DataError) as raised:
        given_prompts(["a", " ", [*chat, {"role": "assistant", "content": "b"}]])
    assert "prompts[1]: prompt: found ' ', expected a text" in str(raised.value)
    assert "prompts[2]: messages: the last one is the assistant's" in str(raised.value)
