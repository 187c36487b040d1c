"""What ``eval.answer`` takes out of a text, and when two texts have the same answer."""

from __future__ import annotations

import pytest

from dist_lora.evaluation.answers import AnswerRule

LAST_NUMBER = r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)"


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (LAST_NUMBER, "He has 3 + 4 = 7 apples.\n#### 1,200", "1,200"),
        (LAST_NUMBER, "It costs -2.50 today.", "-2.50"),
        (LAST_NUMBER, "no number", None),
        (r"#### *(.*)", "#### 12 \n#### 13 ", "13"),
        (r"answer: (?P<other>\w+) or (?P<that>\w+)", "answer: a or b", "a"),  # the first that has a name
        (r"(\w+) is (?P<answer>\w+)", "it is 5", "5"),
        (r"yes|no", "no, yes, no!", "no"),
        (r"\d*", "all of 42 cases", "42"),  # it matches the empty text too, everywhere
        (r"a(b)?", "ab a", "b"),  # the last match has no such group
    ],
)
def test_the_last_match_that_is_not_empty_counts(pattern: str, text: str, answer: str | None) -> None:
    rule = AnswerRule.of(pattern)
    assert rule is not None and rule.answer_in(text) == answer


@pytest.mark.parametrize(
    ("generated", "expected", "is_match"),
    [
        ("So it is 1200.", "5 * 240\n#### 1,200", True),
        ("So it is 1,200", "#### 1200", True),
        ("12,00", "1200", False),  # no thousands
        ("1200 at first, 1201 now", "#### 1200", False),
        ("none", "#### 1200", False),
        ("none", " none\n", True),  # no answer is expected: the texts are compared
        ("7", "none", False),
    ],
)
def test_texts_match_by_their_answers(generated: str, expected: str, is_match: bool) -> None:
    rule = AnswerRule.of(LAST_NUMBER)
    assert rule is not None and rule.is_match(generated, expected) is is_match


def test_without_a_setting_there_is_no_rule() -> None:
    assert AnswerRule.of(None) is None
