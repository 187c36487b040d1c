"""Results of an examination: findings with what to do, and facts; each step ends by a deadline, whatever it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

Severity = Literal["ok", "note", "warning", "fault"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "fault")


T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One result: ``text`` says what was found, ``todo`` what to do; ``hosts`` where, if not on all."""

    severity: Severity
    about: str
    text: str
    todo: str = ""
    hosts: tuple[str, ...] = ()

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Finding:
        """A finding from its JSON."""
        return Finding(**{**tree, "hosts": tuple(tree["hosts"])})


@dataclass
class Answer:
    """The findings of a step, and its numbers for the JSON output."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, severity: Severity, about: str, text: str, todo: str = "") -> None:
        """Add a finding."""
        assert severity == "ok" or todo or severity == "note", f"{text}: has no advice"
        self.findings.append(Finding(severity, about, text, todo))

    def extend(self, other: Answer) -> None:
        """Add all of another answer."""
        self.findings += other.findings
        self.facts |= other.facts

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"findings": [asdict(finding) for finding in self.findings], "facts": self.facts}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Answer:
        """An answer from its JSON."""
        return Answer([Finding.from_json(finding) for finding in tree["findings"]], dict(tree["facts"]))


class Examiner:
    """Runs steps one after the other, none for longer than ``deadline_s``: one that hangs or fails becomes a finding.

    ``begin`` is called at the start of each step, in its thread. ``is_stuck``: a step is still running after its deadline;
    the process then exits without waiting for its threads.
    """

    def __init__(self, deadline_s: float, begin: Callable[[], object] = lambda: None) -> None:
        self.deadline_s = deadline_s
        self.is_stuck = False
        self._begin = begin

    def examine(self, about: str, step: Callable[[], Answer], *, todo: str, severity: Severity = "warning") -> Answer:
        """The step's answer; if it hangs or fails, a finding of ``severity`` with ``todo``."""
        results: list[Answer | BaseException] = []

        def work() -> None:
            try:
                self._begin()
                results.append(step())
            except BaseException as error:
                results.append(error)

        thread = threading.Thread(target=work, name=f"doctor-{about}", daemon=True)
        thread.start()
        thread.join(self.deadline_s)
        if not results:
            self.is_stuck = True
            return _unmeasured(severity, about, f"no answer within {self.deadline_s:g} s", todo)
        result = results[0]
        if isinstance(result, BaseException):
            text = " ".join(str(result).split())
            return _unmeasured(severity, about, f"{type(result).__name__}: {text}", todo)
        return result


def _unmeasured(severity: Severity, about: str, why: str, todo: str) -> Answer:
    answer = Answer()
    answer.add(severity, about, f"couldn't be measured: {why}", todo)
    return answer


def hosts_by(values: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    """The hosts that have each value, without duplicates, in the order of first occurrence."""
    hosts_of: dict[T, list[str]] = {}
    for host, value in values:
        hosts = hosts_of.setdefault(value, [])
        if host not in hosts:
            hosts.append(host)
    return hosts_of


def merge_hosts(by_host: Iterable[tuple[str, Finding]], *, num_hosts: int) -> list[Finding]:
    """Equal findings of several hosts as one that names them, unless all hosts have it; in the order of first occurrence."""
    return [
        finding if len(hosts) == num_hosts else replace(finding, hosts=tuple(hosts))
        for finding, hosts in hosts_by(by_host).items()
    ]


def worst(findings: Iterable[Finding]) -> Severity:
    """The highest severity among them; ``ok`` for none."""
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")
