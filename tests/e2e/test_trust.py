"""What a run writes holds no pickle, and damage to it is found by every command before it is used."""

from __future__ import annotations

import json
import pickle
import pickletools
import shutil
import struct
from pathlib import Path

import pytest
import yaml

from dist_lora.data.token_cache import _ARRAYS
from tests.e2e.runs import Done, losses, run

RANK_1 = "rank-00001-of-00002.safetensors"


def turn_a_bit(file: Path, *, byte: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


# No pickle


def is_pickle(data: bytes) -> bool:
    """Whether bytes begin with what ``pickle`` or ``torch.save`` (a zip archive) write."""
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06") or (data[:1] == b"\x80" and data[1:2] in b"\2\3\4\5" and data[1:2]):
        return True
    try:
        return bool([operation for operation in pickletools.genops(data[:100_000])])
    except Exception:  # whatever it stumbles over: no pickle ends so
        return False


def kind_of(path: Path) -> str:
    """What a file is, by its name and proven by its content; "unknown" if it is nothing that we write."""
    data = path.read_bytes()
    if path.name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        places = sorted(entry["data_offsets"] for entry in header.values())
        assert [start for start, _ in places] == [0, *(end for _, end in places)][:-1], "bytes between the tensors"
        assert len(data) == 8 + length + places[-1][1], "bytes behind the tensors"
        return "safetensors"
    if path.name.startswith("events.out.tfevents"):
        return events_kind(data)
    if path.name in _ARRAYS and (path.parent / "summary.json").exists():
        sizes = json.loads((path.parent / "summary.json").read_text())["sizes"]
        assert len(data) == sizes[path.name] and len(data) % _ARRAYS[path.name].itemsize == 0
        return "array"
    if path.suffix == ".json":
        json.loads(data)
        return "JSON"
    if path.suffix == ".jsonl":
        assert all(isinstance(json.loads(line), dict) for line in data.splitlines())
        return "JSONL"
    if path.suffix == ".yaml":
        yaml.safe_load(data)
        return "YAML"
    if path.name in ("lock", "status") or path.suffix in (".lock", ".md", ".txt", ".jinja"):
        assert data.decode("utf-8").isprintable() or b"\n" in data or not data
        return "text"
    return "unknown"


def events_kind(data: bytes) -> str:
    """TensorBoard's records: length, its checksum, a protocol buffer, its checksum."""
    from tensorboard.compat.proto.event_pb2 import Event

    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            assert not any(is_pickle(content) for content in value.tensor.string_val), value.tag
        at += 16 + length
    assert at == len(data)
    return "events"


@pytest.fixture(scope="module")
def fallen_back(config, whole) -> tuple[Path, Done]:
    """A run whose newest checkpoint was damaged and that was started again on two ranks, and what it said."""
    folder = whole.parent / "fallen-back"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "summary.json", "lock"))
    newest = folder / "checkpoints" / "step-00000008"
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"run": "fallen-back"}))
    turn_a_bit(newest / RANK_1)
    cache = f"data.cache_dir={folder}-cache"
    return folder, run("train", config, "run=fallen-back", "log.trackers=[tensorboard]", cache, "--nproc", 2)


def test_every_file_that_a_run_makes_is_of_a_known_kind_and_no_pickle(whole, fallen_back) -> None:
    folder, done = fallen_back
    assert done.returncode == 0, done.stderr
    cache = folder.with_name(f"{folder.name}-cache")
    assert cache.is_dir()
    files = [path for place in (whole, folder, cache) for path in place.rglob("*") if path.is_file()]
    kinds = {path: kind_of(path) for path in files if ".building-" not in str(path)}
    assert set(kinds.values()) == {"safetensors", "events", "array", "JSON", "JSONL", "YAML", "text"}, {
        path: kind for path, kind in kinds.items() if kind == "unknown"
    }
    assert [path for path in files if is_pickle(path.read_bytes())] == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_every_protocol_is_seen(protocol, tmp_path) -> None:
    assert is_pickle(pickle.dumps({"a": [1, "b"]}, protocol=protocol))
    assert not is_pickle(json.dumps({"a": [1, "b"]}).encode())


# Damage


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(whole, fallen_back) -> None:
    folder, done = fallen_back
    assert done.returncode == 0, done.stderr
    root = folder / "checkpoints"
    assert f"{root / 'step-00000008'} is damaged: {RANK_1} has the checksum" in done.stderr
    assert f"Using the one before: {root / 'step-00000006'}" in done.stderr
    assert "resumed" in done.stderr and "step 6 of 8" in done.stderr
    assert losses(folder) == losses(whole)
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()


@pytest.fixture
def checkpoints(whole, tmp_path) -> Path:
    """The whole run's checkpoints, to be damaged."""
    return Path(shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints"))


def test_gather_verify_tells_of_each_checkpoint_in_a_line_and_makes_nothing(checkpoints, here) -> None:
    before = sorted(checkpoints.parent.rglob("*"))
    steps = sorted((path.name for path in checkpoints.iterdir()), reverse=True)
    done = here("gather", checkpoints.parent, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(steps) == 2
    for line, step in zip(lines, steps, strict=True):
        assert line.startswith(f"{checkpoints / step} is intact: step {int(step[5:])}, 2 ranks' files, ")
    turn_a_bit(checkpoints / steps[1] / RANK_1)
    done = here("gather", checkpoints.parent, "--verify", "--out", checkpoints.parent.parent / "adapter")
    assert done.returncode == 4
    first, second = done.stdout.splitlines()
    assert first == lines[0]
    assert second.startswith(f"{checkpoints / steps[1]} is damaged: {RANK_1} has the checksum xxh3_128:")
    assert done.stderr == f"error: {checkpoints.parent}: 1 of 2 checkpoints is damaged, see the lines above\n"
    assert sorted(checkpoints.parent.rglob("*")) == before
    assert not (checkpoints.parent.parent / "adapter").exists()


def test_gather_verifies_what_it_gathers_and_needs_a_place_for_it(checkpoints, here, tmp_path) -> None:
    done = here("gather", checkpoints.parent)
    assert done.returncode == 2
    assert done.stderr == (
        "error: gather: neither --out nor --verify is given: name the folder to make with --out DIR\n"
    )
    done = here("gather", checkpoints.parent, "--verify", "--out", tmp_path / "adapter")
    assert done.returncode == 0 and done.stdout.splitlines()[2] == str(tmp_path / "adapter")
    newest = checkpoints / "step-00000008"
    turn_a_bit(newest / RANK_1)
    done = here("gather", newest, "--out", tmp_path / "of-the-damaged")
    assert done.returncode == 4 and f"{newest} is damaged: {RANK_1} has the checksum" in done.stderr
    assert not (tmp_path / "of-the-damaged").exists()


def test_a_manifest_of_another_step_is_no_checkpoint_to_resume(config, checkpoints, here) -> None:
    newest = checkpoints / "step-00000008"
    shutil.copy(checkpoints / "step-00000006" / "manifest.json", newest / "manifest.json")
    done = here("train", config, "run=of-another", f"checkpoint.resume={newest}")
    assert done.returncode == 4 and "error: " in done.stderr
    assert "manifest.json is that of step 6" in done.stderr and "loaded base" not in done.stderr
