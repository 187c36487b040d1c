"""Reading records: what is accepted, and what each broken file is told."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from dist_lora.data.records import (
    Chat,
    Continuation,
    Instruction,
    Turn,
    check_columns,
    read_sample,
    recognize_format,
)
from dist_lora.data.sources import Faults, hash_sources, read_records
from dist_lora.errors import DataError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def read_all(path, *, fmt=None):
    """Every record of a file in the form that is encoded; a broken one raises with its place."""
    records = read_records(str(path), fmt=fmt, which="train")
    samples = []
    for index in range(len(records)):
        try:
            record, fmt = records.converted(index)
            samples.append(read_sample(record, fmt=fmt))
        except DataError as error:
            raise DataError(f"{records.where(index)}: {error}") from None
    return samples


def chat(**message):
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}, message]})


BROKEN_LINES = {
    "bad JSON": (b'{"messages": [}', ":2: not JSON: Expecting value at column 15, near '{\"messages\": [}'"),
    "cut line": (b'{"messages": [', ":2: not JSON: Expecting value at column 15"),
    "null content": (
        chat(role="assistant", content=None).encode(),
        ":2: messages[1].content is null; a string is expected",
    ),
    "wrong role": (
        chat(role="bot", content="x").encode(),
        ':2: messages[1].role is "bot"; one of system, user,',
    ),
    "two systems": (
        b'{"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]}',
        ":2: messages has system turns at [0, 1]; one, at the start",
    ),
    "late system": (chat(role="system", content="x").encode(), ":2: messages[1] is a system turn"),
    "a list": (
        b'[{"role": "user"}]',
        ":2: a list instead of an object; one object per record is expected, e.g. {",
    ),
    "a number": (b"17", ":2: 17 instead of an object"),
    "no message": (b'{"messages": []}', ":2: messages is an empty list"),
    "a text": (b'{"messages": "hello"}', ':2: messages is the string "hello", which is not JSON'),
    "an object": (b'{"messages": {"role": "user"}}', ':2: messages is {"role": "user"}; a list of messages'),
    "turn is text": (
        b'{"messages": ["hello"]}',
        ':2: messages[0] is "hello"; an object with role and content',
    ),
    "no column": (
        b'{"text": "x"}',
        ":2: columns 'text' found; format messages needs messages or conversations, e.g.",
    ),
    "null column": (b'{"messages": null, "a": 1}', ":2: columns 'a' found; format messages needs"),
    "content number": (
        chat(role="assistant", content=4).encode(),
        ":2: messages[1].content is 4; a string is expected",
    ),
    "image": (
        chat(role="assistant", content=[{"type": "image_url"}]).encode(),
        ':2: messages[1].content[0] is {"type": "image_url"}; only parts {"type": "text"',
    ),
    "weight": (
        chat(role="assistant", content="x", weight=0.5).encode(),
        ":2: messages[1].weight is 0.5; 0 or 1",
    ),
    "train": (
        chat(role="assistant", content="x", train="no").encode(),
        ':2: messages[1].train is "no"; true or false',
    ),
    "speaker": (
        b'{"conversations": [{"from": "bob", "value": "x"}]}',
        ':2: conversations[0].from is "bob"; one of',
    ),
    "user calls": (
        chat(role="user", content="x", tool_calls=[{"name": "f"}]).encode(),
        ":2: messages[1] has tool_calls and role user; only an assistant",
    ),
    "calls": (
        chat(role="assistant", tool_calls={"a": 1}).encode(),
        ':2: messages[1].tool_calls is {"a": 1}; a list',
    ),
    "call": (
        chat(role="assistant", tool_calls=[{"id": "x"}]).encode(),
        ':2: messages[1].tool_calls[0] is {"id": "x"};',
    ),
    "arguments": (
        chat(role="assistant", tool_calls=[{"name": "f", "arguments": "{oops"}]).encode(),
        ':2: messages[1].tool_calls[0].arguments is the string "{oops", which is not JSON',
    ),
    "argument list": (
        chat(role="assistant", tool_calls=[{"name": "f", "arguments": [1]}]).encode(),
        ":2: messages[1].tool_calls[0].arguments is [1]; an object",
    ),
    "tools": (b'{"tools": 3, ' + GOOD.encode()[1:], ":2: tools is 3; a list of JSON schemas"),
    "tool": (b'{"tools": ["f"], ' + GOOD.encode()[1:], ':2: tools[0] is "f"; a JSON schema'),
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), ":2: byte 15 of the line, 0xe9, is not UTF-8"),
    "deep": (b"[" * 100_000, ":2: the JSON is nested too deep"),
}


@pytest.mark.parametrize("fault", BROKEN_LINES)
def test_a_broken_line_is_told_with_its_place(fault, tmp_path):
    line, told = BROKEN_LINES[fault]
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}{told}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_utf_16_is_told_with_the_command_that_mends_it(encoding, suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(GOOD.encode(encoding))
    with pytest.raises(DataError, match=r":1: the file is UTF-16 or binary .* UTF-8 is expected: iconv -f UTF-16"):
        read_all(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.json"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_told(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"no records; at least one is expected, e\.g\. \{"):
        read_all(tmp_path / name)


def test_a_line_of_100_mb_is_no_record(tmp_path):
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.write(GOOD.encode() + b"\n")
        file.seek(100 * 2**20, 1)
        file.write(b"\n")
    with pytest.raises(DataError, match=r":2: a line of 100\.0 MiB; one record of at most 32 MiB"):
        read_all(tmp_path / "data.jsonl")


def test_byte_order_mark_crlf_empty_lines_and_mixed_optional_keys_do_no_harm(tmp_path):
    path = tmp_path / "data.jsonl"
    turn = '{"role": "assistant", "content": "x", "name": null, "weight": 1}'
    other = f'{{"id": 4, "messages": [{turn}], "tools": null}}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{other}\r\n  \r\n{GOOD}".encode())
    assert [len(sample.turns) for sample in read_all(path)] == [2, 1, 2]
    records = read_records(str(path), fmt=None, which="train")
    assert [records.where(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 3, 5)]


def test_a_json_list_knows_the_lines_of_its_records(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\ufeff[\n  {"text": "a"},\n\n  {"text":\n "b"}, 3]', encoding="utf-8")
    records = read_records(str(path), fmt=None, which="train")
    assert [records[i]["text"] for i in range(2)] == ["a", "b"]
    assert [records.where(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 4, 5)]
    with pytest.raises(DataError, match="3 instead of an object"):
        records[2]


def test_a_json_file_with_an_object_a_line_is_read_so(tmp_path):
    (tmp_path / "data.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_all(tmp_path / "data.json") == [Continuation("", "a"), Continuation("", "b")]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b'[\n{"text": "a"},\n{"text": }]', ":3: not JSON: Expecting value, near"), (b"[\n{}", ":2: not JSON"),
     (b'[\n{"text": "\xe9"}]', ":2: byte 0xe9 is not UTF-8")],
)  # fmt: skip
def test_a_broken_json_list_is_told_with_its_line(content, told, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}{told}")


def test_csv_keeps_texts_as_they_are(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('\ufeffinstruction,input,output\nadd,,"007"\n"two\nlines",x,true\n', encoding="utf-8")
    assert read_all(path) == [Instruction("add", "", "007"), Instruction("two\nlines", "x", "true")]
    assert read_records(str(path), fmt=None, which="train").where(1) == f"{path}:3"


def test_csv_can_hold_messages_as_json(tmp_path):
    messages = json.dumps(json.loads(GOOD)["messages"]).replace('"', '""')
    (tmp_path / "data.csv").write_text(f'messages\n"{messages}"\n')
    assert read_all(tmp_path / "data.csv") == [Chat((Turn("user", "Hi"), Turn("assistant", "Hello")))]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,b\nx,y\nz\n", ":3: 1 fields, and the header has 2: text, b"),
        ('text\nx\n"open', ":3: not CSV in UTF-8:"),
    ],
)
def test_a_broken_csv_row_is_told_with_its_line(content, told, tmp_path):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / "data.csv")
    assert str(caught.value).startswith(f"{tmp_path / 'data.csv'}{told}")


def test_a_csv_in_another_encoding_is_told_with_its_line_and_the_command_that_mends_it(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"text\n" + b"plain\n" * 5000 + "café,\n".encode("latin-1") + b"plain\n")
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / "data.csv")
    told = f"{tmp_path / 'data.csv'}:5002: byte 4 of the line, 0xe9, is not UTF-8. From a spreadsheet: iconv -f WINDOWS-1252"
    assert str(caught.value).startswith(told)


def test_parquet_messages_lose_the_nulls_that_its_schema_adds(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [
        [{"role": "user", "content": "q", "tool_calls": None}],
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}],
    ]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), path)
    (question,), (call,) = (sample.turns for sample in read_all(path))
    assert question == Turn("user", "q") and "tool_calls" not in question.as_message()
    assert call.tool_calls[0] == {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert read_records(str(path), fmt=None, which="train").where(1) == f"{path}: row 2"


def test_a_file_that_is_no_parquet_is_told(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"data\.parquet: not a complete parquet file: "):
        read_all(tmp_path / "data.parquet")


def test_sources_follow_one_another_each_with_its_format(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "a.jsonl")]
    records = read_records(names, fmt=None, which="train")
    assert [records.converted(i)[1] for i in range(5)] == ["text", "text", "prompt-completion", "text", "text"]
    assert records[2] == {"prompt": "p", "completion": "c"} and records[4] == {"text": "b"}
    assert records.where(2) == f"{names[1]}:1"
    with pytest.raises(IndexError, match="record 5 of 5"):
        records[5]
    with pytest.raises(DataError, match=r"data\.eval is an empty list; at least one file or hub id"):
        read_records([], fmt=None, which="eval")


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"data\.train: .*tain\.jsonl doesn't exist \(nearest: train\.jsonl\)"):
        read_records(str(tmp_path / "tain.jsonl"), fmt=None, which="train")
    with pytest.raises(DataError, match=r"doesn't exist, nor does its folder .*nowhere"):
        read_records(str(tmp_path / "nowhere/x.jsonl"), fmt=None, which="train")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x" * 5000 + ".jsonl", "can't be opened: File name too long"),
        ("~nobody-of-this-name/a.jsonl", "can't be opened: Could not determine home directory"),
        ("a\0.jsonl", "can't be opened: embedded null byte"),
    ],
)
def test_a_name_that_no_file_can_have_is_told(name, told):
    with pytest.raises(DataError) as caught:
        read_records(name, fmt=None, which="train")
    assert told in str(caught.value) and len(str(caught.value)) < 400


def test_a_parquet_row_that_no_python_value_can_hold_is_told(tmp_path):
    path = tmp_path / "data.parquet"
    far = pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("ms"), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": far}), path)
    with pytest.raises(DataError, match=r"row 1: the row can't be read"):
        read_all(path, fmt="text")


def test_folders_and_unknown_endings_are_told(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(DataError, match=r"is a folder; name its files: train\.jsonl"):
        read_records(str(tmp_path), fmt=None, which="train")
    with pytest.raises(
        DataError, match=r"has suffix '\.xlsx'; \.jsonl \.ndjson \.json \.csv \.parquet \.arrow, and text "
    ):
        read_records(str(tmp_path / "data.xlsx"), fmt=None, which="train")


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text(GOOD)
    monkeypatch.setattr("dist_lora.data.sources.os.access", lambda path, mode: False)
    with pytest.raises(DataError, match=r"can't be read by this user \(mode"):
        read_records(str(tmp_path / "train.jsonl"), fmt=None, which="train")


class Hub:
    """Stands in for the network: what ``load_dataset`` was asked, and what it answers."""

    def __init__(self, monkeypatch, answer):
        import datasets

        self.asked = []

        def load_dataset(repo, *, name, split):
            self.asked.append((repo, name, split))
            if isinstance(answer, Exception):
                raise answer
            return datasets.Dataset.from_list(answer)

        monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_a_hub_id_is_read_with_its_part_and_split(monkeypatch):
    hub = Hub(monkeypatch, [{"text": "a"}, {"text": "b"}])
    records = read_records("org/name:main@test", fmt=None, which="train")
    assert [records[0], records[1], records.where(1)] == [
        {"text": "a"},
        {"text": "b"},
        "org/name:main@test: row 2",
    ]
    read_records("org/name", fmt=None, which="eval")
    assert hub.asked == [("org/name", "main", "test"), ("org/name", None, "validation")]


@pytest.mark.parametrize("is_in_cache", [True, False])
def test_what_is_fetched_is_taken_from_the_cache_and_asked_for_again_where_it_is_not_there(monkeypatch, is_in_cache):
    import datasets

    asked = []

    def load_dataset(repo, *, name, split):
        asked.append("cache" if datasets.config.HF_HUB_OFFLINE else "hub")
        if asked[-1] == "cache" and not is_in_cache:
            raise ConnectionError("not in the cache")
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert len(read_records("org/name", fmt=None, which="train", is_fetched=True)) == 1
    assert asked == (["cache"] if is_in_cache else ["cache", "hub"])
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError("Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated"),
         "data.train: org/name is gated or private on the hub (Dataset 'org/name' is a gated"),
        (OSError("403 Client Error"), "https://huggingface.co/datasets/org/name, then log in: `hf auth"),
        (ValueError("Config name is missing.\nPlease pick one: ['main', 'socratic']"),
         "Please pick one: ['main', 'socratic']\nName one: data.train: org/name:CONFIG"),
        (ValueError('Unknown split "train". Should be one of [\'test\'].'),
         "has no split 'train' (Unknown split \"train\". Should be one of ['test'].). Name one: org/name@S"),
        (FileNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
         "'org/name' is neither a file nor a data set of the hub"),
        (ConnectionError("no route\nto host"), "ConnectionError: no route. Without a network, name a"),
        (ConnectionError(""), "can't be read: ConnectionError: no reason given."),
    ],
)  # fmt: skip
def test_a_hub_id_that_does_not_come_says_what_to_do(error, told, monkeypatch):
    Hub(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        read_records("org/name", fmt=None, which="train")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "fmt"),
    [({"messages"}, "messages"), ({"conversations", "id"}, "messages"), ({"instruction", "output"}, "alpaca"),
     ({"prompt", "completion", "text"}, "prompt-completion"), ({"text", "prompt"}, "text")],
)  # fmt: skip
def test_formats_are_recognised_by_their_columns(columns, fmt):
    assert recognize_format(columns) == fmt


def test_unknown_columns_name_what_each_format_needs(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError) as caught:
        read_records(str(tmp_path / "d.jsonl"), fmt=None, which="train")
    assert str(caught.value) == (
        f"{tmp_path / 'd.jsonl'}:1: columns 'question', 'answer' match no known format: "
        "messages needs messages or conversations; alpaca needs instruction and output or prompt and completion and system; "
        "prompt-completion needs prompt and completion; "
        "text needs text; tokens needs input_ids. If they have other names, map them, like "
        "data.columns: {prompt: question, completion: answer}"
    )
    with pytest.raises(DataError, match=r":1: columns 'question', 'answer' found; format text needs text, e\.g\. "):
        read_records(str(tmp_path / "d.jsonl"), fmt="text", which="train")
    with pytest.raises(DataError, match=r"columns \(none\) found; format alpaca needs"):
        check_columns([], "alpaca")


def test_sharegpt_becomes_the_same_chat_as_openais_spelling():
    shared = {
        "system": "S",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "done", "weight": 0},
        ],
    }
    spelled = {
        "tools": [{"name": "f"}],
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "done", "train": False},
        ],
    }
    assert read_sample(shared, fmt="messages") == read_sample(spelled, fmt="messages")


def test_a_prompt_and_a_completion_of_different_kinds_are_an_error():
    with pytest.raises(DataError, match=r'prompt is "a" and completion is \[\]; both as strings, or both as lists'):
        read_sample({"prompt": "a", "completion": []}, fmt="prompt-completion")


def test_of_many_faults_five_are_told_and_the_rest_counted():
    first, second = Faults(), Faults()
    for number in range(4):
        first.add(f"a{number}")
        second.add(f"b{number}")
    first.extend(second)
    assert first.count == 8
    assert first.listed() == "  a0\n  a1\n  a2\n  a3\n  b0\n  and 3 more"


def test_the_hash_is_of_the_content_and_the_kind_only(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl", "a.csv"):
        (tmp_path / name).write_text("text\nx\n")
    paths = {name: str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "a.csv")}
    one = hash_sources(paths["a.jsonl"], which="train")
    assert one == hash_sources([paths["b.jsonl"]], which="train")
    assert one != hash_sources(paths["a.csv"], which="train")
    assert one != hash_sources([paths["a.jsonl"]] * 2, which="train")
    (tmp_path / "a.jsonl").write_text("text\ny\n")
    assert one != hash_sources(paths["a.jsonl"], which="train")
    Hub(monkeypatch, [{"text": "a"}])
    on_hub = hash_sources("org/name", which="train")
    assert on_hub == hash_sources("org/name", which="train")
    Hub(monkeypatch, [{"text": "b"}])
    assert on_hub != hash_sources("org/name", which="train")
