"""Where records begin, however the file is cut into the pieces that are read: as Python's own readers of whole files say."""

from __future__ import annotations

import csv
import io
import json
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from dist_lora.data import json_documents, places
from dist_lora.data.places import lines_of
from dist_lora.data.text_files import CsvRows, open_json

# Letters of one to four bytes, and what ends a line here or there.
texts = st.text(st.sampled_from('ab1"\\,é€😀 \n\r\u2028'), max_size=8)
lines = st.lists(st.sampled_from([b"", b"", b" ", b"\r", b"\t \r", b"{}", b"\xc3\xa9\r", b"0123456789", b"        "]))


@given(lines, st.booleans(), st.booleans(), st.integers(1, 12))
def test_lines_are_those_of_a_plain_split(tmp_path_factory, drawn, has_mark, is_ended, at_once):
    content = b"\n".join(drawn) + b"\n" * is_ended
    path = tmp_path_factory.mktemp("lines") / "data"
    path.write_bytes(b"\xef\xbb\xbf" * has_mark + content)
    with path.open("rb") as file, patch.object(places, "_SCAN_BYTES", at_once):
        found = lines_of(file)
        read = [(found.line(i), found.read(file, i).partition(b"\n")[0]) for i in range(len(found))]
    # A line of eight spaces is a record, and no JSON: so short lines alone are looked into.
    expected = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip() or len(line) >= 8]
    assert read == expected


@given(
    st.lists(st.dictionaries(texts, st.one_of(texts, st.integers(), st.lists(texts, max_size=2)), max_size=2)),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 9),
)
def test_a_json_list_and_objects_are_the_values_that_were_written(tmp_path_factory, drawn, indent, is_list, at_once):
    path = tmp_path_factory.mktemp("json") / "data.json"
    written = [json.dumps(record, ensure_ascii=False, indent=indent) for record in drawn]
    text = "\n [" + " ,\n\n".join(written) + "\n]\n" if is_list else "{\n}" + "\n".join(written)
    path.write_text(text, encoding="utf-8", newline="")
    with patch.object(json_documents, "_AT_ONCE", at_once):
        records = open_json(path)
    read = [records[i] for i in range(len(records))]
    assert read == drawn if is_list else read == [{}, *drawn]
    for index, (record, begin) in enumerate(zip(read, _begins(text, is_list=is_list), strict=True)):
        assert records.where(index) == f"{path}:{text.count(chr(10), 0, begin) + 1}", record


def _begins(text: str, *, is_list: bool) -> list[int]:
    """The places of the objects in a text, by Python's own decoder over all of it."""
    found, at = [], text.index("[") + 1 if is_list else 0
    while (at := text.find("{", at)) >= 0:
        found.append(at)
        _, at = json.JSONDecoder().raw_decode(text, at)
    return found


@given(st.lists(st.lists(texts, min_size=2, max_size=2)), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_rows_are_those_of_pythons_reader(tmp_path_factory, drawn, newline, has_mark):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=newline, quoting=csv.QUOTE_ALL)  # Python 3.11 leaves "\r" unquoted
    writer.writerow(["one", "two"])
    for row in drawn:
        out.write(newline if row[0] == "a" else "")
        writer.writerow(row)
    path = tmp_path_factory.mktemp("csv") / "data.csv"
    path.write_text(out.getvalue(), encoding="utf-8-sig" if has_mark else "utf-8", newline="")
    rows = CsvRows(path)
    assert [list(rows[i].values()) for i in range(len(rows))] == drawn
    reader = csv.reader(io.StringIO(out.getvalue(), newline=""))
    begins, last = [], 0
    for row in reader:
        begins += [last + 1] if row else []
        last = reader.line_num
    assert [int(rows.where(i).rpartition(":")[2]) for i in range(len(rows))] == begins[1:]
