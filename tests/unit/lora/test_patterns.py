"""Patterns of ranks and alphas and rsLoRA's scale, linear by linear as PEFT resolves them; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from dist_lora.config.schema import LoraSection
from dist_lora.errors import ConfigError
from dist_lora.lora.patterns import adapters_of, with_patterns

RANKS = {"down_proj": 6, r"layers\.1\..*": 2, r".*up_proj": 5}
ALPHAS = {"self_attn.q_proj": 3, r".*\.[kv]_proj": 5.5}


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
def test_each_linear_has_the_rank_and_the_scale_that_peft_gives_it(scaling) -> None:
    section = LoraSection.model_validate({"rank": 4, "alpha": 8, "scaling": scaling, "ranks": RANKS, "alphas": ALPHAS})
    found = adapters_of(with_patterns(section, num_layers=3), num_layers=3)
    assert len(found) == 3 * 7
    for name, module in found.items():
        rank = RANKS.get(get_pattern_key(RANKS, name), 4)
        alpha = ALPHAS.get(get_pattern_key(ALPHAS, name), 8)
        assert module.rank == rank
        assert module.scale == pytest.approx(alpha / (rank**0.5 if scaling == "sqrt_rank" else rank))


def test_alike_linears_need_no_list_and_what_is_plain_stays_as_it_is() -> None:
    plain = LoraSection(rank=16, alpha=32)
    assert with_patterns(plain, num_layers=2) is plain
    alike = with_patterns(LoraSection(rank=16, alpha=32, scaling="sqrt_rank"), num_layers=2)
    assert (alike.rank, alike.alpha, alike.modules, alike.scaling) == (16, 128, None, "rank")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ranks": {"dwn_proj": 3, "q_proj": 2}}, "lora.ranks: 'dwn_proj' matches none of the adapted linears; expected the end"),
        ({"alphas": {"k_proj": 3.0}, "targets": ["q_proj"]}, "lora.alphas: 'k_proj' matches none"),
        ({"ranks": {"(": 3}}, r"lora.ranks: '\(' is no regular expression"),
    ],
)  # fmt: skip
def test_patterns_without_an_effect_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_patterns(LoraSection.model_validate(settings), num_layers=2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ranks": {"q_proj": 0}}, "greater than or equal to 1"),
        ({"scaling": "sqrt"}, "'rank' or 'sqrt_rank'"),
        ({"modules": [{"name": "model.layers.0.self_attn.q_proj", "rank": 2, "alpha": 4}], "ranks": {"q_proj": 2}},
         "lora.modules is set, and names each linear's rank and alpha: leave lora.ranks out"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LoraSection.model_validate(settings)
