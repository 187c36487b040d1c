"""What a folder holds is known from headers alone, and all damage is told with file, tensor and remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_lora.base.index import hash_config, open_index, open_weights, read_header
from dist_lora.errors import WeightsError

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


def tiny_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {NAMES[0]: (9, 4), NAMES[1]: (4, 4), NAMES[2]: (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """One file a tensor, and the index as transformers writes it."""
    folder.mkdir(exist_ok=True)
    files = [f"model-{n + 1:05d}-of-{len(tensors):05d}.safetensors" for n in range(len(tensors))]
    for file, (name, tensor) in zip(files, tensors.items(), strict=True):
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict(zip(tensors, files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def write_raw(file: Path, header: Any, content: bytes = b"") -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return file


def message(folder: Path) -> str:
    with pytest.raises(WeightsError) as raised:
        open_index(folder)
    assert raised.value.exit_code == 4
    return str(raised.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_sharded(tmp_path / "model", tiny_tensors())
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_places_and_shapes_are_those_that_safetensors_reads(tmp_path, dtype, is_sharded):
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors().items()}
    if is_sharded:
        write_sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = open_index(tmp_path)
    assert set(index.tensors) == set(tensors)
    assert index.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, place in index.tensors.items():
        content = place.file.read_bytes()[place.start : place.start + place.num_bytes]
        loaded = load_file(place.file)[name]
        with safe_open(place.file, "pt") as opened:
            assert opened.get_slice(name).get_dtype() == place.dtype
        assert place.shape == tuple(loaded.shape)
        assert content == loaded.view(torch.uint8).numpy().tobytes()


def test_only_headers_of_a_20_gb_file_are_read(tmp_path, monkeypatch):
    entry = {"dtype": "BF16", "shape": [10_000, 1_000_000], "data_offsets": [0, 20_000_000_000]}
    file = write_raw(tmp_path / "model.safetensors", {NAMES[0]: entry})
    os.truncate(file, file.stat().st_size + 20_000_000_000)
    real_pread, counts = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: counts.append(len(got := real_pread(*a))) or got)
    index = open_index(tmp_path)
    assert index.num_bytes == 20_000_000_000
    assert len(index.content_hash()) == 32
    assert sum(counts) < 1_000


def test_single_file_counts_where_an_index_lies_beside_it(sharded):
    save_file({"only.weight": torch.ones(2)}, sharded / "model.safetensors")
    assert set(open_index(sharded).tensors) == {"only.weight"}


def test_a_path_that_is_no_folder(tmp_path):
    assert "nowhere is not a folder; a folder with config.json and *.safetensors" in message(tmp_path / "nowhere")


def test_all_missing_shards_are_named_and_counted(sharded):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    text = message(sharded)
    assert "lacks 2 of the 3 files that model.safetensors.index.json names" in text
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors. The download is incomplete" in text


def test_a_truncated_shard_is_named_with_both_lengths(sharded):
    file = sharded / "model-00001-of-00003.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 5)
    text = message(sharded)
    assert f"{file} is {whole - 5:,} bytes long and its header describes {whole:,}." in text
    assert "The download is incomplete; fetch that file again." in text


def test_all_damaged_shards_are_told_at_once(sharded):
    for number in (1, 3):
        os.truncate(sharded / f"model-0000{number}-of-00003.safetensors", 3)
    text = message(sharded)
    assert text.startswith("2 faults in")
    assert "model-00001-of-00003" in text and "model-00003-of-00003" in text


def test_more_than_five_faults_are_counted(tmp_path):
    files = write_sharded(tmp_path, {f"tensor.{n}": torch.ones(1) for n in range(8)})
    for file in files:
        os.truncate(file, 3)
    text = message(tmp_path)
    assert text.startswith("8 faults in") and text.endswith("and 3 more") and len(text.splitlines()) == 7


def test_a_file_cut_within_its_header(sharded):
    file = sharded / "model-00002-of-00003.safetensors"
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    os.truncate(file, 50)
    text = message(sharded)
    assert f"is 50 bytes long and its header alone would take {8 + header_bytes:,}. The download is incomplete" in text


def test_an_empty_file(sharded):
    os.truncate(sharded / "model-00002-of-00003.safetensors", 0)
    assert "is 0 bytes long and its header alone would take 8. The download is incomplete" in message(sharded)


def test_an_absurd_header_length_is_refused_before_anything_is_allocated(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "is 10 bytes long and its header alone would take 4,611,686,018,427,387,912" in message(tmp_path)
    file.write_bytes((10**10).to_bytes(8, "little"))
    os.truncate(file, 2 * 10**10)
    assert "is damaged: its header claims 10,000,000,000 bytes. Fetch it again." in message(tmp_path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"{not json", "is damaged: its header is not JSON"),
        (b"\xff\xfe", "is damaged: its header is not JSON"),
        (b"[" * 100_000, "is damaged: its header is not JSON"),
        (b"[1, 2]", "is damaged: a JSON object was expected"),
        (b'{"a": 1, "a": 2}', "named twice: a"),
        ({"w": 3}, "the entry of w in its header is invalid"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "the entry of w in its header is invalid"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "the entry of w in its header"),
        ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "the entry of w in its header"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "the entry of w in its header"),
        (
            {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
            "w, F32 (3,), takes 12 bytes and has 8",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "w begins at byte",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
            "bytes long and its header describes",
        ),
    ],
)
def test_a_damaged_header_names_file_and_tensor(tmp_path, header, expected):
    file = write_raw(tmp_path / "model.safetensors", header, bytes(8))
    text = message(tmp_path)
    assert str(file) in text and expected in text and "etch" in text


def test_overlapping_tensors_are_refused(tmp_path):
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    write_raw(tmp_path / "model.safetensors", entries, bytes(12))
    assert "b begins at byte" in message(tmp_path)


def test_a_quantized_model_is_refused_with_its_types(tmp_path):
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    text = message(tmp_path)
    assert "holds 1 tensor of a dtype other than BF16, F16 and F32: a (U8)" in text
    assert "quantized already: use the unquantized one" in text
    save_file({"a": torch.zeros(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert "a (F8_E4M3)" in message(tmp_path)
    with pytest.raises(WeightsError, match=r"a \(F8_E4M3\)"):
        open_index(tmp_path, allow_bytes=True)


def test_bytes_pass_where_they_are_asked_for(tmp_path):
    write_sharded(tmp_path, {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(2)})
    tensors = open_index(tmp_path, allow_bytes=True).tensors
    assert (tensors["a"].dtype, tensors["a"].num_bytes, tensors["b"].dtype) == ("U8", 3, "F32")
    assert "a (U8)" in message(tmp_path)


def test_a_tensor_missing_from_its_shard(sharded):
    save_file({"other": torch.ones(1)}, sharded / "model-00003-of-00003.safetensors")
    text = message(sharded)
    assert f"model-00003-of-00003.safetensors lacks {NAMES[2]}, which the index lists in this file." in text
    assert "model-00003-of-00003.safetensors holds other, which model.safetensors.index.json doesn't name" in text


def test_a_tensor_in_two_files(sharded):
    tensors = tiny_tensors()
    save_file(
        {NAMES[0]: tensors[NAMES[0]], NAMES[2]: tensors[NAMES[2]]},
        sharded / "model-00003-of-00003.safetensors",
    )
    text = message(sharded)
    assert f"{NAMES[0]} is in 2 files: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in text


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "config.json"])
def test_an_index_cannot_leave_its_folder(sharded, place):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": place}}))
    text = message(sharded)
    assert f"names files outside of its folder: {place}. Nothing is read from there." in text


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": [1]}', '{"weight_map": {"w": 3}}'])
def test_an_index_without_a_map(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "is damaged: it has no weight_map from tensor names to file names. Fetch it again." in message(sharded)


def test_an_index_that_is_not_json(sharded):
    (sharded / "model.safetensors.index.json").write_text("<html>404</html>")
    assert "model.safetensors.index.json is damaged: it is not JSON" in message(sharded)


def test_git_lfs_pointers_are_recognised(tmp_path, sharded):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n"
    (sharded / "model-00002-of-00003.safetensors").write_text(pointer)
    assert "is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder." in message(sharded)
    (sharded / "model.safetensors.index.json").write_text(pointer)
    assert "index.json is a git-lfs pointer" in message(sharded)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["consolidated.00.pth"], "Meta's own format"),
        (["original/consolidated.00.pth"], "Meta's own format"),
        (["pytorch_model.bin"], "pickled weights (*.bin), which are never read"),
        (["model-q4.gguf"], "a GGUF file, which is quantized"),
        (
            ["config.json"],
            "holds neither model.safetensors nor model.safetensors.index.json. Fetch the model's",
        ),
        (["model-00001-of-00002.safetensors"], "so they may be incomplete. Fetch the index too."),
    ],
)
def test_a_folder_without_safetensors_says_what_to_do(tmp_path, files, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    text = message(tmp_path)
    assert expected in text
    assert files[0].split("/")[-1] in text or files == ["config.json"]


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "can't be read: Is a directory" in message(tmp_path)
    with pytest.raises(WeightsError, match="can't be read: No such file"), open_weights(tmp_path / "gone"):
        pass
    with pytest.raises(WeightsError, match="can't be read: No such file"):
        read_header(tmp_path / "gone")


def test_expect_names_what_is_missing_left_over_and_of_another_shape(sharded):
    index = open_index(sharded)
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_tensors().items()}
    index.expect(shapes)
    wrong = {NAMES[0]: (9, 4), NAMES[1]: (8, 4), **{f"model.layers.{n}.w": (1,) for n in range(7)}}
    with pytest.raises(WeightsError) as raised:
        index.expect(wrong)
    text = str(raised.value)
    assert "7 tensors missing: model.layers.0.w, model.layers.1.w, model.layers.2.w" in text and "and 2 more" in text
    assert f"1 tensor of another shape: {NAMES[1]} (found (4, 4), expected (8, 4))" in text
    assert f"1 tensor unexpected: {NAMES[2]}" in text
    assert "Fetch config.json and the weights again from the same model." in text


def test_a_repeated_head_and_old_rotary_buffers_are_allowed(tmp_path):
    tensors = tiny_tensors()
    extra = {
        "lm_head.weight": torch.ones(9, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    open_index(tmp_path).expect({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def test_an_untied_model_without_its_head_is_refused(sharded):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_tensors().items()}
    with pytest.raises(WeightsError, match=r"1 tensor missing: lm_head\.weight"):
        open_index(sharded).expect({**shapes, "lm_head.weight": (9, 4)})


def test_content_hash_knows_the_weights_and_not_how_they_lie(tmp_path):
    tensors = tiny_tensors()
    write_sharded(tmp_path / "sharded", tensors)
    for name, content in (
        ("single", tensors),
        ("tuned", {**tensors, NAMES[1]: tensors[NAMES[1]] + 1e-3}),
        ("halved", {name: tensor.bfloat16() for name, tensor in tensors.items()}),
        ("reshaped", {**tensors, NAMES[0]: tensors[NAMES[0]].view(4, 9)}),
    ):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    folders = ("sharded", "single", "tuned", "halved", "reshaped")
    hashes = {name: open_index(tmp_path / name).content_hash() for name in folders}
    assert hashes["sharded"] == hashes["single"]
    assert len(set(hashes.values())) == 4


def test_content_hash_notices_a_file_that_became_shorter(sharded):
    index = open_index(sharded)
    os.truncate(sharded / "model-00002-of-00003.safetensors", 20)
    with pytest.raises(WeightsError, match=rf"ends within {NAMES[1]}: it was truncated"):
        index.content_hash()


def test_a_read_error_of_the_disk_names_the_file(sharded, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert "model-00001-of-00003.safetensors can't be read: Input/output error." in message(sharded)


def test_config_hash_ignores_where_a_copy_lies_and_nothing_else(tmp_path):
    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return hash_config(tmp_path)

    first = write({"hidden_size": 4, "rope_theta": 1.0, "_name_or_path": "/here", "transformers_version": "4"})
    assert write({"rope_theta": 1.0, "hidden_size": 4, "transformers_version": "5"}) == first
    assert write({"rope_theta": 2.0, "hidden_size": 4}) != first
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json can't be read: No such file"):
        hash_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="a JSON object was expected"):
        hash_config(tmp_path)
