"""All of a file of text is read, or the file is refused with the place where it goes on otherwise."""

from __future__ import annotations

import pytest

from dist_lora.data import json_documents, text_files
from dist_lora.data.sources import read_records
from dist_lora.errors import DataError


def read_all(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    records = read_records(str(tmp_path / name), fmt=None, which="train")
    return [(records.where(index).rpartition(":")[2], records[index]) for index in range(len(records))]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"text": "a"}]\n{"text": "b"}\n', r":2: not JSON: the list ends before it, and nothing can follow"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', r":2: not JSON: the list ends before it"),
        ('[{"text": "a"}\n{"text": "b"}]', r":2: not JSON: ',' or '\]' is expected after a record"),
        ('[{"text": "a"},\n,{"text": "b"}]', r":2: not JSON: Expecting value"),
        ('[{"text": "a"},\n]', r":2: not JSON: Expecting value"),
        ('[{"text": "a"},\n{"text": NaN}]', r":2: not JSON: NaN is no JSON value"),
        ('[{"text": "a"},\n{"text": "a", "text": "b"}]', r":2: not JSON: named twice: text"),
        ('{\n"text": "a"\n}\nmore', r":4: not JSON: Expecting value"),
    ],
)
def test_what_follows_in_a_json_file_is_told(content, told, tmp_path):
    with pytest.raises(DataError, match=rf"data\.json{told}"):
        read_all(tmp_path, "data.json", content)


def test_objects_over_several_lines_have_the_line_on_which_they_begin(tmp_path):
    content = '\n{\n "text": "a"\n}\n{"text":\n"b"}\n'
    assert read_all(tmp_path, "data.json", content) == [("2", {"text": "a"}), ("5", {"text": "b"})]


@pytest.mark.parametrize("indent", ["", "\n"])
def test_a_list_inside_an_object_is_told_with_the_command_that_takes_it_out(indent, tmp_path):
    with pytest.raises(DataError, match=r"Its 'data' is a list of 2 objects.*: jq '\.\"data\"' data\.json > records"):
        read_all(tmp_path, "data.json", f'{{{indent}"version": 1, "data": [{{"text": "a"}}, {{"text": "b"}}]}}')


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        ('{"text": "a", "text": "b"}', "not JSON: named twice: text"),
        ('{"text": "a", "score": NaN}', "not JSON: NaN is no JSON value"),
        ('{"text": "a", "score": -Infinity}', "not JSON: -Infinity is no JSON value"),
        ("{", r"not JSON: .* An object over several lines, or a list, is read from a file named \.json"),
        ('[{"text": "a"}]', r"a list instead of an object.* is read if it is named \.json"),
    ],
)
def test_a_line_that_is_not_one_object_is_told(line, told, tmp_path):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    records = read_records(str(tmp_path / "data.jsonl"), fmt=None, which="train")
    with pytest.raises(DataError, match=told):
        records[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,text\na,b\n", r":1: the header has 'text' more than once"),
        ("instruction;output\na;b\n", r":1: the header is 'instruction;output', one field; .* not ';'"),
        ("instruction\toutput\na\tb\n", r":1: the header is 'instruction\\toutput', one field"),
    ],
)
def test_a_header_that_names_no_columns_is_told(content, told, tmp_path):
    with pytest.raises(DataError, match=rf"data\.csv{told}"):
        read_all(tmp_path, "data.csv", content)


def test_the_header_of_a_file_that_was_put_behind_another_is_told(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,completion\na,b\nprompt,completion\nc,d\n")
    records = read_records(str(tmp_path / "data.csv"), fmt=None, which="train")
    with pytest.raises(DataError, match="the header, prompt, completion, stands here again"):
        records[1]


@pytest.mark.parametrize(
    "record",
    [
        '{"text": "' + "a" * 3000 + '"}',  # which a window of 4,096 holds
        '{"text": "' + "a" * 30_000 + '"}',
        '{"text": [' + "12, " * 9000 + "1]}",
    ],
)
def test_a_record_of_a_list_that_is_too_long_is_told(record, tmp_path, monkeypatch):
    monkeypatch.setattr(json_documents, "MAX_RECORD_BYTES", 2**11)
    monkeypatch.setattr(json_documents, "_AT_ONCE", 64)
    with pytest.raises(DataError, match=r"data\.json:2: not JSON: a record of more than 0 MiB begins here, near '\{"):
        read_all(tmp_path, "data.json", f'[{{"text": "b"}},\n{record}]')


def test_a_csv_line_that_is_too_long_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 2**20)
    with pytest.raises(DataError, match=r"data\.csv:2: not CSV in UTF-8: a line of more than 1 MiB"):
        read_all(tmp_path, "data.csv", "text\n" + "a," * 2**20)


@pytest.mark.parametrize("now", [b"xxxxxxxxxxxxxxxxxx", b""])
def test_a_file_that_changes_while_it_is_read_is_told(now, tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"}]')
    records = read_records(str(path), fmt=None, which="train")
    path.write_bytes(now)
    with pytest.raises(DataError, match="the file has changed since it was opened"):
        records[0]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5])
def test_a_number_that_is_no_record_is_told_whole_wherever_a_piece_ends(at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(json_documents, "_AT_ONCE", at_once)
    (tmp_path / "data.json").write_text('[{"text": "a"}, 12345, 67]')
    records = read_records(str(tmp_path / "data.json"), fmt=None, which="train")
    assert len(records) == 3
    with pytest.raises(DataError, match="12345 instead of an object"):
        records[1]
