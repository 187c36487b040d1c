"""What a fuzzer feeds: each target puts bytes where a file is read, and reads it as the commands do.

``hypothesis`` (tests/fuzz/test_files.py) and a coverage-guided fuzzer (tests/fuzz/run.py) use the same targets. An
outcome is a clean load or one of our errors; whatever else is raised is a fault of ours.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save

from dist_lora.base.index import hash_config, open_index
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.stream import read_tensor
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.manifest import KINDS, read_manifest
from dist_lora.checkpoint.read import load_pieces, verify
from dist_lora.config.load import dump_config, load_config
from dist_lora.data.chat import encode_prompt, encode_sample, hash_tokenizer, load_tokenizer
from dist_lora.data.records import REQUIRED_COLUMNS
from dist_lora.data.sources import read_records
from dist_lora.errors import DataError, DistLoraError
from dist_lora.herd.shape import read_shape
from dist_lora.lora.adapter_reader import read_adapter
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.learned import learned_table, read_learned, sentences
from dist_lora.lora.origin import BaseIdentity, identify_base
from dist_lora.lora.state import Piece
from dist_lora.run_folder.heat_maps import LearnedOfRun, learned_plots
from tests.conftest import save_tiny_llama
from tests.unit.checkpoint.thread_ranks import saved

RANK_0 = "rank-00000-of-00002.safetensors"
SPLIT = b"\0\0"  # between the parts of an input that has several
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]

CONFIG = """run: my-run
model: {name: 3.1-8b, quant: nf4}
lora: {rank: 16, alpha: 32, targets: [q_proj, v_proj], layers: 8-15}
data: {train: [a.jsonl, org/name], eval: 0.05}
train: {steps: 200, global_batch: 16}
optim: {lr: 2e-4}
checkpoint: {every: 50, resume: auto}
log: {trackers: [tensorboard]}
"""
RECORDS = (
    {"messages": CHAT},
    {"messages": [{"role": "system", "content": "be brief"}, *CHAT], "tools": [{"name": "f", "parameters": {}}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": 1}]},
    {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}]},
    {"instruction": "add", "input": "1 1", "output": "2"},
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"text": "once upon a time"},
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Ground:
    """Sound files of every kind, in one folder; a target spoils one of them and leaves the others."""

    folder: Path
    tokenizer: Any

    @property
    def base(self) -> Path:
        """A model folder of one file."""
        return self.folder / "base"

    @property
    def sharded(self) -> Path:
        """The same model in several files."""
        return self.folder / "sharded"

    @property
    def adapter(self) -> Path:
        """An adapter's folder."""
        return self.folder / "adapter"

    @property
    def checkpoint(self) -> Path:
        """A checkpoint that two ranks saved."""
        return self.folder / "checkpoints" / "step-00000010"

    def put(self, place: Path, data: bytes) -> None:
        """Write a file anew; others may hold links to what lay there."""
        place.unlink(missing_ok=True)
        place.write_bytes(data)

    def original(self, place: Path) -> bytes:
        """What ``place`` held before anything was spoiled."""
        return (self.folder / "original" / place.relative_to(self.folder)).read_bytes()


def make_ground(folder: Path) -> Ground:
    """The ground of all targets, made in an empty folder."""
    torch.set_num_threads(1)
    save_tiny_llama(folder / "base", "llama31", num_layers=1, ffn=32, vocab=264)
    save_tiny_llama(folder / "sharded", "llama31", 1, 32, 264, "float32", "60KB")
    tensors = {f"model.layers.0.self_attn.q_proj.lora_{half}": torch.ones(shape) for half, shape in HALVES}
    base = BaseIdentity("org/tiny", None, "0" * 32, "1" * 32)
    write_adapter(
        folder / "adapter",
        tensors=tensors,
        rank=2,
        alpha=4,
        dropout=0.0,
        targets=["q_proj"],
        base=base,
        weight_norms={"model.layers.0.self_attn.q_proj": 8.0},
    )
    saved(folder / "checkpoints", step=10)
    shutil.copytree(folder, folder / "original")
    return Ground(folder, load_tokenizer(folder / "base", chat_template=None))


HALVES = (("A", (2, 64)), ("B", (64, 2)))


def config(ground: Ground, data: bytes) -> None:
    """A config file, and after each split one argument."""
    text, *arguments = data.split(SPLIT)
    ground.put(ground.folder / "config.yaml", text)
    overrides = [os.fsdecode(argument) for argument in arguments]
    loaded = load_config(ground.folder / "config.yaml", overrides=overrides)
    ground.put(ground.folder / "again.yaml", dump_config(loaded).encode())
    assert load_config(ground.folder / "again.yaml") == loaded


def signed(data: bytes) -> bytes:
    """A manifest with the checksum that fits it, so that what is behind the checksum is reached."""
    try:
        content = json.loads(data)
        content.pop("checksum", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return json.dumps(content | {"checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def manifest(ground: Ground, data: bytes) -> None:
    """A checkpoint's manifest."""
    ground.put(ground.checkpoint / "manifest.json", signed(data))
    verify(ground.checkpoint)
    _load_all(ground)
    gather_adapter(ground.checkpoint, out=ground.folder / "gathered", verify=False)


def _load_all(ground: Ground) -> None:
    found = read_manifest(ground.checkpoint)
    wanted = [Piece(spec.name, kind, 0, spec.num_elements) for spec in found.tensors for kind in KINDS]
    loaded = load_pieces(ground.checkpoint, found, wanted)
    assert [values.numel() for values in loaded.values()] == [piece.num_elements for piece in wanted]


def rank_file(ground: Ground, data: bytes) -> None:
    """The header of a rank's file, of which size and checksum stand in the manifest."""
    place = ground.checkpoint / RANK_0
    content = _with_header(data, ground.original(place))
    ground.put(place, content)
    told = json.loads(ground.original(ground.checkpoint / "manifest.json"))
    told["files"][0] |= {"num_bytes": len(content), "checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"}
    ground.put(ground.checkpoint / "manifest.json", signed(json.dumps(told).encode()))
    verify(ground.checkpoint)
    _load_all(ground)


def _with_header(data: bytes, original: bytes) -> bytes:
    """``original`` with ``data`` for its header; data that begins with a split takes the place of the whole file."""
    if data.startswith(SPLIT):
        return data[len(SPLIT) :]
    return len(data).to_bytes(8, "little") + data + original[8 + int.from_bytes(original[:8], "little") :]


def _header_of(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def base_header(ground: Ground, data: bytes) -> None:
    """The header of a model's only file."""
    place = ground.base / "model.safetensors"
    ground.put(place, _with_header(data, ground.original(place)))
    _read_base(ground.base)


def base_index(ground: Ground, data: bytes) -> None:
    """The index of a model in several files."""
    ground.put(ground.sharded / "model.safetensors.index.json", data)
    _read_base(ground.sharded)


def nf4_state(ground: Ground, data: bytes) -> None:
    """The settings of a weight that is quantized on disk."""
    rows, width = 4, 128
    tensors = {
        "w.weight": torch.zeros(rows * width // 2, 1, dtype=torch.uint8),
        "w.weight.absmax": torch.zeros(rows * width // 64, dtype=torch.uint8),
        "w.weight.quant_map": torch.tensor(_levels()),
        "w.weight.nested_absmax": torch.ones(1),
        "w.weight.nested_quant_map": torch.ones(256),
        "w.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(data or b" "), dtype=torch.uint8),
    }
    ground.put(ground.folder / "nf4" / "model.safetensors", save(tensors))
    found = open_base_on_disk(ground.folder / "nf4", quant="nf4")
    for weight in found.nf4.values():
        weight.read_rows(0, weight.shape[0])


def _levels() -> tuple[float, ...]:
    from dist_lora.base.quant.nf4 import LEVELS

    return tuple(LEVELS)


def _read_base(folder: Path) -> None:
    index = open_index(folder, allow_bytes=True)
    index.content_hash()
    found = open_base_on_disk(folder, quant="nf4")
    found.index.expect(read_shape(folder).tensor_shapes())
    for tensor in found.index.tensors.values():
        if tensor.name not in found.nf4:
            read_tensor(tensor)


def model_config(ground: Ground, data: bytes) -> None:
    """A model's config.json."""
    ground.put(ground.base / "config.json", data)
    shape = read_shape(ground.base)
    hash_config(ground.base)
    identify_base(ground.base)
    open_index(ground.base).expect(shape.tensor_shapes())


def adapter_config(ground: Ground, data: bytes) -> None:
    """An adapter's config, and after a split who its base is."""
    first, *second = data.split(SPLIT)
    ground.put(ground.adapter / "adapter_config.json", first)
    origin = ground.adapter / "dist_lora.json"
    ground.put(origin, second[0] if second else ground.original(origin))
    found = read_adapter(ground.adapter)
    found.base.differences(BaseIdentity("org/tiny", None, "0" * 32, "1" * 32))
    assert found.scale > 0 and found.rank == 2


def learned(ground: Ground, data: bytes) -> None:
    """What is recorded of an adapter, and what the report makes of it."""
    ground.put(ground.adapter / "learned.json", data)
    record = read_learned(ground.adapter)
    if record is not None:
        learned_table(record)
        assert all(sentences(record))
        assert len(learned_plots([LearnedOfRun("it", record, 1)])) == 1


def adapter_header(ground: Ground, data: bytes) -> None:
    """The header of an adapter's weights."""
    place = ground.adapter / "adapter_model.safetensors"
    ground.put(place, _with_header(data, ground.original(place)))
    read_adapter(ground.adapter)


def tokenizer_config(ground: Ground, data: bytes) -> None:
    """A tokenizer's settings, and what is done with it before anything is trained."""
    folder = ground.folder / "tokenizer"
    ground.put(folder / "tokenizer_config.json", data)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would count, and not the template of the settings
    _use_tokenizer(folder)


def tokenizer_file(ground: Ground, data: bytes) -> None:
    """A tokenizer's vocabulary and rules."""
    folder = ground.folder / "tokenizer"
    ground.put(folder / "tokenizer.json", data)
    _use_tokenizer(folder)


def _use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, chat_template=None)
    hash_tokenizer(folder, tokenizer)
    for fmt, record in (("messages", RECORDS[0]), ("text", RECORDS[7])):
        encode_sample(record, tokenizer=tokenizer, fmt=fmt, train_on="assistant")


def chat_template(ground: Ground, data: bytes) -> None:
    """A file for ``data.chat_template``."""
    place = ground.folder / "template.jinja"
    ground.put(place, data)
    tokenizer = load_tokenizer(ground.base, chat_template=str(place))
    encode_sample(RECORDS[0], tokenizer=tokenizer, fmt="messages", train_on="assistant")
    encode_prompt(CHAT[:1], tokenizer=tokenizer)


def data_file(ground: Ground, data: bytes) -> None:
    """A file of records; its first byte says of which kind."""
    suffix = (".jsonl", ".json", ".csv")[data[0] % 3] if data else ".jsonl"
    place = ground.folder / f"data{suffix}"
    ground.put(place, data[1:])
    records = read_records(str(place), fmt=None, which="train")
    for index in range(len(records)):
        try:
            record, fmt = records.converted(index)
        except DataError:
            continue
        _encode(ground, record, fmt)


def record(ground: Ground, data: bytes) -> None:
    """One line of JSON as a record of every format that it has the columns of."""
    place = ground.folder / "data.jsonl"
    ground.put(place, data.replace(b"\n", b" "))
    records = read_records(str(place), fmt=None, which="train")
    for fmt in REQUIRED_COLUMNS:
        _encode(ground, records[0], fmt)


def _encode(ground: Ground, found: dict[str, Any], fmt: Any) -> None:
    for train_on in ("assistant", "last", "all"):
        try:
            encoded = encode_sample(found, tokenizer=ground.tokenizer, fmt=fmt, train_on=train_on)
        except DataError:
            continue
        assert len(encoded.ids) == len(encoded.is_target)


def _places(ground: Ground) -> Iterator[Path]:
    """What is a target's to spoil, and whether it was."""
    for folder in ("base", "sharded", "adapter", "checkpoints"):
        for place in (ground.folder / "original" / folder).rglob("*"):
            if place.is_file():
                yield ground.folder / place.relative_to(ground.folder / "original")


def mend(ground: Ground) -> None:
    """Bring back every file as it was made."""
    for name in ("nf4", "tokenizer"):
        shutil.rmtree(ground.folder / name, ignore_errors=True)
    (ground.folder / "nf4").mkdir()
    shutil.copytree(ground.folder / "original" / "base", ground.folder / "tokenizer")
    for place in _places(ground):
        ground.put(place, ground.original(place))


@dataclass(frozen=True)
class Target:
    """A function to feed, and sound inputs to begin from."""

    feed: Callable[[Ground, bytes], None]
    seeds: Callable[[Ground], list[bytes]]

    def outcome(self, ground: Ground, data: bytes) -> DistLoraError | None:
        """Our error or, for a clean load, None; anything else is raised."""
        try:
            self.feed(ground, data)
        except DistLoraError as error:
            assert str(error).strip()
            return error
        return None


def _file(*parts: str) -> Callable[[Ground], list[bytes]]:
    return lambda ground: [ground.original(ground.folder.joinpath(*parts))]


def _header(*parts: str) -> Callable[[Ground], list[bytes]]:
    return lambda ground: [
        _header_of(content := ground.original(ground.folder.joinpath(*parts))),
        SPLIT + content[:4000],
    ]


def _tokenizer_settings(ground: Ground) -> list[bytes]:
    content = json.loads(ground.original(ground.base / "tokenizer_config.json"))
    return [json.dumps(content | {"chat_template": TEMPLATE}).encode()]


def _lines(ground: Ground) -> list[bytes]:
    texts = [json.dumps(one) for one in RECORDS]
    return [
        b"\0" + "\n".join(texts).encode(),
        b"\1" + f"[{', '.join(texts[:4])}]".encode(),
        b"\2prompt,completion\n1+1=,2\n",
    ]


NF4_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 128],
             "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}  # fmt: skip

TARGETS = {
    "config": Target(config, lambda ground: [CONFIG.encode(), SPLIT.join([CONFIG.encode(), b"lora.rank=4", b"run=b"])]),
    "manifest": Target(manifest, _file("checkpoints", "step-00000010", "manifest.json")),
    "rank_file": Target(rank_file, _header("checkpoints", "step-00000010", RANK_0)),
    "base_header": Target(base_header, _header("base", "model.safetensors")),
    "base_index": Target(base_index, _file("sharded", "model.safetensors.index.json")),
    "nf4_state": Target(nf4_state, lambda ground: [json.dumps(NF4_STATE).encode()]),
    "model_config": Target(model_config, _file("base", "config.json")),
    "adapter_config": Target(
        adapter_config,
        lambda ground: [
            SPLIT.join(ground.original(ground.adapter / f"{name}.json") for name in ("adapter_config", "dist_lora"))
        ],
    ),
    "learned": Target(learned, _file("adapter", "learned.json")),
    "adapter_header": Target(adapter_header, _header("adapter", "adapter_model.safetensors")),
    "tokenizer_config": Target(tokenizer_config, _tokenizer_settings),
    "tokenizer_file": Target(tokenizer_file, _file("base", "tokenizer.json")),
    "chat_template": Target(chat_template, lambda ground: [TEMPLATE.encode()]),
    "data_file": Target(data_file, _lines),
    "record": Target(record, lambda ground: [json.dumps(one).encode() for one in RECORDS]),
}
