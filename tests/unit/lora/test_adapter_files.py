"""An adapter folder loads in PEFT as it stands, and whatever is wrong with one is told by its keys."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lora.base.index import hash_config, open_index
from dist_lora.errors import AdapterError, ConfigError, DistLoraError, SaveError, WeightsError
from dist_lora.lora.adapter_reader import open_adapter, read_adapter
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity, identify_base

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = BaseIdentity("meta-llama/Llama-3.1-8B", "abc123", "0" * 32, "1" * 32)


def tiny_llama(*, num_layers: int = 2, is_tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=is_tied,
    )
    return LlamaForCausalLM(config).eval()


def random_adapter(
    model: LlamaForCausalLM, *, rank: int = 4, targets: tuple[str, ...] = LINEARS, layers: Any = None
) -> dict[str, Tensor]:
    """A and B for each target, both nonzero, by the widths of the stock model's own linears."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        if layers is not None and int(name.split(".")[2]) not in layers:
            continue
        tensors[f"{name}.lora_A"] = torch.randn(rank, module.in_features, generator=generator) * 0.1
        tensors[f"{name}.lora_B"] = torch.randn(module.out_features, rank, generator=generator) * 0.1
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": LINEARS, "base": BASE}
    write_adapter(folder, tensors=tensors, **{**settings, **changes})


def merged_by_hand(model: LlamaForCausalLM, tensors: dict[str, Tensor], scale: float) -> LlamaForCausalLM:
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.lora_A" in tensors:
                module.weight += scale * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    return model


def rewrite_keys(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def message(folder: Path, *, exit_code: int = 4) -> str:
    with pytest.raises(DistLoraError) as raised:
        read_adapter(folder)
    assert raised.value.exit_code == exit_code
    return str(raised.value)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write(tmp_path / "adapter", random_adapter(tiny_llama()))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(LINEARS, None), (("k_proj", "down_proj"), None), (LINEARS, (1, 2)), (("q_proj",), (0, 3))],
)
def test_peft_loads_the_folder_with_no_missing_or_unexpected_key_and_computes_the_same(
    tmp_path, targets, layers, monkeypatch, recwarn
):
    def connect(*_: object) -> None:
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tensors = random_adapter(tiny_llama(num_layers=4), targets=targets, layers=layers)
    write(tmp_path / "adapter", tensors, targets=targets, layers=layers)
    loaded = PeftModel.from_pretrained(tiny_llama(num_layers=4), tmp_path / "adapter")
    assert not [str(warning.message) for warning in recwarn if "key" in str(warning.message)]
    on_disk = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    in_peft = get_peft_model_state_dict(loaded)
    assert set(on_disk) == set(in_peft) and len(on_disk) == len(tensors)
    assert all(torch.equal(on_disk[key], in_peft[key]) for key in on_disk)
    ids = torch.arange(20)[None]
    expected = merged_by_hand(tiny_llama(num_layers=4), tensors, scale=8 / 4)(ids).logits
    assert (expected - tiny_llama(num_layers=4)(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_key_names_are_those_of_a_model_that_peft_made(adapter):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    made_by_peft = get_peft_model_state_dict(get_peft_model(tiny_llama(), config))
    found = load_file(adapter / "adapter_model.safetensors")
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in made_by_peft.items()}


def test_what_is_written_is_read_back(tmp_path):
    tensors = random_adapter(tiny_llama(num_layers=3), layers=(1, 2), rank=3)
    write(tmp_path / "a", tensors, rank=3, alpha=7.5, dropout=0.1, layers=[2, 1])
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.tensors) == set(tensors)
    assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in tensors.items())
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.scale) == (3, 7.5, 0.1, 2.5)
    assert (adapter.targets, adapter.layers, adapter.base) == (LINEARS, (1, 2), BASE)


def test_an_adapter_in_bf16_is_read(tmp_path):
    tensors = random_adapter(tiny_llama())
    write(tmp_path / "a", tensors)
    file = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in stored.items()}, file)
    read = read_adapter(tmp_path / "a").tensors
    assert all(torch.equal(read[key], tensor.bfloat16().float()) for key, tensor in tensors.items())


def test_no_file_tells_where_it_was_made(tmp_path):
    name = str(tmp_path / "models" / "my-llama")
    write(tmp_path / "a", random_adapter(tiny_llama()), base=BaseIdentity(name))
    for file in (tmp_path / "a").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my-llama"
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "dist_lora.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("~/models/x", "x"),
        ("../x/", "x"),
        ("C:\\models\\x", "x"),
        ("3.1-8b", "3.1-8b"),
        ("org/x", "org/x"),
        (None, None),
    ],
)
def test_paths_in_the_bases_name_are_cut(tmp_path, name, written):
    write(tmp_path / "a", random_adapter(tiny_llama()), base=BaseIdentity(name))
    assert read_adapter(tmp_path / "a").base.name == written


def test_the_config_has_what_servers_read(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
        "base_model_name_or_path": BASE.name, "revision": BASE.revision, "target_modules": sorted(LINEARS),
        "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert set(config) <= set(LoraConfig().to_dict())
    assert type(config["lora_alpha"]) is int  # vLLM's PEFTHelper says int
    origin = json.loads((adapter / "dist_lora.json").read_text())
    assert origin["base"] == {
        "name": BASE.name, "revision": BASE.revision, "content_hash": BASE.content_hash, "config_hash": BASE.config_hash
    }  # fmt: skip
    assert origin["software"]["torch"] == torch.__version__


def test_the_base_is_known_by_name_and_content(tmp_path):
    folder = tmp_path / "my-llama"
    tiny_llama().save_pretrained(folder)
    found = identify_base(folder)
    assert found == BaseIdentity("my-llama", None, open_index(folder).content_hash(), hash_config(folder))
    assert identify_base(folder, name="org/x", revision="r1").name == "org/x"
    shutil.copytree(folder, tmp_path / "elsewhere")
    rewritten = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "org/tiny"}
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(rewritten))
    moved = identify_base(tmp_path / "elsewhere")
    assert (moved.name, moved.content_hash, moved.config_hash) == (
        "org/tiny",
        found.content_hash,
        found.config_hash,
    )
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    assert identify_base(tmp_path / "other").content_hash != found.content_hash
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config\.json can't be read"):
        identify_base(folder)


KEY = "model.layers.0.self_attn.k_proj.lora_B"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({KEY: torch.zeros(0)}, f"not gathered: a process holds only its shard of a tensor: {KEY} has shape (0,)"),
        ({KEY: torch.zeros(0, 4)}, f"not gathered: a process holds only its shard of a tensor: {KEY} has shape (0, 4)"),
        ({KEY: torch.ones(128)}, f"{KEY} has shape (128,)"),
        ({KEY: torch.full((32, 4), float("nan"))}, f"NaN or infinity in {KEY}"),
        ({KEY: torch.full((32, 4), float("inf"))}, f"NaN or infinity in {KEY}"),
        ({KEY: torch.ones(32, 2)}, f"wrong rank: {KEY} has rank 2"),
        ({KEY: None}, f"missing: {KEY}"),
        ({KEY: None, KEY[:-1] + "A": None}, f"missing: {KEY[:-1]}A, {KEY}"),
        ({"_orig_mod." + KEY: torch.ones(32, 4)}, f"unexpected, on none of Llama's linears: _orig_mod.{KEY}"),
        ({"lm_head.lora_A": torch.ones(4, 64)}, "unexpected, on none of Llama's linears: lm_head.lora_A"),
    ],
)  # fmt: skip
def test_the_writer_refuses_what_is_not_a_whole_adapter_and_leaves_nothing(tmp_path, change, expected):
    tensors = {**random_adapter(tiny_llama()), **change}
    with pytest.raises(AdapterError, match=re.escape(expected)) as raised:
        write(tmp_path / "a", {key: tensor for key, tensor in tensors.items() if tensor is not None})
    assert str(raised.value).startswith("The adapter can't be written (rank 4):")
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_layers_that_were_not_named_and_no_adapter_at_all(tmp_path):
    with pytest.raises(AdapterError, match=r"not among the named targets and layers: model\.layers\.1\."):
        write(tmp_path / "a", random_adapter(tiny_llama()), layers=[0])
    with pytest.raises(AdapterError, match="it holds no adapter at all"):
        write(tmp_path / "a", {})


def test_an_adapter_is_replaced_whole_and_leftovers_of_a_killed_writer_go(adapter):
    (adapter / "note.txt").write_text("of the former adapter")
    for leftover in (".adapter.partial", ".adapter.replaced"):
        (adapter.parent / leftover).mkdir()
        (adapter.parent / leftover / "junk").write_text("x")
    tensors = random_adapter(tiny_llama(), rank=2)
    write(adapter, tensors, rank=2)
    assert read_adapter(adapter).rank == 2
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    assert not (adapter / "note.txt").exists()


def test_an_empty_folder_is_filled_and_anything_else_is_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", random_adapter(tiny_llama()))
    assert read_adapter(tmp_path / "empty").rank == 4
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for place in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(ConfigError, match=r"exists and isn't an adapter \(it has no adapter_config\.json\)"):
            write(place, random_adapter(tiny_llama()))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "x"


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_rename_that_fails_leaves_the_former_adapter(adapter, monkeypatch, failing_call):
    before, calls, real_rename = (adapter / "adapter_model.safetensors").read_bytes(), [], os.rename

    def rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(SaveError, match=r"can't be written to .*adapter: No space left on device"):
        write(adapter, random_adapter(tiny_llama(), rank=2), rank=2)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_place_where_nothing_can_be_written_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="The adapter can't be written to"):
        write(tmp_path / "file" / "adapter", random_adapter(tiny_llama()))


@pytest.mark.parametrize("is_rslora", [False, True])
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"], r".*\.1\.self_attn\.(q|v)_proj"])
def test_adapters_that_peft_saved_are_read(tmp_path, is_rslora, modules):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, use_rslora=is_rslora, init_lora_weights=False, task_type="CAUSAL_LM"
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.scale == pytest.approx(4.0 if is_rslora else 2.0)
    ids = torch.arange(20)[None]
    expected = merged_by_hand(tiny_llama(), adapter.tensors, scale=adapter.scale)(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert adapter.base.content_hash is None


def test_layers_of_an_adapter_that_peft_saved(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=1, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).layers == (1,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "use_dora (DoRA)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (whole modules: lm_head;"),
        ({"bias": "lora_only"}, "bias: lora_only (trained biases)"),
        ({"lora_bias": True}, "lora_bias (biases)"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: pissa_niter_16 (changes the base"),
        ({"use_dora": True, "bias": "all"}, "use_dora (DoRA), bias: all (trained biases)"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(adapter, changes, expected):
    rewrite_config(adapter, **changes)
    text = message(adapter, exit_code=2)
    assert "asks for more than plain LoRA on the seven linears" in text and expected in text
    assert "isn't supported" in text


def test_other_kinds_of_adapters_are_refused(adapter):
    rewrite_config(adapter, peft_type="IA3")
    assert "describes an adapter of type 'IA3'; only LORA is supported." in message(adapter, exit_code=2)


PEFT_KEY = f"base_model.model.{KEY}.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {k: v for k, v in t.items() if k != PEFT_KEY}, [f"missing: {PEFT_KEY}"]),
        (
            lambda t: {k: v for k, v in t.items() if "layers.0.mlp.up_proj" not in k},
            ["missing: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, base_model"],
        ),
        (lambda t: {**t, "base_model.model.head.lora_A.weight": torch.ones(4, 64)}, ["unexpected, on none of Llama's linears: base_model.model.head.lora_A.weight"]),
        (
            lambda t: {k.replace("base_model.model.model", "model") if k == PEFT_KEY else k: v for k, v in t.items()},
            [f"unexpected, on none of Llama's linears: {KEY}.weight", f"missing: {PEFT_KEY}"],
        ),
        (lambda t: {**t, PEFT_KEY: torch.zeros(0)}, [f"not gathered: a process holds only its shard of a tensor: {PEFT_KEY}"]),
        (lambda t: {**t, PEFT_KEY: torch.ones(32, 3)}, [f"wrong rank: {PEFT_KEY} has rank 3"]),
        (lambda t: {**t, PEFT_KEY: torch.full((32, 4), float("nan"))}, [f"holds NaN or infinity in {PEFT_KEY}"]),
    ],
)  # fmt: skip
def test_a_damaged_file_names_its_keys(adapter, change, expected):
    rewrite_keys(adapter, change)
    text = message(adapter)
    assert "adapter_model.safetensors" in text
    for part in expected:
        assert part in text


def test_a_wrong_rank_in_the_config_names_the_keys(adapter):
    rewrite_config(adapter, r=8)
    text = message(adapter)
    assert "doesn't hold the adapter of its adapter_config.json (r = 8)" in text
    assert "wrong rank: model.layers.0" not in text  # as spelt in the file
    assert "wrong rank: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has rank 4" in text
    assert "and 23 more" in text


def test_targets_that_the_config_does_not_name(adapter):
    rewrite_config(adapter, target_modules=["q_proj"])
    assert "not among the named targets and layers: base_model.model.model.layers.0.mlp" in message(adapter)
    rewrite_config(adapter, target_modules=["q_proj", "lm_head"])
    assert "has adapters on lm_head: only those on Llama's seven linears (q_proj k_proj" in message(
        adapter, exit_code=2
    )
    rewrite_config(adapter, target_modules=[])
    assert "which match none of Llama's linears (q_proj k_proj" in message(adapter, exit_code=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": "8"}, {"r": True}, {"r": 10**40},
        {"lora_alpha": None}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": 10**400},
        {"lora_alpha": 0}, {"lora_alpha": -1}, {"lora_dropout": "x"}, {"lora_dropout": float("nan")}, {"lora_dropout": 2},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_none(adapter, changes):
    rewrite_config(adapter, **changes)
    expected = "a whole number from 1, a number above 0 and one from 0 to 1 were expected. The file is damaged."
    assert expected in message(adapter)


def test_files_that_are_missing_or_damaged(adapter):
    (adapter / "dist_lora.json").write_text('{"format": 2, "base": {}}')
    assert "has format 2, and format 1 is supported. Update dist-lora." in message(adapter)
    (adapter / "dist_lora.json").write_text("{")
    assert "dist_lora.json is damaged: it is not JSON" in message(adapter)
    (adapter / "dist_lora.json").write_text("[]")
    assert "dist_lora.json is damaged: a JSON object was expected" in message(adapter)
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert "The download is incomplete; fetch that file again." in message(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "holds adapter_model.bin: pickled weights are never read" in message(adapter, exit_code=2)
    (adapter / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors can't be read: No such file" in message(adapter)


def test_a_file_that_became_shorter_after_it_was_opened(adapter):
    opened = open_adapter(adapter)
    os.truncate(adapter / "adapter_model.safetensors", 4000)
    with pytest.raises(AdapterError, match="the file was truncated"):
        opened.read_pair("model.layers.1.mlp.up_proj")


def test_pairs_can_be_read_one_at_a_time(adapter):
    opened, whole = open_adapter(adapter), read_adapter(adapter)
    assert list(opened.pairs)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    first, second = opened.read_pair("model.layers.1.self_attn.v_proj")
    assert torch.equal(first, whole.tensors["model.layers.1.self_attn.v_proj.lora_A"])
    assert torch.equal(second, whole.tensors["model.layers.1.self_attn.v_proj.lora_B"])


# Damage that headers do not show


def other_adapter(folder: Path, **changes: Any) -> Path:
    tensors = {key: tensor * 2 for key, tensor in random_adapter(tiny_llama()).items()}
    write(folder, tensors, **changes)
    return folder


def turn_a_bit(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 1
    file.write_bytes(data)


FILES = ("adapter_config.json", "adapter_model.safetensors")
DAMAGES = {
    "cut short by a byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a bit turned at the start": lambda file: turn_a_bit(file, 0.0),
    "a bit turned at the end": lambda file: turn_a_bit(file, 1.0),
    "emptied": lambda file: os.truncate(file, 0),
    "removed": lambda file: file.unlink(),
    "a folder in its place": lambda file: (file.unlink(), file.mkdir()),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nothing")),
    "longer by a byte": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "the other file": lambda file: shutil.copy(file.with_name(FILES[1 - FILES.index(file.name)]), file),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_an_adapter_is_named(adapter, file, damage):
    DAMAGES[damage](adapter / file)
    if (file, damage) == (FILES[0], "cut short by a byte"):
        assert read_adapter(adapter).rank == 4  # it was the end of the last line
    else:
        assert file in message(adapter)


def test_any_one_bit_that_is_turned_in_the_tensors_is_found(adapter):
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for number in range(8 * start, 8 * len(data), 8 * 997 + 1):
        turned = bytearray(data)
        turned[number // 8] ^= 1 << number % 8
        file.write_bytes(turned)
        text = message(adapter)
        assert f"{file} is damaged: its tensors have checksum xxh3_128:" in text or "NaN or infinity" in text


def test_any_one_bit_that_is_turned_in_a_config_or_a_header_is_found_or_changes_nothing(tmp_path):
    adapter = tmp_path / "adapter"
    tensors = random_adapter(tiny_llama(num_layers=1), rank=1, targets=("k_proj",))
    write(adapter, tensors, rank=1, targets=("k_proj",))
    facts = ("rank", "alpha", "dropout", "targets", "layers", "scale", "modules", "base")
    whole = read_adapter(adapter)
    for name in ("adapter_config.json", "dist_lora.json", "adapter_model.safetensors"):
        file = adapter / name
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
        for number in range(0, 8 * end, 5):
            turned = bytearray(data)
            turned[number // 8] ^= 1 << number % 8
            file.write_bytes(turned)
            try:
                found = read_adapter(adapter)
            except DistLoraError:
                continue
            assert [getattr(found, fact) for fact in facts] == [getattr(whole, fact) for fact in facts], number
            assert all(torch.equal(found.tensors[key], tensor) for key, tensor in whole.tensors.items())
        file.write_bytes(data)


def test_the_weights_of_another_adapter_of_the_same_shapes_are_found(adapter, tmp_path):
    other = other_adapter(tmp_path / "other")
    shutil.copy(other / "adapter_model.safetensors", adapter)
    text = message(adapter)
    assert f"{adapter}/dist_lora.json was written with other weights (xxh3_128:" in text
    assert "the files are from two adapters. Copy both from the same one." in text
    (adapter / "dist_lora.json").unlink()  # who takes PEFT's two files alone has an adapter
    assert read_adapter(adapter).base.content_hash is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alpha": 9}, "lora_alpha is 9, and was 8"),
        ({"dropout": 0.5}, "lora_dropout is 0.5, and was 0.0"),
    ],
)
def test_the_config_of_another_adapter_is_found(adapter, tmp_path, changes, told):
    other = other_adapter(tmp_path / "other", **changes)
    shutil.copy(other / "adapter_config.json", adapter)
    text = message(adapter)
    assert "adapter_config.json has changed since adapter_model.safetensors was written: " + told in text
    assert "restore the former values" in text


def test_rslora_that_is_switched_on_by_hand_is_found(adapter):
    rewrite_config(adapter, use_rslora=True)
    assert "use_rslora is True, and was False" in message(adapter)


def test_what_does_not_change_the_tensors_meaning_may_be_edited(adapter):
    rewrite_config(adapter, base_model_name_or_path="elsewhere/llama", inference_mode=False, revision=None)
    assert read_adapter(adapter).rank == 4


def test_a_file_that_says_who_the_base_is_has_a_checksum_of_its_own(adapter):
    file = adapter / "dist_lora.json"
    file.write_text(file.read_text().replace(BASE.name, "meta-llama/Llama-3.1-9B"))
    assert "dist_lora.json doesn't match its own checksum: it is damaged, or was edited by hand." in message(adapter)


def test_an_adapter_that_peft_saves_over_ours_loads(adapter, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    model.save_pretrained(adapter)
    assert (adapter / "dist_lora.json").exists()
    before = random_adapter(tiny_llama())
    after = read_adapter(adapter).tensors
    assert all(torch.equal(after[key], tensor * (2 if key.endswith("B") else 1)) for key, tensor in before.items())


def test_an_adapter_without_a_checksum_loads(adapter):
    rewrite_keys(adapter, dict)
    assert read_adapter(adapter).rank == 4
    open_adapter(adapter).verify()


@pytest.mark.parametrize("seal", ["{", "[]", "7", "{}", '{"checksum": 7, "config": {}}', '{"checksum": "x"}'])
def test_a_seal_of_another_form_is_damage(adapter, seal):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"dist_lora": seal})
    assert f"{file} is damaged: dist_lora in its metadata " in message(adapter)


SAME = """
import sys
from pathlib import Path
import torch
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity
tensors = {f"model.layers.0.mlp.up_proj.lora_{half}": torch.ones(2, 2) for half in "BA"}
write_adapter(Path(sys.argv[1]), tensors=tensors, rank=2, alpha=4, dropout=0.0, targets=["up_proj"], base=BaseIdentity("x"))
"""


def test_the_same_adapter_is_the_same_bytes_in_another_process(tmp_path, monkeypatch):
    # What a library keeps in a hash map differs by process.
    command = [sys.executable, "-c", SAME, str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["here", str(tmp_path / "here")])
    exec(SAME, {})
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes(), file.name
