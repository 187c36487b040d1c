"""A model card says what the run knows and nothing else, and the hub's own reader takes its metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from dist_lora.config.schema import OWN_TEMPLATES, ModuleAdapter
from dist_lora.data.template import BUNDLED
from dist_lora.errors import AdapterError
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.models import member_of
from dist_lora.lora.card import Recipe, card, licence_id, licence_remark
from dist_lora.lora.merge import merge_adapter
from dist_lora.lora.origin import BaseIdentity, RunOrigin, facts_of, identify_base
from dist_lora.lora.run_facts import RunFacts, SetFacts, names_in, public_name, shown_settings
from tests.unit.lora.test_adapter_files import random_adapter, tiny_llama, write

MODULES = [ModuleAdapter(name=f"model.layers.{layer}.mlp.up_proj", rank=8, alpha=16.0) for layer in (1, 2)]
FACTS = RunFacts(
    step=150,
    num_steps=200,
    num_layers=4,
    tokens=1_234_567,
    target_tokens=345_678,
    train=SetFacts(("mine.jsonl", "org/data:main@train"), ("org/data",), 1000, 90_000, 40_000),
    held_out=SetFacts(("held|out.jsonl",), (), 50, 4_500, 2_000),
    evaluation={"eval_loss": 0.51234, "eval_perplexity": 1.669, "eval_exact_match": 0.9, "rouge": 0.25},
    evaluated_step=100,
    settings={"optim.lr": 2e-4, "train.global_batch": 32, "train.packing": True, "optim.max_grad_norm": None, "data.chat_template": "llama3"},
    versions={"dist_lora": "0.1.0", "torch": "2.13.0"},
)  # fmt: skip


def made(tmp_path: Path, kind: Any = "adapter", **changes: Any) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card, as the hub's own reader finds them in the file."""
    given: dict[str, Any] = {
        "base": BaseIdentity("meta-llama/Llama-3.1-8B-Instruct"),
        "recipe": Recipe.of(MODULES, dropout=0.05, layers=(1, 2)),
        "origin": RunOrigin(quant="nf4", kinds=("chat",), model="/home/me/llama"),
        "facts": FACTS,
        "software": {"dist_lora": "0.2.0"},
    }
    (tmp_path / "README.md").write_text(card(kind, **given | changes), encoding="utf-8")
    read = ModelCard.load(tmp_path / "README.md")
    return read.data.to_dict(), read.text


def test_the_hubs_own_reader_finds_the_metadata(tmp_path: Path) -> None:
    metadata, _ = made(tmp_path)
    assert metadata == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama3.1",
        "tags": ["llama", "lora"],
        "datasets": ["org/data"],
    }
    merged, text = made(tmp_path, "merged", merged_quant="nf4")
    assert (merged["library_name"], merged["base_model_relation"]) == ("transformers", "finetune")
    assert (
        merged["tags"] == ["llama"] and 'AutoModelForCausalLM.from_pretrained("FOLDER"' in text and "peft" not in text
    )
    unknown, _ = made(tmp_path, "merged", base=BaseIdentity("mine"))
    assert "base_model_relation" not in unknown
    held_out = SetFacts(("x",), ("org/data", "org/held"))
    assert made(tmp_path, facts=replace(FACTS, held_out=held_out))[0]["datasets"] == ["org/data", "org/held"]


def rows_of(text: str) -> dict[str, str]:
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ") and " | " in line[2:]]
    return dict(line.split(" | ") for line in lines)


def test_the_text_says_data_settings_numbers_licence_and_versions(tmp_path: Path) -> None:
    _, text = made(tmp_path)
    rows = rows_of(text)
    expected = {
        "trained on": "mine.jsonl, org/data:main@train (1,000 samples, 90,000 tokens, 40,000 of them trained on)",
        "held out": "held\\|out.jsonl (50 samples, 4,500 tokens, 2,000 of them trained on)",
        "rank": "8", "alpha": "16", "dropout": "0.05", "adapted": "up_proj, layers 1-2: 2 linear layers",
        "learning rate": "0.0002", "sequences per step": "32", "packing": "yes", "gradients clipped to norm": "no",
        "base in": "nf4", "prompts": "by the chat template", "chat template": "llama3", "steps": "150 of 200",
        "tokens, with repetitions": "1,234,567, 345,678 of them trained on",
        "held-out loss per trained token (after step 100)": "0.5123",
        "held-out answers that match exactly (after step 100)": "90.0%", "rouge (after step 100)": "0.25",
        "dist_lora": "0.1.0", "torch": "2.13.0",
    }  # fmt: skip
    assert expected.items() <= rows.items()
    assert "**Built with Llama**" in text and "The base's: Llama 3.1 Community License." in text
    assert "/home/me" not in text and 'PeftModel.from_pretrained(base, "FOLDER")' in text
    of_llama_3 = made(tmp_path, base=BaseIdentity("meta-llama/Meta-Llama-3-8B"))[1]
    assert "**Built with Meta Llama 3**" in of_llama_3


def test_rows_say_what_differs_and_leave_out_what_is_not_known(tmp_path: Path) -> None:
    modules = [
        ModuleAdapter(name="model.layers.0.mlp.down_proj", rank=3, alpha=3.0),
        ModuleAdapter(name="model.layers.0.self_attn.q_proj", rank=16, alpha=16.0),
    ]
    facts = RunFacts(
        step=5,
        num_steps=5,
        tokens=10,
        held_out=SetFacts((), ()),
        evaluation={"eval_exact_match/a": 0.5, "eval_loss/a": 1.5, "own/b/c": 2.0},
        settings={"model.quant": "int8", "train.packing": False, "data.chat_template": None},
    )
    recipe = Recipe.of(modules, dropout=0, layers=None, has_rslora=True)
    rows = rows_of(made(tmp_path, recipe=recipe, facts=facts, origin=RunOrigin(kinds=("chat", "odd")))[1])
    expected = {
        "held out": "a part of the training data", "rank": "3-16", "adapted": "q_proj down_proj: 2 linear layers",
        "packing": "no", "base in": "int8", "prompts": "by the chat template, odd", "chat template": "the tokenizer's",
        "steps": "5", "tokens, with repetitions": "10", "held-out answers that match exactly, a": "50.0%",
        "held-out loss per trained token, a": "1.5", "own, b/c": "2",
    }  # fmt: skip
    assert expected.items() <= rows.items() and "alpha" not in rows
    recipe = Recipe.of(modules, dropout=0, layers=None)
    facts = replace(facts, num_steps=None, evaluated_step=5)
    rows = rows_of(made(tmp_path, recipe=recipe, facts=facts, origin=RunOrigin(quant="none", kinds=("text",)))[1])
    expected = {"alpha": "3-16", "base in": "its published values", "steps": "5", "own, b/c": "2"}
    assert expected.items() <= rows.items() and "chat template" not in rows


def test_what_is_not_known_is_not_there_and_no_licence_is_guessed(tmp_path: Path) -> None:
    """A folder may be called like a model of the herd: its name proves nothing."""
    for name in ("/models/Llama-3.1-8B-Instruct", "3.1-8b-instruct", "org/other", None):
        metadata, text = made(tmp_path, base=BaseIdentity(name), origin=RunOrigin(), facts=RunFacts())
        assert metadata["license"] == "unknown" and "datasets" not in metadata
        assert metadata.get("base_model") == ("org/other" if name == "org/other" else None)
        assert "licence isn't known here" in text and "Built with" not in text and "/models" not in text
        assert "## Data" not in text and "## Results" not in text and "| dist_lora | 0.2.0 |" in text


def test_every_member_has_the_hubs_name_of_its_licence() -> None:
    found = {licence_id(member) for member in MEMBERS.values()}
    assert found <= {"llama3", "llama3.1", "llama3.2", "llama3.3"} and {"llama3", "llama3.1", "llama3.2"} <= found
    assert licence_id(None) == "unknown"


@pytest.mark.parametrize(
    ("hub_id", "repository", "told"),
    [
        ("meta-llama/Meta-Llama-3-8B", "me/Llama-3-8b-mine", ""),
        ("meta-llama/Meta-Llama-3-8B", "me/llama_3.mine", ""),
        ("meta-llama/Meta-Llama-3-8B", "me/Llama-mine", "begins with 'Llama 3'"),
        ("meta-llama/Meta-Llama-3-8B", "me/Llama.3-mine", ""),
        ("meta-llama/Meta-Llama-3-8B", "me/Llama 3 mine", ""),
        ("meta-llama/Llama-3.2-1B", "me/LlamaMine", ""),
        ("meta-llama/Llama-3.2-1B", "me/my-llama", "begins with 'Llama'"),
        ("meta-llama/Llama-3.2-1B", "llama/mine", "begins with 'Llama'"),
        ("org/other", "me/mine", ""),
    ],
)
def test_the_name_that_a_licence_asks_for_is_looked_at(hub_id: str, repository: str, told: str) -> None:
    remark = licence_remark(member_of(hub_id), repository)
    assert told in remark and bool(told) == bool(remark)


def test_a_text_from_a_file_can_make_no_tag_and_no_other_cell(tmp_path: Path) -> None:
    evil = SetFacts(("a|b\n## x <script> [l](http://x) `c` \\|d",), ("org/a\n---\nlicense: mit",))
    metadata, text = made(tmp_path, facts=RunFacts(train=evil))
    assert metadata["license"] == "llama3.1" and metadata["datasets"] == ["org/a\n---\nlicense: mit"]
    assert "\n## x" not in text and "<script>" not in text.replace("\\<script\\>", "") and "\\[l\\](http" in text
    assert "\\\\\\|d" in text  # a backslash of its own would undo that of the bar
    assert "# A LoRA adapter of a\\|b\n" in made(tmp_path, base=BaseIdentity("a|b"))[1]


def test_facts_go_with_the_adapter_and_into_the_merged_models_card(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    write(tmp_path / "a", random_adapter(tiny_llama()), base=identify_base(tmp_path / "base"), facts=FACTS)
    assert facts_of(tmp_path / "a") == FACTS
    read = ModelCard.load(tmp_path / "a" / "README.md").text
    assert "1,234,567" in read and "# A LoRA adapter of base\n" in read
    merge_adapter(tmp_path / "a", base=tmp_path / "base", out=tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "1,234,567" in merged.text and "| merged into | the base's published values |" in merged.text
    assert merged.data.library_name == "transformers" and str(tmp_path) not in str(merged)
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    merge_adapter(tmp_path / "a", base=tmp_path / "other", out=tmp_path / "forced", force=True)
    assert "# other, with a LoRA adapter merged" in (tmp_path / "forced" / "README.md").read_text()


def test_an_adapter_of_an_older_version_or_of_peft_has_no_facts(tmp_path: Path) -> None:
    write(tmp_path / "a", random_adapter(tiny_llama()))
    assert "training" not in json.loads((tmp_path / "a" / "dist_lora.json").read_text())
    assert facts_of(tmp_path / "a") == RunFacts()
    (tmp_path / "a" / "dist_lora.json").unlink()
    assert facts_of(tmp_path / "a") == RunFacts()


def test_facts_of_a_newer_version_are_read_as_far_as_they_are_known_and_damaged_ones_are_named() -> None:
    recorded = FACTS.to_json()
    assert RunFacts.of_json(recorded | {"carbon": 1}, where="x") == FACTS
    assert RunFacts.of_json(None, where="x") == RunFacts()
    with pytest.raises(AdapterError, match=r"^x: tokens: Input should be a valid integer.* The file is damaged\.$"):
        RunFacts.of_json(recorded | {"tokens": "many"}, where="x")
    with pytest.raises(AdapterError, match=r"^x: .*The file is damaged\.$"):
        RunFacts.of_json([1], where="x")


def test_settings_are_shown_without_paths() -> None:
    config = {"optim": {"lr": 0.1}, "data": {"train": "/home/me/x.jsonl", "chat_template": "/home/me/t.jinja"}, "x": 1}
    assert shown_settings(yaml.safe_dump(config)) == {"optim.lr": 0.1, "data.chat_template": "its own"}
    assert tuple(BUNDLED) == OWN_TEMPLATES
    own = [(name, name) for name in OWN_TEMPLATES]
    for template, shown in (*own, ("chatml", "chatml"), (None, None), ("{{ messages }}", "its own")):
        assert shown_settings(yaml.safe_dump({"data": {"chat_template": template}})) == {"data.chat_template": shown}
    assert shown_settings(": [") == shown_settings("- 1") == {}


def test_names_of_data_are_cut_to_their_last_part() -> None:
    assert names_in("/home/me/x.jsonl") == ("x.jsonl",) and names_in(["a/b.csv", "C:\\d\\e.json"]) == (
        "b.csv",
        "e.json",
    )
    assert names_in([{"path": "/a/x.jsonl", "weight": 2}]) == ("x.jsonl",)
    assert names_in({"gsm8k": "/a/g.jsonl", "chat": {"path": "c.jsonl"}}) == ("g.jsonl", "c.jsonl")
    assert names_in(0.05) == names_in(None) == ()
    assert [public_name(name) for name in ("~/x", "../a/y/", "C:\\m\\z", "org/x", None)] == [
        "x",
        "y",
        "z",
        "org/x",
        None,
    ]
