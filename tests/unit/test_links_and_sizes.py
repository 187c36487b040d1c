"""Names cannot leave their folder, and what a file claims of its size is not believed: no memory is taken for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_lora.base.index import open_index
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.manifest import read_manifest
from dist_lora.checkpoint.read import verify
from dist_lora.errors import AdapterError, CheckpointError, WeightsError
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity
from tests import ROOT
from tests.fuzz.targets import signed
from tests.unit.checkpoint.thread_ranks import saved

RANK_0 = "rank-00000-of-00002.safetensors"


def lead_out(file: Path) -> Path:
    """Move a file out of its folder and leave a link to where it went."""
    elsewhere = file.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    target = elsewhere / file.name
    file.rename(target)
    file.symlink_to(target)
    return target


def write_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    places = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.ones(2)}, folder / name)
        places[f"w{number}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_plain_adapter(folder: Path) -> Path:
    tensors = {f"model.layers.0.mlp.up_proj.lora_{half}": torch.ones(2, 2) for half in "AB"}
    base = BaseIdentity("org/tiny", None, "0" * 32, "1" * 32)
    write_adapter(folder, tensors=tensors, rank=2, alpha=4, dropout=0.0, targets=["up_proj"], base=base)
    return folder


# Names


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "model.safetensors"])
def test_a_models_file_that_is_a_link_out_of_its_folder_is_not_read(tmp_path: Path, file: str) -> None:
    folder = write_sharded(tmp_path / "base")
    if file == "model.safetensors":
        (folder / "model-00001-of-00002.safetensors").rename(folder / file)
    target = lead_out(folder / file)
    with pytest.raises(WeightsError) as caught:
        open_index(folder)
    assert f"{folder} has links that point outside of it: {file} (to {target}). Nothing is read from there" in str(
        caught.value
    )


def test_a_folder_in_a_models_folder_that_is_a_link_out_of_it_is_not_read(tmp_path: Path) -> None:
    folder, other = write_sharded(tmp_path / "base"), write_sharded(tmp_path / "other")
    (folder / "sub").symlink_to(other)
    index = {"weight_map": {"w1": "sub/model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        WeightsError, match=r"has links that point outside of it: sub/model-00001-of-00002\.safetensors"
    ):
        open_index(folder)


def test_links_within_a_models_folder_and_a_link_to_the_folder_are_read(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "base")
    (folder / "data").mkdir()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "data" / "one")
    (folder / "model-00001-of-00002.safetensors").symlink_to(Path("data", "one"))
    (tmp_path / "link").symlink_to(folder)
    assert set(open_index(folder).tensors) == set(open_index(tmp_path / "link").tensors) == {"w1", "w2"}


def test_the_links_of_the_hubs_cache_are_read_and_no_further_ones(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    folder = write_sharded(repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(Path("..", "..", "blobs", str(number)))
    assert set(open_index(folder).tensors) == {"w1", "w2"}
    (repository / "blobs" / "1").rename(tmp_path / "secret")
    (repository / "blobs" / "1").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=r"has links that point outside of it: model-00002-of-00002\.safetensors"):
        open_index(folder)


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "//x.safetensors"])
def test_an_index_that_names_another_place_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_sharded(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w1": name}}))
    with pytest.raises(WeightsError, match=r"names files outside of its folder: .*Nothing is read from there"):
        open_index(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "dist_lora.json"])
def test_an_adapters_file_that_is_a_link_out_of_its_folder_is_not_read(tmp_path: Path, file: str) -> None:
    folder = write_plain_adapter(tmp_path / "adapter")
    target = lead_out(folder / file)
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder)
    assert f"{folder} has links that point outside of it: {file} (to {target})" in str(caught.value)


@pytest.mark.parametrize("file", ["manifest.json", RANK_0])
def test_a_checkpoints_file_that_is_a_link_out_of_its_folder_is_not_read(tmp_path: Path, file: str) -> None:
    folder = saved(tmp_path / "checkpoints", step=10)
    lead_out(folder / file)
    with pytest.raises(CheckpointError, match=rf"{file} is a link that leads out of (its|the) folder"):
        verify(folder)
    with pytest.raises(CheckpointError, match=rf"{file} is a link that leads out of (its|the) folder"):
        gather_adapter(folder, out=tmp_path / "adapter", verify=False)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "x\0", RANK_0 + "\n", "sub/" + RANK_0])
def test_a_manifest_that_names_another_place_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "checkpoints", step=10)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][0]["name"] = name
    (folder / "manifest.json").write_bytes(signed(json.dumps(content).encode()))
    with pytest.raises(CheckpointError, match=r"files\[0\]\.name: .* is not the name of rank 0's file"):
        read_manifest(folder)


# Sizes

BOUNDED = """
import json, resource, sys
from pathlib import Path
import torch
from dist_lora.base.index import open_index
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.errors import DistLoraError
from dist_lora.herd.shape import read_shape
from dist_lora.lora.adapter_reader import read_adapter
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
CALLS = {"base": lambda: open_index(place).content_hash(), "adapter": lambda: read_adapter(place),
        "checkpoint": lambda: gather_adapter(place, out=place.parent / "out"),
        "config": lambda: read_shape(place).tensor_shapes()}
for argument in sys.argv[1:]:
    kind, _, name = argument.partition("=")
    place = Path(name)
    try:
        CALLS[kind]()
    except DistLoraError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps([error.exit_code, str(error), grown]))
"""


def of_header(entries: dict[str, object], data: bytes = bytes(512)) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "ten to the 15 elements": (of_header({"w": tensor([10**15], 0, 4 * 10**15)}), "and its header describes 4,000,000,000,000,0"),
    "ten to the 15 elements in 512 bytes": (of_header({"w": tensor([10**15], 0, 512)}), "takes 4,000,000,000,000,000 bytes and has 512"),
    "a header of 2 to the 63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "its header alone would take 9,223,372,036,854,775,816"),
    "a header of 2 to the 64 bytes": (b"\xff" * 8 + b"{}", "its header alone would take"),
    "tensors in each other": (of_header({"a": tensor([64], 0, 256), "b": tensor([64], 128, 384)}), "b begins at byte"),
    "a tensor behind the end": (of_header({"a": tensor([128], 0, 512), "b": tensor([1], 10**9, 10**9 + 4)}), "b begins at byte"),
    "a tensor that ends before it begins": (of_header({"a": tensor([1], 512, 508)}), "the entry of a in its header is invalid"),
    "a name twice": (b'\x4b\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32"}}  ' + bytes(4), "named twice: a"),
    "a deep header": (of_header({})[:0] + (200_000).to_bytes(8, "little") + b"[" * 200_000, "its header is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_claims_what_is_not_there_is_damage(tmp_path: Path, case: str) -> None:
    content, told = HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        open_index(tmp_path)
    assert told in str(caught.value) and caught.value.exit_code == 4
    folder = write_plain_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError) as caught_too:
        open_adapter(folder)
    assert told in str(caught_too.value) and caught_too.value.exit_code == 4


def claim_elements(place: Path) -> None:
    (place / "model.safetensors").write_bytes(HEADERS["ten to the 15 elements"][0])


def claim_layers(place: Path) -> None:
    claim_elements(place)
    sizes = {name: 64 for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    (place / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, "num_hidden_layers": 10**15}))


def claim_a_far_layer(place: Path) -> None:
    write_plain_adapter(place)
    shapes = {"A": [2, 2], "B": [2, 2]}
    names = [f"base_model.model.model.layers.{10**12}.mlp.up_proj.lora_{half}.weight" for half in shapes]
    entries: dict[str, object] = {name: tensor([2, 2], 16 * i, 16 * i + 16) for i, name in enumerate(names)}
    (place / "adapter_model.safetensors").write_bytes(of_header(entries, bytes(32)))


def claim_pieces(place: Path) -> None:
    """A manifest, sound in itself, of tensors that would take terabytes."""
    folder = shutil.copytree(saved(place.parent / "made", step=10), place, dirs_exist_ok=True)
    content = json.loads((folder / "manifest.json").read_text())
    name = content["tensors"][0]["name"]
    content["tensors"] = [{"name": name, "shape": [10**13]}]
    content["files"][0] |= {
        "pieces": [f"{kind}/{name}/0-{10**13}" for kind in ("adapter", "exp_avg", "exp_avg_sq")],
        "num_bytes": 12 * 10**13 + 1000,
    }
    content["files"][1]["pieces"] = []
    (folder / "manifest.json").write_bytes(signed(json.dumps(content).encode()))
    read_manifest(folder)


CLAIMS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "ten to the 15 elements": (claim_elements, "base", "and its header describes 4,000,000,000,000,0"),
    "ten to the 15 layers": (claim_layers, "config", "num_hidden_layers: found 1000000000000000, expected at most 1,000"),
    "an adapter on layer ten to the 12": (claim_a_far_layer, "adapter", "unexpected, on none of Llama's linears: base_model.model.model.layers.1000"),
    "tensors of terabytes": (claim_pieces, "checkpoint", "bytes, 120000000001000 were written"),
}  # fmt: skip


@pytest.mark.slow
def test_no_memory_is_taken_for_what_a_file_only_claims(tmp_path: Path) -> None:
    arguments = []
    for number, (make, kind, _) in enumerate(CLAIMS.values()):
        place = tmp_path / str(number) / "place"
        place.mkdir(parents=True)
        make(place)
        arguments.append(f"{kind}={place}")
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CLAIMS)
    for (code, words, grown), (_, _, told) in zip(found, CLAIMS.values(), strict=True):
        assert code == 4 and told in words, words
        assert grown < 50 * 2**20, f"{grown:,} bytes were taken: {words}"


def test_a_file_of_terabytes_whose_header_lacks_the_tensor_takes_no_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoints", step=10)
    content = json.loads((folder / "manifest.json").read_text())
    name = content["tensors"][0]["name"]
    content["tensors"] = [{"name": name, "shape": [10**12]}]
    content["files"][1]["pieces"] = []
    pieces = [f"{kind}/{name}/0-{10**12}" for kind in ("adapter", "exp_avg", "exp_avg_sq")]
    content["files"][0] |= {"pieces": pieces, "num_bytes": 13 * 10**12}
    (folder / "manifest.json").write_bytes(signed(json.dumps(content).encode()))
    try:
        os.truncate(folder / RANK_0, 13 * 10**12)
    except OSError as error:
        pytest.skip(f"this disk keeps no sparse file of terabytes: {error.strerror}")
    with pytest.raises(CheckpointError, match=rf"{RANK_0} can't be read as safetensors"):
        gather_adapter(folder, out=tmp_path / "out", verify=False)
