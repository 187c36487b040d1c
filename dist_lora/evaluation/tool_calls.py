"""How good the tool calls of generated answers are: counted by call and by tool, the same on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dist_lora.errors import DataError
from dist_lora.evaluation.read_calls import Call, read_calls, same_json
from dist_lora.text import count, in_columns

if TYPE_CHECKING:
    from dist_lora.world.world import World


@dataclass
class Counts:
    """Of one tool, or of all.

    Args:
        wanted: calls in the expected answers.
        valid: wanted calls in whose place the generated answer has a call that can be read, of whatever tool.
        right_name: those of the wanted tool.
        right_arguments: those whose arguments are the wanted ones too, as JSON values.
        missing: wanted calls without one in their place, also since the answer can't be read.
        unwanted: generated calls that stand for no wanted one.
    """

    wanted: int = 0
    valid: int = 0
    right_name: int = 0
    right_arguments: int = 0
    missing: int = 0
    unwanted: int = 0


@dataclass
class ToolCalls:
    """The calls of some answers.

    Args:
        of_tool: by name; ``unwanted`` by the name that was called, the rest by the one that was wanted.
        answers: those that were judged.
        broken: answers that begin a call in a way that can't be read.
        without: answers in which no call was wanted.
        called_without: those of them that call a tool.
    """

    of_tool: dict[str, Counts] = field(default_factory=dict)
    answers: int = 0
    broken: int = 0
    without: int = 0
    called_without: int = 0

    def add(self, expected: str, generated: str) -> None:
        """Judge a generated answer by the expected one."""
        wanted, answer = read_calls(expected).calls, read_calls(generated)
        self.answers += 1
        self.broken += answer.is_broken
        self.without += not wanted
        self.called_without += not wanted and bool(answer.calls)
        pairs, missing, unwanted = _matched(wanted, answer.calls)
        for want, call in pairs:
            counts = self._of(want.name)
            counts.valid += 1
            counts.right_name += call.name == want.name
            counts.right_arguments += _is_equal(want, call)
        for want in wanted:
            self._of(want.name).wanted += 1
        for want in missing:
            self._of(want.name).missing += 1
        for call in unwanted:
            self._of(call.name).unwanted += 1

    def _of(self, name: str) -> Counts:
        return self.of_tool.setdefault(name, Counts())

    def total(self) -> Counts:
        """Of all tools."""
        names = asdict(Counts())
        return Counts(**{name: sum(getattr(counts, name) for counts in self.of_tool.values()) for name in names})

    def merge(self, other: ToolCalls) -> None:
        """Add what was counted elsewhere."""
        for name, counts in other.of_tool.items():
            own = self._of(name)
            for key, value in asdict(counts).items():
                setattr(own, key, getattr(own, key) + value)
        for key in ("answers", "broken", "without", "called_without"):
            setattr(self, key, getattr(self, key) + getattr(other, key))

    def as_json(self) -> dict[str, Any]:
        """The counts of all, and of each tool under ``by_tool``, in the order of their names."""
        by_tool = {name: asdict(self.of_tool[name]) for name in sorted(self.of_tool)}
        whole = {key: value for key, value in asdict(self).items() if key != "of_tool"}
        return asdict(self.total()) | whole | {"by_tool": by_tool}

    def values(self) -> dict[str, float]:
        """Shares, as the numbers of an evaluation: of the wanted calls, and of the answers in which none was wanted."""
        total = self.total()
        shares = ("valid", "right_name", "right_arguments", "missing")
        values = {f"eval_tool_{name}": getattr(total, name) / total.wanted for name in shares if total.wanted}
        if self.without:
            values["eval_tool_unwanted"] = self.called_without / self.without
        return values


def summed(own: ToolCalls, world: World) -> ToolCalls:
    """The calls of all ranks' answers. All ranks call it and get the same."""
    key = world.fresh_key("tool_calls")
    world.share(f"{key}/{world.world_rank}", json.dumps(asdict(own)).encode())

    def merged() -> bytes:
        total = ToolCalls()
        total.merge(own)
        for rank in range(1, world.world_size):
            total.merge(_read(world.fetch(f"{key}/{rank}")))
        return json.dumps(asdict(total)).encode()

    return _read(world.once("the tool calls", merged))


def _read(shared: bytes) -> ToolCalls:
    values = json.loads(shared)
    of_tool = {name: Counts(**counts) for name, counts in values.pop("of_tool").items()}
    return ToolCalls(of_tool=of_tool, **values)


def check_expected(answers: Iterable[str]) -> str | None:
    """What to warn of in the expected answers: those that begin a call and can't be read; None if all is well.

    Raises:
        DataError: none of them calls a tool.
    """
    num_calls, num_answers, broken = 0, 0, []
    for number, text in enumerate(answers, 1):
        answer = read_calls(text)
        num_answers = number
        num_calls += len(answer.calls)
        if answer.is_broken:
            broken.append((number, text))
    first = f"; the first is sample {broken[0][0]}: {broken[0][1][:100]!r}" if broken else ""
    if not num_calls:
        raise DataError(
            f"eval.tool_calls: data.eval has {count(num_answers, 'expected answer')}, and none calls a tool "
            f"(begun and not readable: {len(broken)}{first}). The last answer of a sample is judged. Set "
            "eval.tool_calls: false, or hold out samples that end with a call"
        )
    if not broken:
        return None
    return (
        f"eval.tool_calls: {count(len(broken), 'expected answer')} of {num_answers:,} begin a tool call that can't be read, and "
        f"count as answers without one{first}"
    )


def by_set(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The counts of each held-out set by its name; that of a single set is empty."""
    return {"": result} if "by_tool" in result else dict(result)


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """What ``as_json`` gave as a table with a head: a row of all tools, and one of each."""
    names = tuple(asdict(Counts()))
    rows = [["tool calls of", *(name.replace("_", " ") for name in names)]]
    for name, counts in [("all tools", result), *result["by_tool"].items()]:
        rows.append([name, *(f"{counts[key]:,}" for key in names)])
    return rows


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """The table of ``rows_of`` as text, and what is counted by answers."""
    return [
        *in_columns(rows_of(result)),
        f"of {count(result['without'], 'answer')} in which no call was wanted {result['called_without']:,} call a tool; of all "
        f"{result['answers']:,} answers {result['broken']:,} begin a call that can't be read",
    ]


def _matched(
    wanted: Sequence[Call], calls: Sequence[Call]
) -> tuple[list[tuple[Call, Call]], Sequence[Call], Sequence[Call]]:
    """Wanted calls with the calls that stand for them, wanted calls without one, and calls that stand for none.

    A call stands for an equal one, else for one of the same tool, else for the first that has none.
    """
    pairs: list[tuple[Call, Call]] = []
    missing, left = wanted, list(calls)
    for is_pair in (_is_equal, _has_name, lambda want, call: True):
        unmatched: list[Call] = []
        for want in missing:
            place = next((index for index, call in enumerate(left) if is_pair(want, call)), None)
            if place is None:
                unmatched.append(want)
            else:
                pairs.append((want, left.pop(place)))
        missing = unmatched
    return pairs, missing, left


def _is_equal(want: Call, call: Call) -> bool:
    return _has_name(want, call) and same_json(want.arguments, call.arguments)


def _has_name(want: Call, call: Call) -> bool:
    return want.name == call.name
