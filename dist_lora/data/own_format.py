"""A data format of the user's own: a function that makes a record of one of our formats from one of theirs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_lora.data.records import EXAMPLES, Format, recognize_format
from dist_lora.errors import DataError
from dist_lora.own_code import OwnCode, check_arguments, is_own, load_code

SETTING = "data.format"


@dataclass(frozen=True)
class OwnFormat:
    """The function that ``data.format`` names."""

    code: OwnCode

    def converted(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record that the function makes of one.

        Raises:
            DataError: it raised an error, or returned no record.
        """
        try:
            made = self.code.value(record)
        except Exception as error:
            raise DataError(self.code.raised(error)) from error
        if not isinstance(made, Mapping) or not made or not all(isinstance(key, str) for key in made):
            raise DataError(
                f"{self.code.path} returned {made!r:.80}; a record is expected, e.g. {EXAMPLES['messages']}"
            )
        return dict(made)

    def read(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], Format]:
        """The converted record with its format, by its columns.

        Raises:
            DataError: see ``converted``; or its columns match no format.
        """
        made = self.converted(record)
        try:
            return made, recognize_format([key for key, value in made.items() if value is not None])
        except DataError as error:
            raise DataError(f"{self.code.path} returned a record whose {error}") from None


@functools.cache
def own_format(name: str) -> OwnFormat | None:
    """The user's own format that ``data.format`` names, imported; None where it names one of ours.

    Raises:
        ConfigError: see ``load_code``; or it takes no single argument.
    """
    if not is_own(name):
        return None
    code = load_code(name, setting=SETTING)
    check_arguments(code, code.value, arguments=["record"])
    return OwnFormat(code)
