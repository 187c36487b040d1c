"""The file of published figures: every number is its source's own, and every run can be planned."""

from __future__ import annotations

from typing import Any

import pytest

from bench.published import Figure, name_of, read_figures
from dist_lora.text import GIB

FIGURES, SOURCES = read_figures()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.tree['source']} {name_of(figure)}")
def test_a_figure_is_in_its_sources_words(figure: Figure) -> None:
    tree = figure.tree
    assert SOURCES[tree["source"]]["where"] and SOURCES[tree["source"]]["setting"]
    assert tree["assumed"] and tree["other"]
    if "memory" in tree:
        assert tree["memory"].split()[0] in tree["quotation"] and tree["counts"] in ("tensors", "whole")
        assert figure.memory_gib > 0
    for name in ("tokens_per_s", "tokens_per_s_a_gpu"):
        if name in tree:
            assert str(tree[name]) in tree["quotation"].replace(",", "")
    assert "memory" in tree or "tokens_per_s" in tree or "tokens_per_s_a_gpu" in tree


def test_there_are_ten_that_were_measured_and_all_three_sizes() -> None:
    measured = [each for each in FIGURES if not each.tree.get("is_estimate")]
    assert len(measured) >= 10
    assert {size for each in measured for size in ("8b", "70b", "405b") if size in each.tree["config"]["model"]} == {
        "8b", "70b", "405b",
    }  # fmt: skip


def test_errors_are_the_plans_over_theirs() -> None:
    def figure(**tree: Any) -> Figure:
        plan = FIGURES[0].plan
        return Figure({"machines": {"gpus": 2}, "counts": "tensors", **tree}, plan)

    plan = FIGURES[0].plan
    assert figure(memory="1 GB").memory_error == pytest.approx(plan.memory.device / 1e9 - 1)
    assert figure(memory="1 GiB", counts="whole").memory_error == pytest.approx(plan.device_bytes / GIB - 1)
    slow, fast = plan.speed.tokens_per_s
    assert figure(tokens_per_s=(slow + fast) / 2).speed_error == 0
    assert figure(tokens_per_s=2 * fast).speed_error == pytest.approx(-0.5)
    assert figure(tokens_per_s_a_gpu=slow / 4).speed_error == pytest.approx(1.0)
