"""A config's rules for a Guard's samples, and the samples that a fraction holds out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dist_lora.config.guard import CATEGORIES, Category
from dist_lora.config.schema import Config
from dist_lora.data.guard import GuardRules
from dist_lora.evaluation.guard import read_verdicts
from dist_lora.train.build import open_base
from dist_lora.train.command import held_out_of, tokens_of
from dist_lora.train.guard import guard_rules
from dist_lora.world.world import World
from tests.ranks.tiny import config_of


@pytest.mark.parametrize(
    ("data", "hidden", "wanted"),
    [
        ({}, 4096, GuardRules("8b", CATEGORIES["8b"], ("drop", "shuffle"), seed=3)),
        ({}, 2048, GuardRules("1b", CATEGORIES["1b"], ("drop", "shuffle"), seed=3)),
        ({}, 3072, GuardRules("8b", CATEGORIES["8b"], ("drop", "shuffle"), seed=3)),
        ({"guard_version": "8b", "guard_augment": ["drop"]}, 2048, GuardRules("8b", CATEGORIES["8b"], ("drop",), seed=3)),
        ({"guard_categories": ["A"], "guard_augment": []}, 4096, GuardRules("8b", (Category("A"),))),
    ],
)  # fmt: skip
def test_rules_go_by_the_model_and_the_seed_is_a_part_of_them_where_something_is_drawn(data, hidden, wanted) -> None:
    tree = {"train": "a", "format": "guard", **data}
    config = Config.model_validate({"run": "a", "model": {"name": "x"}, "data": tree, "train": {"seed": 3}})
    base = SimpleNamespace(shape=SimpleNamespace(hidden=hidden))
    assert guard_rules(config, base, augments=True) == wanted
    assert guard_rules(config, base, augments=False) == GuardRules(wanted.version, wanted.categories)
    assert guard_rules(config_of("x"), base, augments=True) is None


def test_a_fraction_holds_out_samples_in_one_form_each(tiny_llama, tmp_path) -> None:
    records = [{"prompt": f"a{i}", "verdict": "unsafe", "violated": ["A"]} for i in range(6)]
    records += [{"prompt": f"b{i}", "verdict": "safe"} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = {"train": str(tmp_path / "d.jsonl"), "eval": 0.25, "format": "guard", "guard_categories": ["A", "B"]}
    config = config_of(tiny_llama("llama31"), data={**data, "cache_dir": str(tmp_path / "cache")})
    base, world = open_base(config, World.alone()), World.alone()
    train, sets = tokens_of(config, base, world)
    held_out = sets[""]
    assert (len(train), len(held_out)) == (18, 3)
    assert not {*train.sample_ids.tolist()} & {*held_out.sample_ids.tolist()}
    samples = read_verdicts(held_out, tokenizer=base.tokenizer).samples
    assert {sample.categories for sample in samples} == {("A", "B")}  # in their order
    assert held_out_of(config, base, world)[""].sample_ids.tolist() == held_out.sample_ids.tolist()
