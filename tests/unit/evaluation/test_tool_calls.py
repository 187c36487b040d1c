"""Tool calls are counted as by hand: each wanted call once, by tool, and what was called without being wanted."""

from __future__ import annotations

import pytest

from dist_lora.errors import DataError
from dist_lora.evaluation.tool_calls import Counts, ToolCalls, check_expected, lines_of, summed
from dist_lora.world.world import World

F, G = '{"name": "f", "parameters": {"a": 1}}', "[g()]"
F_OTHER = '{"name": "f", "parameters": {"a": "1"}}'


@pytest.mark.parametrize(
    ("expected", "generated", "of_tool"),
    [
        (F, "[f(a=1.0)]", {"f": Counts(1, 1, 1, 1)}),
        (F, F_OTHER, {"f": Counts(1, 1, 1, 0)}),
        (F, G, {"f": Counts(1, 1, 0, 0)}),
        (F, "[h(a=1)]", {"f": Counts(1, 1, 0, 0)}),
        (F, "a text", {"f": Counts(1, missing=1)}),
        (F, F[:-2], {"f": Counts(1, missing=1)}),
        ("a text", "another", {}),
        ("a text", G, {"g": Counts(unwanted=1)}),
        ("[f(a=1), g()]", "[g(), f(a=1)]", {"f": Counts(1, 1, 1, 1), "g": Counts(1, 1, 1, 1)}),
        ("[f(a=1), g()]", F, {"f": Counts(1, 1, 1, 1), "g": Counts(1, missing=1)}),
        (F, "[f(a=2), f(a=1)]", {"f": Counts(1, 1, 1, 1, unwanted=1)}),
        (F, "[h(a=1), f(a=1)]", {"f": Counts(1, 1, 1, 1), "h": Counts(unwanted=1)}),
        (F, "[h(), f(a=2)]", {"f": Counts(1, 1, 1, 0), "h": Counts(unwanted=1)}),
        ("[f(a=1), f(a=2)]", "[f(a=2), f(a=2)]", {"f": Counts(2, 2, 2, 1)}),
    ],
)
def test_an_answer_is_judged_call_by_call(expected: str, generated: str, of_tool: dict[str, Counts]) -> None:
    calls = ToolCalls()
    calls.add(expected, generated)
    assert calls.of_tool == of_tool
    assert all(counts.valid + counts.missing == counts.wanted for counts in of_tool.values())


@pytest.fixture
def some() -> ToolCalls:
    calls = ToolCalls()
    for expected, generated in [
        (F, F),
        (F, F_OTHER),
        (G, F),
        (G, F[:-1]),
        ("t", "t"),
        ("t", "t"),
        ("t", G),
        ("t", "{"),
    ]:
        calls.add(expected, generated)
    return calls


def test_shares_are_of_the_wanted_calls_and_of_the_answers_without_one(some: ToolCalls) -> None:
    assert some.values() == {
        "eval_tool_valid": 3 / 4,
        "eval_tool_right_name": 2 / 4,
        "eval_tool_right_arguments": 1 / 4,
        "eval_tool_missing": 1 / 4,
        "eval_tool_unwanted": 1 / 4,
    }
    only_texts = ToolCalls()
    only_texts.add("t", "t")
    assert only_texts.values() == {"eval_tool_unwanted": 0.0}
    only_calls = ToolCalls()
    only_calls.add(F, F)
    assert "eval_tool_unwanted" not in only_calls.values() and only_calls.values()["eval_tool_valid"] == 1


def test_tools_are_told_in_the_order_of_their_names_beside_the_counts_of_all() -> None:
    told = ToolCalls({"b": Counts(1), "a": Counts(2)}, answers=3).as_json()
    assert list(told["by_tool"]) == ["a", "b"]
    assert {key: value for key, value in told.items() if value and key != "by_tool"} == {"wanted": 3, "answers": 3}


def test_the_table_has_a_line_of_all_tools_and_one_of_each(some: ToolCalls) -> None:
    head, total, f, g, last = lines_of(some.as_json())
    assert head.split()[3:] == ["wanted", "valid", "right", "name", "right", "arguments", "missing", "unwanted"]
    assert [line.split() for line in (total, f, g)] == [
        ["all", "tools", "4", "3", "2", "1", "1", "1"],
        ["f", "2", "2", "2", "1", "0", "0"],
        ["g", "2", "1", "0", "0", "1", "1"],
    ]
    assert last == (
        "of 4 answers in which no call was wanted 1 call a tool; of all 8 answers 1 begin a call that can't be read"
    )


def test_parts_add_up_to_the_whole_in_any_order(some: ToolCalls) -> None:
    assert summed(some, World.alone()) == some
    twice = ToolCalls()
    twice.merge(some)
    twice.merge(some)
    assert twice.total() == Counts(*(2 * number for number in vars(some.total()).values()))
    assert (twice.answers, twice.broken, twice.without, twice.called_without) == (16, 2, 8, 2)


def test_held_out_answers_without_a_call_are_refused_and_broken_ones_told() -> None:
    assert check_expected([F, "text"]) is None
    warning = check_expected([F, "text", F[:-1], "[g(1)]"])
    assert warning is not None and warning.startswith(
        "eval.tool_calls: 2 expected answers of 4 begin a tool call that can't be read, and count as answers without one; the "
        f"first is sample 3: {F[:-1]!r}"
    )
    with pytest.raises(DataError) as refused:
        check_expected(["text", F[:-1]])
    assert str(refused.value).startswith(
        "eval.tool_calls: data.eval has 2 expected answers, and none calls a tool (begun and not readable: 1; the first is sample 2"
    )
    assert refused.value.exit_code == 2
