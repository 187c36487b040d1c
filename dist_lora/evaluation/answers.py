"""The answer in a text: what ``eval.answer`` takes out of generated and expected texts before they are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")


@dataclass(frozen=True)
class AnswerRule:
    """A regular expression that finds the answer in a text, like GSM8K's last number."""

    pattern: re.Pattern[str]

    @staticmethod
    def of(pattern: str | None) -> AnswerRule | None:
        """The rule of ``eval.answer``; None where it is not set."""
        return None if pattern is None else AnswerRule(re.compile(pattern))

    def answer_in(self, text: str) -> str | None:
        """The last match that isn't empty, without surrounding whitespace; None where nothing matches.

        Of a match its first named group counts, else its first group, else all of it.
        """
        group: str | int = next(iter(self.pattern.groupindex), min(1, self.pattern.groups))
        found = [match[group].strip() for match in self.pattern.finditer(text) if match[group]]
        return next((answer for answer in reversed(found) if answer), None)

    def is_match(self, generated: str, expected: str) -> bool:
        """Whether both texts have the same answer: the same text, or numbers that differ in their thousands' commas only.

        An expected text without an answer is compared whole.
        """
        wanted, found = self.answer_in(expected), self.answer_in(generated)
        if wanted is None:
            return generated.strip() == expected.strip()
        return found is not None and _plain(found) == _plain(wanted)


def _plain(answer: str) -> str:
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
