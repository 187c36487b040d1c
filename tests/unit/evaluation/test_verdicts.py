"""A Guard's scores, beside counts made one by one and scikit-learn's published example."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dist_lora.cli import _as_table
from dist_lora.data.guard import GuardRules
from dist_lora.data.guard_ids import first_ids
from dist_lora.data.token_cache import TokenRules
from dist_lora.errors import DataError
from dist_lora.evaluation.guard import read_verdicts
from dist_lora.evaluation.verdicts import Sample, guard_report, guard_table, scores_of
from tests.unit.data.test_guard import FOUR
from tests.unit.data.test_token_cache import byte_tokenizer, prepare, write


def by_hand(is_unsafe: list[bool], margins: list[float]) -> dict[str, float]:
    """The scores by their definitions, a threshold after the other."""
    pairs = list(zip(is_unsafe, margins, strict=True))
    hits = sum(true and margin > 0 for true, margin in pairs)
    found = sum(margin > 0 for _, margin in pairs)
    area, recall_before = 0.0, 0.0
    for threshold in sorted({*margins}, reverse=True):
        above = [true for true, margin in pairs if margin >= threshold]
        recall = sum(above) / sum(is_unsafe)
        area += (recall - recall_before) * sum(above) / len(above)
        recall_before = recall
    precision, recall = hits / found, hits / sum(is_unsafe)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "false_positive_rate": (found - hits) / (len(pairs) - sum(is_unsafe)),
        "average_precision": area,
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_their_definitions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    is_unsafe = generator.random(60) < 0.4
    margins = np.round(generator.normal(size=60) + is_unsafe, 1)  # with ties
    assert len({*margins.tolist()}) < 50
    found = scores_of(is_unsafe, margins)
    for name, value in by_hand(is_unsafe.tolist(), margins.tolist()).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name


def test_the_example_of_scikit_learn() -> None:
    # sklearn.metrics.average_precision_score of scikit-learn 1.7's documentation: 0.83
    found = scores_of(np.array([False, False, True, True]), np.array([0.1, 0.4, 0.35, 0.8]))
    assert found.average_precision == pytest.approx(5 / 6)
    assert (found.precision, found.recall, found.false_positive_rate) == (0.5, 1.0, 1.0)


def test_what_nothing_can_be_said_of_is_none() -> None:
    all_safe = scores_of(np.array([False, False]), np.array([-1.0, -2.0]))
    assert (all_safe.precision, all_safe.recall, all_safe.f1, all_safe.average_precision) == (None,) * 4
    assert all_safe.false_positive_rate == 0.0
    missed = scores_of(np.array([True]), np.array([0.0]))  # a half is not above a half
    assert (missed.precision, missed.recall, missed.f1, missed.false_positive_rate) == (None, 0.0, 0.0, None)


def test_a_category_is_judged_beside_the_safe_samples_that_list_it() -> None:
    samples = [
        Sample(("A", "B"), ("A",)),  # found
        Sample(("A", "B"), ("A", "B")),  # missed
        Sample(("A", "B"), ()),  # found, wrongly
        Sample(("B",), ()),
        Sample(("A", "C"), ()),
    ]
    report = guard_report(samples, np.array([2.0, -1.0, 1.0, -2.0, -3.0]))
    a, b = report["by_category"]["A"], report["by_category"]["B"]
    assert (report["unsafe"], report["safe"], report["precision"], report["recall"]) == (2, 3, 0.5, 0.5)
    assert (a["unsafe"], a["safe"], a["precision"], a["recall"], a["false_positive_rate"]) == (2, 2, 0.5, 0.5, 0.5)
    assert (b["unsafe"], b["safe"], b["precision"], b["recall"]) == (1, 2, 0.0, 0.0)
    table = guard_table(json.loads(json.dumps(report)))
    assert [line.split()[0] for line in table.splitlines()] == ["unsafe", "all", "A", "B"]  # no sample violates C
    assert table in _as_table({"loss": 1.0, "guard": report})
    assert len({len(line) for line in table.splitlines()}) == 1


def test_verdicts_are_read_from_the_tokens(tmp_path) -> None:
    records = [
        {"prompt": "a", "verdict": "unsafe", "violated": ["B", "D"]},
        {"prompt": "<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: no.\n", "verdict": "safe"},
        {"prompt": "a", "verdict": "unsafe", "violated": ["own 2"], "categories": ["own 1", "own 2"]},
    ]
    rules = TokenRules(sequence_length=900, format="guard", guard=GuardRules(categories=FOUR))
    tokens = prepare(write(tmp_path / "d.jsonl", records), tmp_path / "cache", rules=rules)
    found = read_verdicts(tokens, tokenizer=byte_tokenizer())
    assert found.samples == (
        Sample(("A", "B", "C", "D"), ("B", "D")),
        Sample(("A", "B", "C", "D"), ()),
        Sample(("own 1", "own 2"), ("own 2",)),
    )
    texts = [byte_tokenizer().decode(tokens.document(i)[0][found.starts[i] :].tolist()) for i in range(3)]
    assert texts == ["unsafe\nS2,S4<|eot_id|>", "safe<|eot_id|>", "unsafe\nS2<|eot_id|>"]


def test_verdicts_must_begin_differently(monkeypatch) -> None:
    assert first_ids(byte_tokenizer()) == tuple(byte_tokenizer().encode("su"))
    monkeypatch.setattr("dist_lora.data.guard_ids._plain", lambda text, tokenizer: [1])
    with pytest.raises(DataError, match="with the same first token"):
        first_ids(byte_tokenizer())
