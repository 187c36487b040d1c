"""The manifest: what is written is read back, and what can't be right is refused by name."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lora.checkpoint import manifest as manifest_module
from dist_lora.checkpoint.manifest import (
    KINDS,
    FileEntry,
    Manifest,
    Piece,
    entry_from_bytes,
    entry_to_bytes,
    read_manifest,
    write_manifest,
)
from dist_lora.checkpoint.read import load_pieces, verify
from dist_lora.errors import CheckpointError
from tests.unit.checkpoint.thread_ranks import SPECS, saved, whole_state

NAME = SPECS[0].name
RANK_0, RANK_1 = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoints"), step=200)


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "manifest.json").read_text())
    found.pop("checksum")
    return found


def sign(content: Any) -> bytes:
    """What a manifest of this content is on the disk: with the checksum that fits it."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"}).encode()


def put(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    return folder


def refused(folder: Path, data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(put(folder, data))
    assert str(folder / "manifest.json") in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_manifest_is_read_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (manifest.step, manifest.world_size, manifest.tensors) == (200, 2, SPECS)
    assert manifest.progress == {"best_step": None, "best_loss": 1.5}
    assert manifest.config == "run: test\ntrain: {steps: 200}\n"
    assert manifest.adapter["targets"] == ["q_proj"] and manifest.base["name"] == "tiny"
    assert {"dist_lora", "torch", "transformers", "safetensors", "python"} == set(manifest.versions)
    assert [file.name for file in manifest.files] == [RANK_0, RANK_1]


def test_an_entry_comes_back_as_it_was_sent(folder: Path) -> None:
    for entry in read_manifest(folder).files:
        assert entry_from_bytes(entry_to_bytes(entry)) == entry


def test_a_signed_copy_is_accepted(content: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert read_manifest(put(tmp_path, sign(content))) == read_manifest(folder)


FAULTS = {
    "a name that leaves the folder": (
        lambda c: c["files"][0].update(name="../x"),
        f"files[0].name: '../x' is not the name of rank 0's file, {RANK_0}",
    ),
    "an absolute name": (lambda c: c["files"][1].update(name="/etc/passwd"), "files[1].name: '/etc/passwd'"),
    "a name with a folder": (lambda c: c["files"][1].update(name=f"sub/{RANK_1}"), f"'sub/{RANK_1}'"),
    "two files of one name": (lambda c: c["files"][1].update(name=RANK_0), "not the name of rank 1's file"),
    "a very long name": (lambda c: c["files"][1].update(name="x" * 5000), "xxxx... is not the name"),
    "a world of another size": (
        lambda c: c.update(world_size=3),
        "world_size is 3, files are 2: expected one per rank",
    ),
    "no files": (lambda c: c.update(files=[], world_size=1), "world_size is 1, files are 0"),
    "a file too small for its pieces": (
        lambda c: c["files"][0].update(num_bytes=10),
        f"'{RANK_0}': 10 bytes can't hold its pieces of",
    ),
    "a tensor that is in no file": (
        lambda c: c["tensors"].append({"name": "model.extra", "shape": [2, 2]}),
        "adapter of model.extra is missing: no file holds any of its 4 elements; exp_avg of model.extra",
    ),
    "a piece of no tensor": (
        lambda c: c["files"][0]["pieces"].append("adapter/model.other/0-3"),
        "adapter/model.other/0-3: there is no tensor of this name",
    ),
    "a piece beyond its tensor": (
        lambda c: c["files"][0]["pieces"].append(f"adapter/{NAME}/0-22"),
        f"adapter/{NAME}/0-22: not a range of its 21 elements",
    ),
    "an empty piece": (
        lambda c: c["files"][0]["pieces"].append(f"adapter/{NAME}/5-5"),
        "5-5: not a range of its 21",
    ),
    "a piece twice": (
        lambda c: c["files"][1]["pieces"].append(f"adapter/{NAME}/0-21"),
        f"adapter of {NAME}: elements 0-21 are stored twice, in '{RANK_0}' and '{RANK_1}'",
    ),
    "a moment that is gone": (
        lambda c: c["files"][0]["pieces"].remove(f"exp_avg_sq/{NAME}/0-21"),
        f"exp_avg_sq of {NAME} is missing: no file holds any of its 21 elements",
    ),
    "a gap at the start": (
        lambda c: c["files"][0]["pieces"].__setitem__(0, f"adapter/{NAME}/2-21"),
        f"adapter of {NAME}: elements 0-2 are in no file",
    ),
    "a gap at the end": (
        lambda c: c["files"][0]["pieces"].__setitem__(0, f"adapter/{NAME}/0-20"),
        f"adapter of {NAME}: elements 20-21 are in no file",
    ),
    "a tensor named twice": (
        lambda c: c["tensors"].append(c["tensors"][0]),
        "tensors: 1 names are listed twice",
    ),
    "another shape": (lambda c: c["tensors"][0].update(shape=[3, 8]), "elements 21-24 are in no file"),
    "a huge shape": (
        lambda c: c["tensors"][0].update(shape=[2**40, 2**40]),
        f"elements 21-{2**80} are in no file",
    ),
    "a shape of zero": (
        lambda c: c["tensors"][0].update(shape=[0, 7]),
        "tensors.0.shape.0: Input should be greater",
    ),
    "a name with a slash": (
        lambda c: c["tensors"][0].update(name="a/../b"),
        "tensors.0.name: String should match",
    ),
    "a key of another kind": (
        lambda c: c["files"][0]["pieces"].append(f"momentum/{NAME}/0-1"),
        "Value error, expected KIND/TENSOR/START-STOP (found 'momentum/",
    ),
    "a key that is a number": (
        lambda c: c["files"][0]["pieces"].append(7),
        "expected KIND/TENSOR/START-STOP (found 7)",
    ),
    "a step that is text": (
        lambda c: c.update(step="200"),
        "step: Input should be a valid integer (found '200')",
    ),
    "a step that is true": (
        lambda c: c.update(step=True),
        "step: Input should be a valid integer (found True)",
    ),
    "a negative step": (
        lambda c: c.update(step=-1),
        "step: Input should be greater than or equal to 0 (found -1)",
    ),
    "a checksum of another kind": (
        lambda c: c["files"][0].update(checksum="md5:0"),
        "files.0.checksum: String should",
    ),
    "a field that is gone": (lambda c: c.pop("config"), "config: Field required"),
    "a field that nobody knows": (
        lambda c: c.update(hook="x"),
        "hook: Unexpected keyword argument (found 'x')",
    ),
    "progress that is a list": (lambda c: c.update(progress=[]), "progress: Input should be"),
    "versions that are numbers": (
        lambda c: c.update(versions={"torch": 2}),
        "versions.torch: Input should be a valid",
    ),
    "a newer format": (
        lambda c: c.update(format_version=2),
        "format_version is 2 and this program reads 1: use the",
    ),
    "a format that is true": (lambda c: c.update(format_version=True), "format_version is True"),
    "no format": (lambda c: c.pop("format_version"), "format_version is None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_contradicts_itself_is_refused_by_name(content: dict[str, Any], tmp_path: Path, fault: str) -> None:
    edit, told = FAULTS[fault]
    edited = copy.deepcopy(content)
    edit(edited)
    assert told in refused(tmp_path, sign(edited))


def test_all_faults_are_told_at_once_up_to_five(content: dict[str, Any], tmp_path: Path) -> None:
    edited = copy.deepcopy(content)
    for i in range(3):
        edited["tensors"].append({"name": f"extra{i}", "shape": [1]})
    told = refused(tmp_path, sign(edited))
    assert told.count("is missing: no file holds") == 5 and told.endswith("; and 4 more")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON number"),
        (b'{"a": 1e999}', "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
        (b"{}", "format_version is None"),
    ],
)
def test_what_is_no_manifest_at_all_is_refused(tmp_path: Path, data: bytes, told: str) -> None:
    assert told in refused(tmp_path, data)


def test_a_change_by_hand_is_found(content: dict[str, Any], tmp_path: Path) -> None:
    data = sign(content).replace(b'best_loss": 1.5', b'best_loss": 1.4')
    assert "doesn't match its own checksum: it was damaged, or changed by hand" in refused(tmp_path, data)


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing: .* is not a complete checkpoint"):
        read_manifest(tmp_path)


def test_a_manifest_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read: Is a directory"):
        read_manifest(tmp_path)


def test_a_manifest_that_would_not_be_read_is_not_written(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    first = manifest.files[0]
    lacking = FileEntry(first.name, first.num_bytes, first.checksum, first.pieces[1:])
    with pytest.raises(CheckpointError, match=f"adapter of {NAME} is missing"):
        write_manifest(tmp_path, Manifest(**{**vars(manifest), "files": (lacking, manifest.files[1])}))
    with pytest.raises(ValueError, match="Out of range float values"):
        write_manifest(tmp_path, Manifest(**{**vars(manifest), "progress": {"loss": float("nan")}}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_manifest(tmp_path, Manifest(**{**vars(manifest), "base": {"folder": Path("x")}}))
    assert os.listdir(tmp_path) == []


def test_progress_with_numbers_as_keys_is_read_back_with_their_text(folder: Path, tmp_path: Path) -> None:
    progress = {"rng": {10: [1, 2], 9: (3,)}}
    write_manifest(tmp_path, Manifest(**{**vars(read_manifest(folder)), "progress": progress}))
    assert read_manifest(tmp_path).progress == {"rng": {"10": [1, 2], "9": [3]}}


def test_an_existing_manifest_is_not_written_over(folder: Path) -> None:
    with pytest.raises(FileExistsError) as caught:
        write_manifest(folder, read_manifest(folder))
    assert caught.value.errno == errno.EEXIST


# Fuzzing

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/x", RANK_0, RANK_1, f"adapter/{NAME}/0-21", f"adapter/{NAME}/0-5", "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested JSON."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def clean_or_ours(folder: Path) -> None:
    """Reading gives a manifest in which all is where it belongs, or our error."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        str(error).encode()  # can be shown on a terminal
        return
    assert [file.name for file in manifest.files] == [
        f"rank-{i:05d}-of-{manifest.world_size:05d}.safetensors" for i in range(manifest.world_size)
    ]
    for spec in manifest.tensors:
        for kind in KINDS:
            held = [p for file in manifest.files for p in file.pieces if (p.name, p.kind) == (spec.name, kind)]
            elements = sorted(i for piece in held for i in range(piece.start, piece.stop))
            assert elements == list(range(spec.num_elements))
    try:
        verify(folder)
        load_pieces(folder, manifest, [Piece(s.name, k, 0, s.num_elements) for s in manifest.tensors for k in KINDS])
    except CheckpointError:
        return
    assert manifest.files and len(manifest.tensors) == len(SPECS)


@pytest.fixture(scope="module")
def fuzzed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fuzzed")
    for file in folder.glob("rank-*"):
        os.link(file, target / file.name)
    return target


@FUZZ
@given(data=st.data())
def test_a_signed_manifest_with_anything_changed_loads_cleanly_or_is_our_error(fuzzed, content, data) -> None:
    edited = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(edited)))
        what = data.draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if what == "remove":
            del container[key]
        elif what == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = data.draw(JSON)
        if not places(edited):
            break
    clean_or_ours(put(fuzzed, sign(edited)))


@FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_manifest_are_our_error(fuzzed: Path, data: bytes) -> None:
    refused(fuzzed, data)


@FUZZ
@given(at=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_bit_turned_in_a_manifest_is_found(fuzzed: Path, content: dict[str, Any], at: float, bit: int) -> None:
    data = bytearray(sign(content))
    data[min(int(at * len(data)), len(data) - 1)] ^= 1 << bit
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if found == json.loads(sign(content)):
        return  # another spelling of the same: the other white space, an e for an E
    refused(fuzzed, bytes(data))


def test_the_kinds_are_the_adapter_and_the_moments_of_adamw() -> None:
    assert KINDS == ("adapter", "exp_avg", "exp_avg_sq") == tuple(dict.fromkeys(p.kind for p in whole_state(0)))
    assert manifest_module.ITEM_BYTES == 4
