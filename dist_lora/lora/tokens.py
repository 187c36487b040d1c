"""``lora.train_tokens`` as ids: by a tokenizer, or, where none is at hand, as many of them. Needs no torch."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from dist_lora.config.schema import LoraSection
from dist_lora.errors import ConfigError
from dist_lora.text import first_few

# The names of trained rows, among those of A and B of each linear.
EMBEDDING_ROWS, HEAD_ROWS = "model.embed_tokens.token_rows", "lm_head.token_rows"


class Tokenizer(Protocol):
    """What of a tokenizer is needed."""

    def get_vocab(self) -> dict[str, int]:
        """The id of every token by its name, added ones too."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        ...


def with_token_ids(section: LoraSection, *, tokenizer: Tokenizer, vocab: int) -> LoraSection:
    """The section with its tokens as ids, ascending: everything that computes takes it so.

    A name is that of the tokenizer's vocabulary (``<|eot_id|>``), or a text that it encodes as one token (`` yes``).

    Args:
        vocab: rows of the base's embedding.

    Raises:
        ConfigError: a name isn't one token, an id has no row, or two name the same token; tells all of them.
    """
    if not section.train_tokens:
        return section
    names, faults, ids = tokenizer.get_vocab(), [], []
    for token in section.train_tokens:
        encoded = [token] if isinstance(token, int) else _ids_of(token, names, tokenizer)
        if len(encoded) != 1:
            known = {number: name for name, number in names.items()}
            pieces = first_few([repr(known.get(number, number)) for number in encoded])
            faults.append(
                f"{token!r} is {len(encoded)} tokens of this tokenizer ({pieces}); expected one of its vocabulary. A new token "
                "must be in the model's tokenizer first, in place of a reserved one, or name a token by its id"
            )
        elif encoded[0] >= vocab:
            faults.append(
                f"{token!r}: id {encoded[0]:,} has no row in the embedding, which has {vocab:,} (ids 0-{vocab - 1:,})"
            )
        else:
            ids.append(encoded[0])
    faults += [
        f"id {number:,} is named more than once, as a name and as an id"
        for number, num in Counter(ids).items()
        if num > 1
    ]
    if faults:
        raise ConfigError("lora.train_tokens: " + "; ".join(faults))
    return section.model_copy(update={"train_tokens": sorted(ids)})


def _ids_of(token: str, names: dict[str, int], tokenizer: Tokenizer) -> list[int]:
    return [names[token]] if token in names else list(tokenizer.encode(token, add_special_tokens=False))


def with_as_many(section: LoraSection) -> LoraSection:
    """The section with some ids in place of its tokens, as many: what they take depends on their number alone."""
    if not section.train_tokens:
        return section
    return section.model_copy(update={"train_tokens": list(range(len(section.train_tokens)))})
