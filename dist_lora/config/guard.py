"""A Guard's categories: what a config, or a record, may say of them, and Llama Guard 3's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_lora.text import count

GuardVersion = Literal["8b", "1b"]
Augmentation = Literal["shuffle", "drop", "drop_violated"]

BEGIN, END = "<BEGIN UNSAFE CONTENT CATEGORIES>", "<END UNSAFE CONTENT CATEGORIES>"
"""The lines between which a prompt lists its categories."""


@dataclass(frozen=True)
class Category:
    """A kind of content that is unsafe: its name without a full stop, and maybe what belongs to it."""

    name: str
    description: str = ""


# Source: llama_stack/providers/inline/safety/llama_guard/llama_guard.py of meta-llama/llama-stack. The model cards call some
# otherwise (S3 "Sex-Related Crimes"); these are the words of the prompts.
_NAMES = (
    "Violent Crimes",
    "Non-Violent Crimes",
    "Sex Crimes",
    "Child Exploitation",
    "Defamation",
    "Specialized Advice",
    "Privacy",
    "Intellectual Property",
    "Indiscriminate Weapons",
    "Hate",
    "Self-Harm",
    "Sexual Content",
    "Elections",
    "Code Interpreter Abuse",
)
CATEGORIES: dict[GuardVersion, tuple[Category, ...]] = {
    "8b": tuple(Category(name) for name in _NAMES),
    "1b": tuple(Category(name) for name in _NAMES[:13]),
}
"""What each model was trained on: S1 to S14, and for 1B S1 to S13."""


def tidy_name(name: str) -> str:
    """A category's name as a prompt has it before its full stop."""
    return name.strip().rstrip(".").rstrip()


def fault_of(categories: Sequence[Category]) -> str | None:
    """What is wrong with a list of categories, as a sentence; None if a prompt can hold it and be read back."""
    if not categories:
        return "is empty; at least one category is expected"
    seen: set[str] = set()
    for number, category in enumerate(categories, 1):
        key = folded(category.name)
        if not category.name or "\n" in category.name:
            return f"category {number} is named {category.name!r}; one line of text is expected"
        if key in seen:
            return f"{count(len(categories), 'category', 'categories')}, of which two are called {category.name!r}"
        seen.add(key)
        if re.search(rf"^(S\d+: |{re.escape(END)}$)", category.description, re.MULTILINE):
            return (
                f"the description of {category.name!r} has a line that begins with a code (S1: ), or ends the list of "
                "categories: neither could be told from the list itself"
            )
    return None


def folded(name: str) -> str:
    """A name as it is compared: ``animal_abuse`` and ``Animal abuse.`` are one."""
    return tidy_name(name).replace("_", " ").casefold()
