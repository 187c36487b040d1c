"""Adapters with whole weights of linears and norms: PEFT's ``modules_to_save``, read, written, merged and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_lora.errors import AdapterError, ConfigError
from dist_lora.herd.shape import read_shape
from dist_lora.herd.unfrozen import unfrozen_weights
from dist_lora.lora.adapter_reader import open_adapter, read_adapter
from dist_lora.lora.fit import check_fit, with_settings_of
from dist_lora.lora.merge import merge_adapter
from dist_lora.lora.served import servers_of_adapter
from tests.unit.lora.configs import config_of
from tests.unit.lora.test_adapter_files import rewrite_config, write

NORMS = ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.norm")


def adapter_of_peft(base: Path, folder: Path, modules: list[str], targets: Any = ("q_proj",)) -> Path:
    """An adapter that PEFT saved, with all of its values away from where they begin."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=modules, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("modules", "targets", "names"),
    [
        (["input_layernorm", "model.norm"], ("q_proj",), NORMS),
        (["layers.1.mlp.down_proj", "k_proj"], ("q_proj",), ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")),
        (["layers.1.mlp.down_proj", "k_proj"], ("q_proj", "k_proj", "down_proj"), ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")),
        (["model.layers.1.mlp.up_proj"], "dummy-target-modules", ("model.layers.1.mlp.up_proj",)),
    ],
)  # fmt: skip
def test_whole_weights_that_peft_saved_are_read_and_merged(tiny_llama, tmp_path, modules, targets, names) -> None:
    base = tiny_llama("llama31")
    folder = adapter_of_peft(base, tmp_path / "peft", modules, targets)
    adapter, stored = read_adapter(folder), load_file(folder / "adapter_model.safetensors")
    assert adapter.unfrozen == names
    for name in names:
        assert torch.equal(adapter.tensors[f"{name}.weight"], stored[f"base_model.model.{name}.weight"])
    merge_adapter(folder, base=base, out=tmp_path / "merged", force=True)
    ids = torch.arange(40)[None]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = stock(ids).logits
    expected = PeftModel.from_pretrained(stock, folder).eval()(ids).logits
    assert (expected - before).norm() > 0.1 * before.norm()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_is_written_is_read_back_by_us_and_peft_and_sealed(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    read = read_adapter(adapter_of_peft(base, tmp_path / "peft", ["input_layernorm", "model.norm"]))
    write(tmp_path / "ours", read.tensors, rank=2, alpha=4, targets=("q_proj",), unfrozen=read.unfrozen)
    again = read_adapter(tmp_path / "ours")
    assert again.unfrozen == NORMS
    assert all(torch.equal(again.tensors[key], values) for key, values in read.tensors.items())
    ids = torch.arange(40)[None]
    logits = []
    for name in ("peft", "ours"):
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        logits.append(PeftModel.from_pretrained(stock, tmp_path / name).eval()(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=1e-6)
    assert "| trained whole | input_layernorm of layers 0-1, norm |" in (tmp_path / "ours" / "README.md").read_text()
    rewrite_config(tmp_path / "ours", modules_to_save=["input_layernorm"])
    with pytest.raises(AdapterError, match=r"unexpected: base_model\.model\.model\.norm\.weight"):
        open_adapter(tmp_path / "ours")


def test_an_adapter_brings_its_whole_weights_and_contradicts_others(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    adapter, shape = (
        open_adapter(adapter_of_peft(base, tmp_path / "peft", ["input_layernorm", "model.norm"])),
        read_shape(base),
    )
    check_fit(adapter, config=config_of(), shape=shape)
    assert unfrozen_weights(with_settings_of(config_of(), adapter), shape) == NORMS
    same = {"unfreeze": {"patterns": ["input_layernorm", "model.norm"]}}
    check_fit(adapter, config=config_of(train=same), shape=shape)
    told = "train.unfreeze: input_layernorm post_attention_layernorm of layers 0-1, norm in the config, input_layernorm of layers 0-1, norm in"
    with pytest.raises(ConfigError) as caught:
        check_fit(adapter, config=config_of(train={"unfreeze": {"norms": True}}), shape=shape)
    assert told in str(caught.value)
    with pytest.raises(ConfigError, match=r"model.norm is \(32,\), its whole weight \(64,\)"):
        check_fit(
            adapter,
            config=config_of(),
            shape=dataclasses.replace(shape, hidden=32),
        )


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save \\(whole modules: lm_head;"),
        ({"modules_to_save": "model.norm"}, AdapterError, "modules_to_save = 'model.norm'; a list of names was expected"),
        ({"modules_to_save": None}, AdapterError, "unexpected: base_model.model.model.layers.0.input_layernorm.weight"),
        ({"modules_to_save": ["input_layernorm", "model.norm", "k_proj"]}, AdapterError, "missing: k_proj"),
    ],
)  # fmt: skip
def test_whole_weights_that_are_not_understood_are_refused(tiny_llama, tmp_path, changed, kind, message) -> None:
    folder = adapter_of_peft(tiny_llama("llama31"), tmp_path / "peft", ["input_layernorm", "model.norm"])
    rewrite_config(folder, **changed)
    with pytest.raises(kind, match=message):
        open_adapter(folder)


def test_a_weight_that_is_not_whole_is_refused(tiny_llama, tmp_path) -> None:
    folder = adapter_of_peft(tiny_llama("llama31"), tmp_path / "peft", ["input_layernorm", "model.norm"])
    stored = load_file(folder / "adapter_model.safetensors")
    stored["base_model.model.model.norm.weight"] = stored["base_model.model.model.norm.weight"][:0]
    save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"not gathered: .*model.norm.weight has shape \(0,\)"):
        open_adapter(folder)


def test_servers_that_leave_whole_weights_out_are_said(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    norms = servers_of_adapter(adapter_of_peft(base, tmp_path / "norms", ["model.norm"]))
    linears = servers_of_adapter(adapter_of_peft(base, tmp_path / "linears", ["k_proj"]))
    assert {each.server: each.verdict for each in norms} == {
        "vLLM": "no",
        "TGI": "wrong",
        "llama.cpp": "wrong",
        "Ollama": "wrong",
    }
    assert {each.server: each.verdict for each in linears} == {
        "vLLM": "no",
        "TGI": "wrong",
        "llama.cpp": "no",
        "Ollama": "no",
    }
    assert all("modules_to_save" in each.why and "dist-lora merge" in each.why for each in (*norms, *linears))
