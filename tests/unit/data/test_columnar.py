"""Columnar data give the records that were written, whatever their columns pad; and what is cut is refused."""

from __future__ import annotations

import csv
import gzip
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lora.data.chat import encode_sample, load_tokenizer
from dist_lora.data.sources import hash_sources, read_records
from dist_lora.data.token_cache import TokenRules, prepare_tokens
from dist_lora.errors import DataError
from dist_lora.world.world import World
from tests.conftest import save_byte_tokenizer

TEMPLATE = """{{ bos_token }}{{ (tools or []) | tojson }}{% for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>' }}
{%- if 'tool_calls' in message %}{{ (message.tool_calls | map(attribute='function') | list) | tojson }}{% endif %}
{{- message.content or '' }}{{ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"""


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def calling(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def chat_of(call, answer, tools):
    messages = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": tools}


WEATHER = tool(
    "weather", city={"type": "string", "enum": ["Bern", None]}, days={"type": "array", "items": {"type": "integer"}}
)
ADD = tool("add", x={"type": "number"}, at={"type": "object"})
# A struct has one order of keys for all rows: that of the first row, here, which has them all.
ALL = {"city": "Bern", "x": 1, "sure": True, "days": [1], "at": {"lat": 1, "name": "here"}}
FIRST = chat_of(calling("weather", **ALL), "sunny", [WEATHER, ADD])
ROWS = [
    chat_of(calling("weather", city="Bern", days=[1, 2]), "sunny", [WEATHER]),
    chat_of(calling("add", x=2, at={"lat": 1, "name": "here"}, sure=True), "5", [ADD]),
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "tools": [WEATHER, ADD],
    },
]


def in_order(given):
    """The keys as the first row has them, at both depths."""
    ordered = {key: given[key] for key in ALL if key in given}
    if "at" in ordered:
        ordered["at"] = {key: ordered["at"][key] for key in ALL["at"] if key in ordered["at"]}
    return ordered


texts = st.text(st.characters(codec="ascii", min_codepoint=32), max_size=8)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": texts,
        "x": st.integers(-9, 9),
        "sure": st.booleans(),
        "days": st.lists(st.integers(0, 9), max_size=2),
        "at": st.fixed_dictionaries({}, optional={"lat": st.integers(0, 9), "name": texts}),
    },
)
rows = st.builds(
    lambda name, given, answer, tools: chat_of(calling(name, **in_order(given)), answer, tools),
    st.sampled_from(["weather", "add"]),
    arguments,
    texts.map(lambda text: text + "."),
    st.lists(st.sampled_from([WEATHER, ADD]), unique_by=str, max_size=2),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    (folder / "tools.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder, chat_template=str(folder / "tools.jinja"))


def as_json_texts(row):
    return {name: json.dumps(value) for name, value in row.items()}


def write_all(rows, folder):
    """The same rows in every form; returns the names of what was written."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    (folder / "objects.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(as_json_texts(row) for row in rows)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    listed = [{name: [json.dumps(item) for item in value] for name, value in row.items()} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), folder / "texts.parquet")
    for name, make in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with make(folder / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    padded = datasets.Dataset.from_list(rows)
    in_json = datasets.Dataset.from_list(
        rows, features=datasets.Features(messages=datasets.List(datasets.Json()), tools=datasets.Json())
    )
    padded.to_parquet(folder / "padded.parquet")
    in_json.to_parquet(folder / "in_json.parquet")
    padded.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=in_json, test=padded).save_to_disk(folder / "splits")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [str(folder / name) for name in (*files, "saved", "splits", "splits@test")]


def encode_all(name, tokenizer):
    records = read_records(name, fmt=None, which="train")
    return [
        encode_sample(records[i], tokenizer=tokenizer, fmt="messages", train_on="assistant")
        for i in range(len(records))
    ]


@settings(max_examples=15, deadline=None)
@given(drawn=st.lists(rows, max_size=4))
def test_the_same_rows_give_the_same_ids_and_targets_in_every_form(drawn, tokenizer, tmp_path_factory):
    datasets.disable_progress_bars()
    names = write_all([FIRST, *drawn], tmp_path_factory.mktemp("rows"))
    assert len(names) == 14
    expected = encode_all(next(name for name in names if name.endswith(".jsonl")), tokenizer)
    for name in names:
        assert encode_all(name, tokenizer) == expected, name


def test_nulls_in_lists_maps_and_json_columns_are_values_and_stay(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table(
        {
            "text": ["a"],
            "list": [[{"x": 1}, None]],
            "map": pyarrow.array([[("x", 1), ("y", None)]], kind),
            "json": pyarrow.array(['{"x": null}'], pyarrow.json_()),
            "struct": [{"x": None, "y": {"z": None}}],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_records(str(tmp_path / "a.parquet"), fmt=None, which="train")[0] == {
        "text": "a",
        "list": [{"x": 1}, None],
        "map": {"x": 1, "y": None},
        "json": {"x": None},
        "struct": {"y": {}},
    }


def test_a_map_that_has_a_key_twice_is_told_and_nulls_in_its_schemas_are_counted(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.struct([("type", pyarrow.string()), ("default", pyarrow.string())]))
    rows = [
        [("x", {"type": "string"}), ("y", {"type": "string", "default": "z"})],
        None,
        [("x", {"type": "string"})] * 2,
    ]
    table = pyarrow.table({"text": ["a", "b", "c"], "tools": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = read_records(str(tmp_path / "a.parquet"), fmt=None, which="train")
    assert records[0]["tools"] == {"x": {"type": "string"}, "y": {"type": "string", "default": "z"}}
    assert records.padding()[0].startswith(f"{tmp_path / 'a.parquet'}: 3 nulls inside arguments and tools")
    with pytest.raises(DataError, match="a map has the key 'x' twice"):
        records[2]


@pytest.mark.parametrize("is_saved", [False, True])
def test_nulls_inside_arguments_and_schemas_are_counted_once_also_from_the_cache(is_saved, tmp_path, caplog, tokenizer):
    place = tmp_path / ("saved" if is_saved else "a.parquet")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(place) if is_saved else table.to_parquet(place)
    told = []
    for _ in range(2):
        with caplog.at_level(logging.INFO, "dist_lora"):
            prepare_tokens(
                str(place),
                which="train",
                rules=TokenRules(sequence_length=4096),
                tokenizer=tokenizer,
                tokenizer_hash="t",
                cache_dir=tmp_path / "cache",
                world=World.alone(torch.device("cpu")),
            )
        told.append([record.message for record in caplog.records if "padding" in record.message])
        is_from_cache = any("from the cache" in record.message for record in caplog.records)
        caplog.clear()
    assert is_from_cache
    # Five arguments are known: the first call has two, the second three. Four properties: each tool has two.
    in_calls, in_tools = 3 + 2, 4 * 2
    assert [len(lines) for lines in told] == [1, 1] and told[0] == told[1]
    assert told[0][0].startswith(f"data.train: {place}: {in_calls + in_tools} nulls inside arguments and tools")


def test_a_row_group_without_rows_and_a_folder_named_like_a_column_change_nothing(tmp_path):
    folder = tmp_path / "lang=de"
    folder.mkdir()
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.parquet.ParquetWriter(folder / "a.parquet", table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    records = read_records(str(folder / "a.parquet"), fmt=None, which="train")
    assert [records[index] for index in range(len(records))] == [{"text": text} for text in "abab"]


def test_a_column_that_stands_twice_is_told(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has 'text' more than once"):
        read_records(str(tmp_path / "a.parquet"), fmt=None, which="train")


def test_a_json_column_that_holds_something_else_is_told_with_its_row(tmp_path):
    table = pyarrow.table({"messages": pyarrow.array(['[{"role"'], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = read_records(str(tmp_path / "a.parquet"), fmt=None, which="train")
    with pytest.raises(DataError, match="a value of a JSON column is not JSON: Expecting"):
        records[0]


def write_stream(path):
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data[:-8], "has no end mark: it is cut, or still being written"),
        (lambda data: data[:-20], "not a complete Arrow file: "),
        (lambda data: data + b"more", "4 bytes follow the end of the Arrow stream"),
        (lambda data: b"ARROW1\0\0" + data, "not a complete Arrow file: "),
    ],
)
def test_an_arrow_file_that_is_not_whole_is_told(change, told, tmp_path):
    path = tmp_path / "a.arrow"
    write_stream(path)
    assert len(read_records(str(path), fmt=None, which="train")) == 2
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"a\\.arrow: .*{told}"):
        read_records(str(path), fmt=None, which="train")


def test_a_saved_folder_that_is_not_whole_is_told(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: the Arrow stream has no end mark"):
        read_records(str(tmp_path / "saved"), fmt=None, which="train")
    shard.unlink()
    with pytest.raises(DataError, match=r"saved: the saved data set can't be read: FileNotFoundError: "):
        read_records(str(tmp_path / "saved"), fmt=None, which="train")


def test_a_saved_folder_of_splits_is_read_as_one_of_the_hub_is(tmp_path):
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in "ab")
    folder = tmp_path / "splits"
    datasets.DatasetDict(train=one, test=two).save_to_disk(folder)
    assert read_records(str(folder), fmt=None, which="train")[0] == {"text": "a"}
    assert read_records(f"{folder}@test", fmt=None, which="eval").where(0) == f"{folder}@test: row 1"
    with pytest.raises(DataError, match=r"has no split 'validation'; it has train, test\. Name one: .*splits@SPLIT"):
        read_records(str(folder), fmt=None, which="eval")
    with pytest.raises(DataError, match=r"is one data set without splits; name it without @test"):
        read_records(f"{folder / 'train'}@test", fmt=None, which="train")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "gone"]}')
    with pytest.raises(DataError, match=r"gone, a split that .* lists, doesn't exist"):
        read_records(f"{folder}@gone", fmt=None, which="train")
    for listing, told in (("{", "not the list of splits"), ('{"splits": "train"}', "is expected")):
        (folder / "dataset_dict.json").write_text(listing)
        with pytest.raises(DataError, match=rf"dataset_dict\.json: .*{told}"):
            read_records(str(folder), fmt=None, which="train")


def test_the_hash_of_a_saved_folder_is_of_its_rows_and_types(tmp_path):
    row = {"text": '{"a": 1}'}
    as_json = datasets.Features(text=datasets.Json())
    for name, dataset in {
        "one": datasets.Dataset.from_list([row]),
        "same": datasets.Dataset.from_list([row] * 2).select([1]),
        "other": datasets.Dataset.from_list([{"text": "b"}]),
        "json": datasets.Dataset.from_list([row], features=as_json),
    }.items():
        dataset.save_to_disk(tmp_path / name)
    one, same, other, in_json = (
        hash_sources(str(tmp_path / name), which="train") for name in ("one", "same", "other", "json")
    )
    assert one == same and len({one, other, in_json}) == 3
