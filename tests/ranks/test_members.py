"""Every member of the herd trains on two ranks, and PEFT on transformers' model of its folder answers as our own does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dist_lora.base.attention import Documents
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.config.schema import Config
from dist_lora.data.chat import encode_sample, load_tokenizer
from dist_lora.data.records import Format
from dist_lora.evaluation.generate import stop_ids_of
from dist_lora.herd.members import MEMBERS, Member
from dist_lora.herd.shape import read_shape
from dist_lora.plan.presets import presets
from dist_lora.train.build import load_adapter
from dist_lora.world.world import World
from tests.ranks.members import Makers, tiny_shape, write_samples
from tests.ranks.runs import exact, metrics, train_command
from tests.ranks.tiny import trainee_of

NUM_STEPS = 3
TOKENS = 600  # so many that RoPE's slow frequencies, those that are scaled, turn a good way
LAST = 16  # logits are compared for so many of them
CLOSE = 1e-4
ROPE_OF_3 = {"rope_type": "default", "rope_theta": 500_000.0}
# One for each configuration, among them a base, an Instruct and a Guard: the others differ from theirs in the ids of stops
# alone, which no training reads.
FIRST = ("3-8b", "3-70b-instruct", "guard-3-8b", "3.1-70b", "3.1-405b-instruct", "3.2-1b", "3.2-3b")
EACH_TIME = ("3-8b", "3.2-1b")  # RoPE plain and scaled, a head of its own and a tied one


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    if name in EACH_TIME:
        return [pytest.mark.slow]
    return [pytest.mark.turn(of=3, among="configurations") if name in FIRST else pytest.mark.turn(of=8)]


@pytest.fixture(scope="module")
def makers(tmp_path_factory) -> Makers:
    return Makers(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def tokenizers() -> Callable[[Path, str | None], PreTrainedTokenizerBase]:
    """The tokenizer of a folder with a template; of the same file, which members share, loaded once."""
    loaded: dict[tuple[int, str | None], PreTrainedTokenizerBase] = {}

    def load(folder: Path, template: str | None) -> PreTrainedTokenizerBase:
        key = (folder / "tokenizer.json").stat().st_ino, template
        if key not in loaded:
            loaded[key] = load_tokenizer(folder, chat_template=template)
        return loaded[key]

    return load


def settings_of(member: Member, folder: Path, work: Path) -> dict[str, Any]:
    """The member's own config for several GPUs, made as small as its model, for three steps in fp32."""
    preset = next(
        each
        for each in presets().values()
        if each.member is member and each.method == "lora" and each.machine.num_gpus > 1
    )
    tree = preset.config.model_dump(mode="json")
    tree |= {"runs_dir": str(work / "runs"), "log": {"trackers": []}}
    tree["model"] |= {"name": str(folder), "dtype": "fp32"}
    tree["data"] |= {"train": str(work / "train.jsonl"), "eval": None, "cache_dir": str(work / "cache")}
    tree["data"]["chat_template"] = "llama3" if member.is_finetuned and not member.guard else None
    length = 512 if member.guard else 128  # a Guard's prompt lists its categories
    tree["train"] |= {
        "epochs": None,
        "steps": NUM_STEPS,
        "global_batch": 4,
        "micro_batch": 1,
        "sequence_length": length,
    }
    tree["optim"] |= {"lr": 5e-3, "warmup_steps": 0}
    return tree


def logits_of_transformers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the last tokens."""
    with torch.no_grad():
        return model(ids[None], logits_to_keep=LAST).logits[0]


def our_logits(settings: dict[str, Any], adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the last tokens, by our own model in one process, with the adapter."""
    world = World.alone()
    trainee = trainee_of(Config.model_validate(settings | {"parallel": {"engine": "none"}}), world)
    load_adapter(trainee.adapters, adapter, world=world)
    count = len(ids)
    with torch.no_grad():
        return trainee.model(
            ids,
            positions=torch.arange(count),
            attention=Documents((0, count), trainee.attention),
            rows=torch.arange(count - LAST, count),
        )


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in MEMBERS])
def test_a_member_trains_on_two_ranks_and_peft_answers_as_our_model_does(ranks, makers, tmp_path, name) -> None:
    member = MEMBERS[name]
    folder = makers.folder(member)
    write_samples(member, tmp_path / "train.jsonl")
    settings = settings_of(member, folder, tmp_path)
    assert ranks(2).run(train_command, settings) == ["", ""]

    run = tmp_path / "runs" / settings["run"]
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(value) for line in exact(lines) for value in line)
    adapter = tmp_path / "gathered"
    gather_adapter(run / "checkpoints" / f"step-{NUM_STEPS:08d}", out=adapter)
    weights = "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() == (run / "adapter" / weights).read_bytes()

    ids = torch.randint(0, 128_000, (TOKENS,), generator=torch.Generator().manual_seed(1))
    base = AutoModelForCausalLM.from_pretrained(folder)
    untrained = logits_of_transformers(base, ids)
    wanted = logits_of_transformers(PeftModel.from_pretrained(base, adapter), ids)
    found = our_logits(settings, adapter, ids)
    size = wanted.std()
    assert (found - wanted).abs().max() < CLOSE * size
    assert (found - untrained).abs().max() > 1000 * CLOSE * size, "the adapter does nothing"
    if member.shape.rope_scaling is not None:
        unscaled = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=ROPE_OF_3)
        without = logits_of_transformers(PeftModel.from_pretrained(unscaled, adapter), ids)
        assert (found - without).abs().max() > 100 * CLOSE * size, "RoPE's scaling does nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_a_tiny_member_is_its_member_but_for_the_sizes_that_are_said(makers, name) -> None:
    full, tiny = MEMBERS[name].shape, read_shape(makers.folder(MEMBERS[name]))
    sizes = ("hidden", "ffn", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    assert dataclasses.replace(tiny, **{size: getattr(full, size) for size in sizes}) == full
    assert tiny == tiny_shape(full)
    for a, b in (("num_heads", "num_kv_heads"), ("ffn", "hidden")):
        assert getattr(tiny, a) / getattr(tiny, b) == getattr(full, a) / getattr(full, b)
    assert tiny.head_dim * tiny.num_heads == tiny.hidden and full.head_dim * full.num_heads == full.hidden


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_has_the_configuration_of_one_of_the_first(makers, name) -> None:
    found = {}
    for each in (name, *FIRST):
        config = json.loads((makers.folder(MEMBERS[each]) / "config.json").read_text())
        found[each] = {setting: value for setting, value in config.items() if setting != "eos_token_id"}
    assert [first for first in FIRST if found[first] == found[name]], name


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_a_tiny_member_reads_and_writes_the_special_tokens_of_its_member(makers, tokenizers, name) -> None:
    member, folder = MEMBERS[name], makers.folder(MEMBERS[name])
    tokenizer, tokens = tokenizers(folder, "llama3" if member.is_finetuned else None), member.tokens
    assert len(tokenizer) == member.shape.vocab == 128_256
    names = {
        "<|begin_of_text|>": tokens.begin_of_text,
        "<|end_of_text|>": tokens.end_of_text,
        "<|start_header_id|>": tokens.start_header,
        "<|end_header_id|>": tokens.end_header,
        "<|eot_id|>": tokens.end_of_turn,
        "<|eom_id|>": tokens.end_of_message,
        "<|finetune_right_pad_id|>": tokens.pad,
    }
    vocabulary = tokenizer.get_vocab()
    assert {token: vocabulary.get(token) for token in names} == names
    assert stop_ids_of(folder, tokenizer) >= set(tokens.stop)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    fmt: Format = "messages" if member.is_finetuned else "text"
    record = {"messages": turns} if member.is_finetuned else {"text": "Hello"}
    encoded = encode_sample(record, tokenizer=tokenizer, fmt=fmt, train_on="assistant")
    assert encoded.ids[0] == tokens.begin_of_text and encoded.is_target[-1]
    assert encoded.ids[-1] == (tokens.end_of_turn if member.is_finetuned else tokens.end_of_text)
