"""What an examination gives: findings with what to do, and facts; each step within a deadline, whatever it does."""

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
    """One thing that was looked at: ``text`` says what was found, ``todo`` what to do; ``hosts`` where, if not everywhere."""

    severity: Severity
    about: str
    text: str
    todo: str = ""
    hosts: tuple[str, ...] = ()

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Finding:
        """A finding that came as JSON."""
        return Finding(**{**tree, "hosts": tuple(tree["hosts"])})


@dataclass
class Answer:
    """What a step found, and its numbers for who reads JSON."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, severity: Severity, about: str, text: str, todo: str = "") -> None:
        """One finding more."""
        assert severity == "ok" or todo or severity == "note", f"{text}: nothing is said of what to do"
        self.findings.append(Finding(severity, about, text, todo))

    def take(self, other: Answer) -> None:
        """All of another answer too."""
        self.findings += other.findings
        self.facts |= other.facts

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"findings": [asdict(each) for each in self.findings], "facts": self.facts}

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Answer:
        """An answer that came as JSON."""
        return Answer([Finding.of(each) for each in tree["findings"]], dict(tree["facts"]))


class Examiner:
    """Runs steps one after the other, none for longer than ``deadline_s``: one that hangs or fails becomes a finding.

    ``begin`` is called at the start of each step, in its thread. ``is_stuck``: a step is still at work behind its deadline;
    the process then ends without waiting for its threads.
    """

    def __init__(self, deadline_s: float, begin: Callable[[], object] = lambda: None) -> None:
        self.deadline_s = deadline_s
        self.is_stuck = False
        self._begin = begin

    def examine(self, about: str, step: Callable[[], Answer], *, todo: str, severity: Severity = "warning") -> Answer:
        """The step's answer, or that it could not be measured, with ``todo``, as a finding of ``severity``."""
        found: list[Answer | BaseException] = []

        def work() -> None:
            try:
                self._begin()
                found.append(step())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=work, name=f"doctor-{about}", daemon=True)
        thread.start()
        thread.join(self.deadline_s)
        if not found:
            self.is_stuck = True
            return _unmeasured(severity, about, f"no answer within {self.deadline_s:g} s", todo)
        if isinstance(found[0], BaseException):
            words = " ".join(str(found[0]).split())
            return _unmeasured(severity, about, f"{type(found[0]).__name__}: {words}", todo)
        return found[0]


def _unmeasured(severity: Severity, about: str, why: str, todo: str) -> Answer:
    answer = Answer()
    answer.add(severity, about, f"could not be measured: {why}", todo)
    return answer


def hosts_by(has: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    """The hosts that have the same, each once, by what they have; in the order of their first."""
    hosts: dict[T, list[str]] = {}
    for host, each in has:
        there = hosts.setdefault(each, [])
        if host not in there:
            there.append(host)
    return hosts


def merge_hosts(by_host: Iterable[tuple[str, Finding]], *, num_hosts: int) -> list[Finding]:
    """Equal findings of several hosts as one that names them, unless all have it; in the order of their first."""
    return [
        finding if len(there) == num_hosts else replace(finding, hosts=tuple(there))
        for finding, there in hosts_by(by_host).items()
    ]


def worst(findings: Iterable[Finding]) -> Severity:
    """The gravest severity among them; ``ok`` of none."""
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")
