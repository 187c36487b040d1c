"""Which linears a publisher lists as unquantized is read as transformers reads it."""

from __future__ import annotations

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from dist_lora.herd.shape import Shape
from dist_lora.herd.skipped import skipped_linears
from tests.unit.herd.test_shape import config_of

NAMES = list(Shape.from_config(config_of(num_hidden_layers=12), where="x").linear_names())


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        (["lm_head"], 0),
        (["lm_head", "k_proj"], 12),
        (["model.layers.1"], 7),
        (["model.layers.1.mlp", "model.layers.11.self_attn.q_proj"], 4),
        ([r"model\.layers\.(0|2)\.mlp"], 6),
        (["model.layers.*.mlp.gate"], 0),
        (["model.layers.*.mlp"], 36),
        (["proj"], 84),
        ([], 0),
    ],
)
def test_a_listed_key_fits_the_names_that_it_fits_in_transformers(keys, count) -> None:
    config = {"quantization_config": {"llm_int8_skip_modules": keys}}
    skipped = skipped_linears(config, NAMES)
    assert skipped == {name for name in NAMES if not should_convert_module(name, keys)}
    assert len(skipped) == count


def test_keys_that_are_no_patterns_fit_nothing_and_take_no_time() -> None:
    config = {"quantization_config": {"llm_int8_skip_modules": ["(", "(m|mo)*(o|od)*x", 7, None]}}
    assert skipped_linears(config, NAMES) == frozenset()
    for other in (None, {}, {"llm_int8_skip_modules": None}, "nf4"):
        assert skipped_linears({"quantization_config": other}, NAMES) == frozenset()
