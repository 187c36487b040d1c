"""A tiny Guard learns three categories of its own; its table's numbers are those of transformers' logits, counted by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_lora.chat.command import prompt_kind
from dist_lora.config.guard import CATEGORIES, Category
from dist_lora.config.schema import Config
from dist_lora.data.guard import prompt_text
from dist_lora.data.guard_ids import encode_guard_prompt
from dist_lora.data.turns import Turn
from dist_lora.errors import ConfigError
from dist_lora.overview.command import look
from dist_lora.train.build import build, load_adapter, open_base
from dist_lora.train.command import evaluate
from dist_lora.train.guard import guard_rules, unsafe_prompts
from dist_lora.world.world import World
from tests.ranks.runs import exact, metrics, train_command
from tests.unit.evaluation.test_verdicts import by_hand

LETTERS = {"Queues": "Q", "Zebras": "Z", "Jokes": "J"}
TRAINED, HELD_OUT = range(48), range(48, 66)
NUM_STEPS, STOP_AT = 16, 2


def record(number: int) -> dict[str, Any]:
    """Most of a message is the letter of the category that it violates; each second one violates none."""
    generator = np.random.default_rng(number)
    name = [*LETTERS, None, None, None][number % 6]
    letters = generator.choice(list("aeiou" + 10 * LETTERS.get(name or "", "")), 40)
    turns = [{"role": "user", "content": "".join(letters)}]
    if number % 4 == 0:
        turns = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": turns[0]["content"]}]
    return {"messages": turns, **({"verdict": "unsafe", "violated": [name]} if name else {"verdict": "safe"})}


@pytest.fixture(scope="module")
def settings(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("guard")
    files = {"train": TRAINED, "eval": HELD_OUT}
    for name, numbers in files.items():
        (folder / name).with_suffix(".jsonl").write_text("\n".join(json.dumps(record(i)) for i in numbers))
    return {
        "run": "it",
        "model": {"name": str(tiny_llama("llama31")), "dtype": "fp32"},
        "lora": {"rank": 8},
        "data": {
            **{name: str(folder / f"{name}.jsonl") for name in files},
            "format": "guard",
            "guard_categories": list(LETTERS),
            "cache_dir": str(folder / "cache"),
        },
        "train": {
            **{"steps": NUM_STEPS, "global_batch": 8, "micro_batch": 4},
            **{"packing": False, "sequence_length": 700},
        },
        "optim": {"lr": 1e-2, "warmup_steps": 2, "schedule": "constant"},
        "log": {"trackers": [], "every": 100},
        "eval": {"every": 100},
    }


@pytest.fixture(scope="module")
def trained(ranks, settings, tmp_path_factory) -> Path:
    """The folder of the run on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    ranks(2).run(train_command, settings | {"runs_dir": str(folder)})
    return folder / "it"


def stopped_settings(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One step more than until the stop, without evaluations; the rate is constant."""
    config = settings | {"runs_dir": str(folder), "data": settings["data"] | {"eval": None}}
    return config | {"train": settings["train"] | {"steps": STOP_AT + 1}}


@pytest.fixture(scope="module")
def stopped(ranks, settings, tmp_path_factory) -> Path:
    """The folder of the runs, of one that was asked to stop on two ranks."""
    folder = tmp_path_factory.mktemp("stopped")
    said = ranks(2).run(train_command, stopped_settings(settings, folder), STOP_AT)
    assert all(text.startswith("interrupted by SIGUSR1") for text in said)
    return folder


def report_of(world: World, settings: dict[str, Any], adapter: Path) -> dict[str, Any]:
    return evaluate(Config.model_validate(settings), world, adapter=adapter)["guard"]


def held_out_turns() -> list[list[Turn]]:
    return [[Turn(turn["role"], turn["content"]) for turn in record(number)["messages"]] for number in HELD_OUT]


def found_unsafe(world: World, settings: dict[str, Any], adapter: Path) -> list[bool]:
    config = Config.model_validate(settings)
    base = open_base(config, world)
    trainee = build(config, base, world)
    load_adapter(trainee.adapters, adapter, world=world)
    rules = guard_rules(config, base, augments=False)
    assert rules is not None
    prompts = [
        encode_guard_prompt(turns, rules.categories, tokenizer=base.tokenizer, version=rules.version)
        for turns in held_out_turns()
    ]
    return unsafe_prompts(trainee, prompts, batch=4, world=world)


@torch.no_grad()
def margins_of(base: str, adapter: Path | None, conversations: list[list[Turn]]) -> list[float]:
    """By transformers and PEFT, the logit of unsafe less that of safe, a conversation after the other; a base alone is asked with
    Llama Guard 3's categories."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    categories = CATEGORIES["8b"] if adapter is None else [Category(name) for name in LETTERS]
    safe, unsafe = tokenizer("su", add_special_tokens=False).input_ids
    margins = []
    for turns in conversations:
        text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + prompt_text(
            turns, categories, version="8b"
        )
        text += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        logits = model(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1]
        margins.append(float(logits[unsafe] - logits[safe]))
    return margins


def assert_is_by_hand(report: dict[str, Any], margins: list[float]) -> None:
    """All numbers of a report are those of these margins."""
    violated = [record(number).get("violated", []) for number in HELD_OUT]
    wanted = by_hand([*map(bool, violated)], margins)
    assert {name: report[name] for name in wanted} == pytest.approx(wanted)
    assert list(report["by_category"]) == list(LETTERS)
    for name, scores in report["by_category"].items():
        pairs = [(name in names, m) for names, m in zip(violated, margins, strict=True) if not names or name in names]
        wanted = by_hand(*map(list, zip(*pairs, strict=True)))
        assert {key: scores[key] for key in wanted} == pytest.approx(wanted), name


@pytest.mark.slow
def test_three_categories_of_its_own_are_learned_and_the_table_is_that_of_peft(ranks, settings, trained) -> None:
    adapter = trained / "adapter"
    report, second = ranks(2).run(report_of, settings, adapter)
    assert report == second == report_of(World.alone(), settings, adapter)
    assert report["f1"] > 0.7 and report["average_precision"] > 0.9 and report["false_positive_rate"] < 0.2
    margins = margins_of(settings["model"]["name"], adapter, held_out_turns())
    assert_is_by_hand(report, margins)
    assert ranks(2).run(found_unsafe, settings, adapter) == [[margin > 0 for margin in margins]] * 2
    with pytest.raises(ConfigError, match="is a Guard's: it judges conversations"):
        prompt_kind(adapter, has_template=True)
    evaluations = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert (evaluations[-1]["step"], evaluations[-1]["eval_f1"]) == (NUM_STEPS, report["f1"])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "engine"), [(1, "none"), (3, "fsdp2"), (2, "zero3")])
def test_a_run_that_is_stopped_and_goes_on_elsewhere_has_the_samples_of_one_that_was_not(
    ranks, settings, trained, stopped, tmp_path, size, engine
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    config = stopped_settings(settings, tmp_path) | {"parallel": {"engine": engine}}
    assert ranks(size).run(train_command, config) == [""] * size
    found, wanted = exact(metrics(tmp_path / "it")), exact(metrics(trained))[: STOP_AT + 1]
    assert found[:STOP_AT] == wanted[:STOP_AT]
    assert found[STOP_AT] == pytest.approx(wanted[STOP_AT], rel=1e-5)


@pytest.mark.slow
def test_an_adapter_that_is_asked_with_other_categories_than_its_own_is_said(settings, trained, caplog) -> None:
    def told(categories: list[str]) -> list[str]:
        caplog.clear()
        data = settings["data"] | {"guard_categories": categories}
        report_of(World.alone(), settings | {"data": data}, trained / "adapter")
        return [text for text in caplog.messages if "was trained with the categories" in text]

    assert told([*LETTERS]) == []
    (warning,) = told([*LETTERS][::-1])
    assert "with the categories Queues, Zebras, Jokes, and is asked with Jokes, Zebras, Queues" in warning


@pytest.mark.slow
@pytest.mark.parametrize("is_alone", [False, True])
def test_data_says_which_samples_a_guard_finds_unsafe(settings, trained, capsys, is_alone) -> None:
    """Each message after those before it, as PEFT's logits say; an adapter's categories are read from its folder."""
    base, adapter = settings["model"]["name"], trained / "adapter"
    config = settings | {"data": settings["data"] | {"guard_categories": [*LETTERS][::-1]}}
    look(Config.model_validate(config), num_samples=0, as_json=True, guard=str(base if is_alone else adapter))
    told = json.loads(capsys.readouterr().out)["guard"]
    found: dict[str, set[str]] = {"user": set(), "assistant": set()}
    messages: list[tuple[int, list[Turn]]] = []
    for number in TRAINED:
        turns = [Turn(turn["role"], turn["content"]) for turn in record(number)["messages"]]
        messages += [(number, turns[: end + 1]) for end in range(len(turns))]
    margins = margins_of(base, None if is_alone else adapter, [turns for _, turns in messages])
    for (number, turns), margin in zip(messages, margins, strict=True):
        if margin > 0:
            found[turns[-1].role].add(f"{settings['data']['train']}:{number + 1}")
    unsafe = found["user"] | found["assistant"]
    assert 0 < len(unsafe) < len(TRAINED) or is_alone
    assert sorted(told.pop("where")) == sorted(unsafe)
    assert told == {
        "by": str(base if is_alone else adapter), "samples": len(TRAINED), "judged": len(TRAINED), "unsafe": len(unsafe),
        "unsafe_by_user": len(found["user"]), "unsafe_by_assistant": len(found["assistant"]), "too_long": 0, "without_text": 0,
    }  # fmt: skip
