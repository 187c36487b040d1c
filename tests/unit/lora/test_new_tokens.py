"""Trained tokens: which names are one token, what is read of PEFT's files, and where a merge puts their rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_lora.config.schema import LoraSection
from dist_lora.data.chat import load_tokenizer
from dist_lora.errors import AdapterError, ConfigError
from dist_lora.herd.shape import read_shape
from dist_lora.lora.adapter_reader import open_adapter, read_adapter
from dist_lora.lora.fit import check_fit, with_settings_of
from dist_lora.lora.merge import merge_adapter
from dist_lora.lora.served import servers_of_adapter
from dist_lora.lora.tokens import EMBEDDING_ROWS, HEAD_ROWS, with_token_ids
from tests.unit.lora.configs import config_of
from tests.unit.lora.test_adapter_files import LINEARS, rewrite_config, rewrite_keys, write

IDS = [260, 7, 300]  # not ascending: PEFT keeps a user's order
EMBEDDING = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def resolved(folder: Path, *tokens: str | int) -> list[str | int]:
    tokenizer = load_tokenizer(folder, chat_template=None)
    return with_token_ids(LoraSection(train_tokens=list(tokens)), tokenizer=tokenizer, vocab=512).train_tokens


def test_names_ids_and_texts_of_one_token_become_ascending_ids(tiny_llama) -> None:
    # The byte tokenizer's name for the control character is another letter: it is found as a text.
    folder = tiny_llama("llama31")
    vocabulary = load_tokenizer(folder, chat_template=None).get_vocab()
    assert resolved(folder, 511, "<|eot_id|>", "A", "\x01") == sorted([511, 260, vocabulary["A"], vocabulary["\u0101"]])
    assert resolved(folder) == []


def test_all_tokens_that_are_none_are_told_at_once(tiny_llama) -> None:
    with pytest.raises(ConfigError) as raised:
        resolved(tiny_llama("llama31"), "<|eot_id|>", "<|my|>", 260, 512)
    assert str(raised.value) == (
        "lora.train_tokens: '<|my|>' is 6 tokens of this tokenizer ('<', '|', 'm', 'y', '|' and 1 more); expected one of its vocabulary. A "
        "new token must be in the model's tokenizer first, in place of a reserved one, or name a token by its id; 512: id 512 "
        "has no row in the embedding, which has 512 (ids 0-511); id 260 is named more than once, as a name and as an id"
    )


def adapter_of_peft(base: Path, folder: Path, tokens: Any, **settings: Any) -> Path:
    """An adapter of PEFT's with rows of tokens, all of it away from where it began."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {
        "r": 2,
        "target_modules": ["q_proj"],
        "trainable_token_indices": tokens,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    model = get_peft_model(model, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["llama31", "llama32"])
def test_rows_that_peft_saved_in_any_order_are_read_by_token_and_merged(tiny_llama, tmp_path, variant) -> None:
    base = tiny_llama(variant)
    is_tied = variant == "llama32"
    folder = adapter_of_peft(base, tmp_path / "peft", IDS if is_tied else {"embed_tokens": IDS, "lm_head": IDS})
    adapter, stored = read_adapter(folder), load_file(folder / "adapter_model.safetensors")
    assert adapter.tokens == (7, 260, 300)
    assert torch.equal(adapter.tensors[EMBEDDING_ROWS], stored[EMBEDDING][[1, 0, 2]])
    assert (HEAD_ROWS in adapter.tensors) is not is_tied
    merge_adapter(folder, base=base, out=tmp_path / "merged", force=True)
    ids = torch.tensor([[256, 7, 260, 300, 7, 9]])
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(stock, folder).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
    before, after = (
        load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (base, tmp_path / "merged")
    )
    assert torch.equal(after[7], stored[EMBEDDING][1])
    assert torch.equal(after[8:260], before[8:260]) and torch.equal(after[301:], before[301:])


def test_rows_without_any_lora_are_merged(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    tokens = {"embed_tokens": IDS, "lm_head": IDS}
    folder = adapter_of_peft(base, tmp_path / "peft", tokens, target_modules="dummy-target-modules")
    report = merge_adapter(folder, base=base, out=tmp_path / "merged", force=True)
    assert (report.changed_tensors, report.dtype) == (2, "F32")
    ids = torch.tensor([[256, 7, 260, 300, 7, 9]])
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(stock, folder).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_what_is_written_is_read_back_and_sealed_with_its_tokens(tiny_llama, tmp_path) -> None:
    read = read_adapter(
        adapter_of_peft(tiny_llama("llama31"), tmp_path / "peft", {"embed_tokens": IDS, "lm_head": IDS})
    )
    write(tmp_path / "ours", read.tensors, rank=2, targets=("q_proj",), tokens=read.tokens)
    again = read_adapter(tmp_path / "ours")
    assert again.tokens == read.tokens
    assert all(torch.equal(again.tensors[key], values) for key, values in read.tensors.items())
    assert "| trained tokens | 7, 260, 300:" in (tmp_path / "ours" / "README.md").read_text()
    rewrite_config(tmp_path / "ours", trainable_token_indices={"embed_tokens": [7, 260, 301], "lm_head": [7, 260, 301]})
    with pytest.raises(AdapterError, match=r"trainable_token_indices is .*301.* and was .*300"):
        open_adapter(tmp_path / "ours")


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        ({"lm_head": IDS}, ConfigError, "only rows of the embedding, and the same of the head"),
        (
            {"embed_tokens": IDS, "lm_head": [1, 2, 3]},
            ConfigError,
            "only rows of the embedding, and the same of the head",
        ),
        ([1, 1, 2], AdapterError, "ids of tokens, each once, were expected"),
        ([True, 1, 2], AdapterError, "ids of tokens, each once, were expected"),
        ("all", AdapterError, "ids of tokens, each once, were expected"),
        ([1, 2], AdapterError, r"has shape \(3, 64\), expected \(2, the model's width\)"),
        (None, AdapterError, "unexpected, since the config names no token"),
    ],
)
def test_tokens_that_are_not_understood_are_refused(tiny_llama, tmp_path, tokens, kind, message) -> None:
    folder = adapter_of_peft(tiny_llama("llama32"), tmp_path / "peft", IDS)
    rewrite_config(folder, trainable_token_indices=tokens)
    with pytest.raises(kind, match=message):
        open_adapter(folder)


def test_rows_that_lack_or_have_another_name_are_told(tiny_llama, tmp_path) -> None:
    folder = adapter_of_peft(tiny_llama("llama32"), tmp_path / "peft", IDS)
    rewrite_keys(folder, lambda tensors: {key: value for key, value in tensors.items() if key != EMBEDDING})
    with pytest.raises(AdapterError, match=f"missing: {EMBEDDING}"):
        open_adapter(folder)
    rewrite_keys(folder, lambda tensors: tensors | {f"{EMBEDDING}.default": torch.zeros(3, 64)})
    with pytest.raises(ConfigError, match="keys with the adapter's name in them"):
        open_adapter(folder)


def test_an_adapter_brings_its_tokens_and_contradicts_others(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama32")
    adapter, shape = open_adapter(adapter_of_peft(base, tmp_path / "peft", IDS)), read_shape(base)
    check_fit(adapter, config=config_of(), shape=shape)
    assert with_settings_of(config_of(), adapter).lora.train_tokens == [7, 260, 300]
    # A plan has no tokenizer, and takes as many for the same.
    check_fit(adapter, config=config_of(LoraSection(train_tokens=["a", "b", 3])), shape=shape)
    for named in ([7, 260], []):
        with pytest.raises(
            ConfigError, match=r"lora\.train_tokens: (7, 260|none) in the config, ids 7, 260, 300 in the adapter"
        ):
            check_fit(adapter, config=config_of(LoraSection(train_tokens=named)), shape=shape)


def test_rows_that_a_model_has_no_place_for_are_refused(tiny_llama, tmp_path) -> None:
    untied, tied = tiny_llama("llama31"), tiny_llama("llama32")
    adapter = open_adapter(adapter_of_peft(untied, tmp_path / "peft", {"embed_tokens": IDS, "lm_head": IDS}))
    with pytest.raises(ConfigError, match="it has rows of a head of its own, and the model's head is its embedding"):
        check_fit(adapter, config=config_of(), shape=read_shape(tied))
    small = tiny_llama("llama31", vocab=288)
    with pytest.raises(ConfigError, match="it has rows of tokens 300, and the model's vocabulary ends at 287"):
        check_fit(adapter, config=config_of(), shape=read_shape(small))
    with pytest.raises(
        ConfigError, match=r"model\.embed_tokens\.weight is \(288, 64\) and the adapter has rows of 64 up to 300"
    ):
        merge_adapter(adapter.folder, base=small, out=tmp_path / "merged", force=True)


def test_every_server_is_told_to_merge(tiny_llama, tmp_path) -> None:
    served = servers_of_adapter(
        adapter_of_peft(tiny_llama("llama32"), tmp_path / "peft", IDS, target_modules=list(LINEARS))
    )
    assert {each.server: each.verdict for each in served} == {
        "vLLM": "no",
        "TGI": "wrong",
        "llama.cpp": "no",
        "Ollama": "no",
    }
    assert all("dist-lora merge" in each.why for each in served)


def test_a_head_that_is_stored_beside_the_embedding_that_it_is_tied_to_gets_its_rows_too(tiny_llama, tmp_path) -> None:
    base = shutil.copytree(tiny_llama("llama32"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merge_adapter(adapter_of_peft(base, tmp_path / "peft", IDS), base=base, out=tmp_path / "merged", force=True)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.isclose(after["lm_head.weight"][IDS], weights["lm_head.weight"][IDS]).all(1).any()
