"""Adapters that PEFT made, of every kind that is plain LoRA: our model and our merge compute what PEFT's do."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_lora.base.attention import Documents
from dist_lora.chat.command import open_for_answers
from dist_lora.config.schema import LoraSection
from dist_lora.errors import AdapterError, ConfigError
from dist_lora.herd import names
from dist_lora.herd.shape import read_shape
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.fit import check_fit, settings_of, with_settings_of
from dist_lora.lora.merge import merge_adapter
from dist_lora.train import build
from dist_lora.world.world import World
from tests.unit.lora.configs import config_of

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(0))
Q, UP, V = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "full names": {"target_modules": [Q, UP, V]},
    "ends of names": {"target_modules": ["layers.1.self_attn.q_proj", "1.mlp.up_proj"]},
    "a regular expression": {"target_modules": r".*layers\.[1-9]\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "another model's names beside": {"target_modules": ["q_proj", "c_attn"]},
    "rsLoRA": {"r": 9, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "rank and alpha patterns": QV
    | {"rank_pattern": {"layers.1.self_attn.q_proj": 8, "k_proj": 3}, "alpha_pattern": {r"1\.self_attn\..*": 64}},
    "the first pattern that matches": QV | {"alpha_pattern": {".*": 3, "q_proj": 64}, "rank_pattern": {"(q|v)_proj": 2, "v_proj": 8}},
    "patterns of rsLoRA": QV | {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5.5}},
    "one layer": QV | {"layers_to_transform": [1]},
    "a layer by its pattern": QV | {"layers_to_transform": 1, "layers_pattern": "layers"},
    "a layer beside a full name": {"target_modules": [Q, "v_proj"], "layers_to_transform": [1]},
    "without some": QV | {"exclude_modules": r".*layers\.0\..*"},
    "without some by name": QV | {"exclude_modules": [Q]},
    "without target_modules": {},
    "gate": {"target_modules": ["gate_proj"]},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (QV | {"use_dora": True}, "use_dora (DoRA)"),
    "a whole head": (QV | {"modules_to_save": ["lm_head"]}, "modules_to_save (whole modules: lm_head;"),
    "biases": (QV | {"bias": "lora_only"}, "bias: lora_only (trained biases)"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "adapters on the embeddings or the head"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "adapters on the embeddings or the head"),
    "pissa": (QV | {"init_lora_weights": "pissa"}, "init_lora_weights: pissa (changes the base"),
}


@pytest.fixture(scope="module")
def base(tiny_llama) -> Path:
    return tiny_llama("llama31")


@pytest.fixture(scope="module")
def stock(base) -> Iterator[Any]:
    yield lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def made_by_peft(folder: Path, stock: Any, kind: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter of this kind as PEFT saves it, with a B that is not zero."""
    torch.manual_seed(3)
    model = get_peft_model(stock(), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | kind))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def ours(adapter: Path, base: Path) -> Tensor:
    model, rows = open_for_answers(adapter, base=str(base), world=World.alone()).model, torch.arange(len(IDS))
    return model(IDS, positions=rows, attention=Documents((0, len(IDS))), rows=rows)


def test_a_model_that_answers_reads_the_headers_of_its_base_once_to_open_it(tmp_path, stock, base, monkeypatch) -> None:
    adapter = made_by_peft(tmp_path / "adapter", stock, QV)
    monkeypatch.setattr(build, "open_index", None)  # how the base is stored, and so its headers, is known by then
    assert ours(adapter, base).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_and_our_merge_compute_what_pefts_do(tmp_path, stock, base, kind) -> None:
    adapter = made_by_peft(tmp_path / "adapter", stock, KINDS[kind])
    if kind == "all-linear":  # PEFT saves the names that it found
        rewrite(adapter, target_modules="all-linear")
    if kind == "without target_modules":
        rewrite(adapter, target_modules=None)
    model = PeftModel.from_pretrained(stock(), adapter).eval()
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
        plain = stock()(IDS[None]).logits[0]
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours(adapter, base), expected, atol=2e-5, rtol=1e-5)
    merge_adapter(adapter, base=base, out=tmp_path / "merged", dtype="fp32")
    wanted = {name: tensor for name, tensor in model.merge_and_unload().state_dict().items()}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_16_bits_are_computed_in_32_as_peft_does(tmp_path, stock, base, dtype) -> None:
    adapter = made_by_peft(tmp_path / "adapter", stock, QV, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(adapter / "adapter_model.safetensors").values()} == {dtype}
    with torch.no_grad():
        expected = PeftModel.from_pretrained(stock(), adapter).eval()(IDS[None]).logits[0]
    torch.testing.assert_close(ours(adapter, base), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_lora_is_the_users_mistake_and_named(tmp_path, stock, kind) -> None:
    settings, words = REFUSED[kind]
    adapter = made_by_peft(tmp_path, stock, settings)
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_adapter(adapter)


def rewrite(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rename(adapter: Path, change: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.fixture
def adapter(tmp_path, stock) -> Path:
    return made_by_peft(tmp_path / "adapter", stock, KINDS["rank and alpha patterns"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}, "keys with the adapter's name in them, from model.state_dict()"),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(4, 4)}, "base_model.model.lm_head.weight: whole embeddings or a whole head"),
        (lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)}, "adapters on the embeddings or the head"),
        (lambda t: {**t, f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(4)}, "lora_magnitude_vector.weight: DoRA"),
        (lambda t: {k.replace("model.layers", "transformer.h"): v for k, v in t.items()}, "it is another model's adapter"),
    ],
)  # fmt: skip
def test_tensors_of_other_kinds_are_the_users_mistake_and_named(adapter, change, words) -> None:
    rename(adapter, change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_adapter(adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["c_attn"]}, "names target_modules c_attn, which match none of Llama's linears"),
        ({"target_modules": "q_proj"}, "names target_modules 'q_proj', which match none"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform or layers_pattern beside target_modules"),
        ({"layers_pattern": "layers"}, "has layers_pattern without layers_to_transform"),
    ],
)  # fmt: skip
def test_targets_that_peft_refuses_are_refused(adapter, stock, changes, words) -> None:
    rewrite(adapter, **changes)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(stock(), adapter)
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_adapter(adapter)


ENDLESS = r"(.|[a-z])*[!?]"  # for ``re`` one of our names takes longer than the sun shines


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    ],
    ids=str,
)
def test_a_regular_expression_that_would_never_end_is_refused(adapter, monkeypatch, changes) -> None:
    monkeypatch.setattr(names, "_MATCH_S", 0.1)
    rewrite(adapter, **changes)
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json: the regular expression .* takes longer than 0\.1 s"
    ) as e:
        open_adapter(adapter)
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "(q_proj"}, "has a name that isn't a regular expression (missing )"),
        ({"rank_pattern": {"[": 4}}, "has a name that isn't a regular expression"),
        ({"exclude_modules": "*"}, "has a name that isn't a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "has rank_pattern = {'q_proj': 0}; names with whole numbers from 1 were expected"),
        ({"alpha_pattern": {"q_proj": True}}, "has alpha_pattern = {'q_proj': True}; names with numbers above 0"),
        ({"alpha_pattern": [1]}, "has alpha_pattern = [1]; names with numbers above 0"),
        ({"target_modules": [1]}, "has target_modules = [1]; a regular expression or a list of names was expected"),
        ({"modules_to_save": ["(.q_proj"]}, "has modules_to_save = ['(.q_proj']; a list of names was expected"),
        ({"layers_to_transform": "x"}, "has layers_to_transform = 'x'; a list of layer numbers was expected"),
        ({"rank_pattern": {"q_proj": 7}}, "wrong rank: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has rank 4"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_damage(adapter, changes, words) -> None:
    rewrite(adapter, **changes)
    with pytest.raises(AdapterError, match=re.escape(words)):
        open_adapter(adapter)


def test_what_peft_reports_as_missing_is_damage(adapter, stock, base) -> None:
    rename(adapter, lambda tensors: {key: t for key, t in tensors.items() if "layers.1." not in key})
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(stock(), adapter)
    with pytest.raises(AdapterError, match="its config names 2 linears that it has no tensors for"):
        check_fit(open_adapter(adapter), config=config_of(), shape=read_shape(base))


def test_patterns_that_match_nothing_are_found(adapter) -> None:
    opened = open_adapter(adapter)
    assert opened.config.unmatched_patterns(opened.modules) == ["rank_pattern: k_proj"]


# Settings of a config beside an adapter


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_are_left_out_are_the_adapters(tmp_path, stock, base, kind) -> None:
    opened = open_adapter(made_by_peft(tmp_path, stock, KINDS[kind]))
    section, shape = LoraSection(), read_shape(base)
    check_fit(opened, config=config_of(section), shape=shape)
    taken = with_settings_of(config_of(section), opened).lora
    again = LoraSection.model_validate(taken.model_dump())  # as a run's config.yaml has them
    assert again == taken
    check_fit(opened, config=config_of(again), shape=shape)
    num_elements = sum(math.prod(half.shape) for pair in opened.pairs.values() for half in pair)
    assert shape.trained_weights(taken) == num_elements


def test_settings_of_an_adapter_are_as_short_as_they_can_be(tmp_path, stock) -> None:
    def settings(name: str) -> dict[str, Any]:
        return settings_of(open_adapter(made_by_peft(tmp_path / name, stock, KINDS[name])))

    found = settings("all-linear")
    assert (found["rank"], found["alpha"], found["targets"], found["modules"]) == (4, 8, "all", None)
    assert settings("gate")["layers"] == "all"
    found = settings("rsLoRA")
    assert (found["rank"], found["alpha"], found["modules"]) == (9, pytest.approx(24), None)
    assert settings("one layer")["layers"] == [1]
    assert [(m.rank, m.alpha) for m in settings("rank and alpha patterns")["modules"]] == [
        (4, 8),
        (4, 8),
        (8, 64),
        (4, 64),
    ]
    assert [module.name for module in settings("full names")["modules"]] == [Q, V, UP]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 16}, "lora.rank: 16 in the config, 9 in the adapter\n"),
        ({"alpha": 8.0}, "lora.alpha: 8 in the config, 24 in the adapter (lora_alpha 8 with rsLoRA, a scale of 2.66667)\n"),
        ({"targets": ["q_proj"]}, "lora.targets: q_proj in the config, q_proj down_proj in the adapter\n"),
        ({"layers": [1]}, "lora.layers: 1 in the config, 0-1 in the adapter\n"),
        ({"modules": [{"name": Q, "rank": 9, "alpha": 24.0}]}, f"lora.modules: {Q.replace('self_attn.q', 'mlp.down')} has no adapter in the config, rank 9 and alpha 24 in the adapter (and 2 more)\n"),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_the_adapter_is_said_with_both_values(
    tmp_path, stock, base, settings, words
) -> None:
    opened = open_adapter(made_by_peft(tmp_path, stock, KINDS["rsLoRA"]))
    with pytest.raises(ConfigError) as raised:
        check_fit(opened, config=config_of(LoraSection(**settings)), shape=read_shape(base))
    assert f"is not the adapter that the config defines:\n  {words}Leave" in str(raised.value)


def test_an_adapter_of_another_size_is_said_in_numbers(adapter, base) -> None:
    shape = read_shape(base)
    with pytest.raises(ConfigError, match=r"q_proj is 64 x 32, its B A 64 x 64"):
        check_fit(open_adapter(adapter), config=config_of(), shape=dataclasses.replace(shape, hidden=32))
    with pytest.raises(ConfigError, match=r"it has layers 1, and the model has 0-0"):
        check_fit(open_adapter(adapter), config=config_of(), shape=dataclasses.replace(shape, num_layers=1))
