"""The Llama-3 herd: each member's shape, special tokens, licence and purpose.

These facts are for planning and for names; a model folder's own config.json takes precedence (``Shape.from_config``).

Sources: Meta's model cards (github.com/meta-llama/llama-models, models/llama3*/MODEL_CARD.md), its list of
models (llama_models/sku_list.py) and tokenizer (llama_models/llama3/tokenizer.py), "The Llama 3 Herd of
Models" (arXiv 2407.21783, table 3), the config.json and generation_config.json of the hub's meta-llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from dist_lora.herd.rope import RopeScaling
from dist_lora.herd.shape import Shape


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the herd's control tokens; None if the member's tokenizer doesn't have that token.

    ``stop`` are the ids that end an answer, as generation_config.json lists them.
    """

    begin_of_text: int
    end_of_text: int
    start_header: int
    end_header: int
    end_of_turn: int
    end_of_message: int | None
    pad: int | None
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """A published model of the herd.

    ``languages``: those that its model card officially supports; ``tool_use``: trained to call tools.
    """

    name: str
    hub_id: str
    title: str
    shape: Shape
    instruct: bool
    guard: bool
    tokens: SpecialTokens
    licence: str
    released: date
    languages: tuple[str, ...]
    tool_use: bool

    @property
    def is_finetuned(self) -> bool:
        """Trained to answer (Instruct) or to judge (Guard), not only to continue text."""
        return self.instruct or self.guard

    @property
    def is_multilingual(self) -> bool:
        """Officially supports more than English."""
        return len(self.languages) > 1

    @property
    def has_long_context(self) -> bool:
        """Has a longer context than the 8,192 tokens of Llama 3."""
        return self.shape.context > 8192

    @property
    def purpose(self) -> str:
        """What it is for, in one line."""
        if self.guard:
            return "judges whether a prompt or an answer is safe, and names the hazard"
        kind = "answers, in chats" if self.instruct else "continues text; a base for fine-tuning"
        extras = {
            "multilingual": self.is_multilingual,
            "long context": self.has_long_context,
            "tool use": self.tool_use,
        }
        shown = [extra for extra, has in extras.items() if has]
        return kind + (f" ({', '.join(shown)})" if shown else "")


_SIZES = {
    # name: hidden, ffn, layers, heads, head_dim, tied. All members have 8 kv heads (405B: Meta's newer
    # release, on the hub since August 2024; the first one had 16).
    "1b": (2048, 8192, 16, 32, 64, True),
    "3b": (3072, 8192, 28, 24, 128, True),
    "8b": (4096, 14336, 32, 32, 128, False),
    "70b": (8192, 28672, 80, 64, 128, False),
    "405b": (16384, 53248, 126, 128, 128, False),
}


def _shape(size: str, *, rope_factor: float | None) -> Shape:
    hidden, ffn, num_layers, num_heads, head_dim, tied = _SIZES[size]
    scaling = None if rope_factor is None else RopeScaling(rope_factor, 1.0, 4.0, 8192)
    return Shape(
        hidden=hidden,
        ffn=ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab=128_256,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        context=8192 if scaling is None else 131_072,
        norm_eps=1e-5,
        tied=tied,
    )


_ENGLISH = ("English",)
_EIGHT = ("English", "German", "French", "Italian", "Portuguese", "Hindi", "Spanish", "Thai")


@dataclass(frozen=True)
class _Release:
    """What all members of a release have in common."""

    licence: str
    released: date
    languages: tuple[str, ...]
    rope_factor: float | None

    @property
    def has_3_1_tokens(self) -> bool:
        """<|eom_id|> and <|finetune_right_pad_id|> came with 3.1; before, their ids were reserved."""
        return self.rope_factor is not None


_RELEASES = {
    "3": _Release("Meta Llama 3 Community License", date(2024, 4, 18), _ENGLISH, None),
    "3.1": _Release("Llama 3.1 Community License", date(2024, 7, 23), _EIGHT, 8.0),
    "3.2": _Release("Llama 3.2 Community License", date(2024, 9, 25), _EIGHT, 32.0),
    "3.3": _Release("Llama 3.3 Community License", date(2024, 12, 6), _EIGHT, 8.0),
}


def _member(name: str, hub_name: str, *, release: str, size: str, kind: str) -> Member:
    facts = _RELEASES[release]
    newer = facts.has_3_1_tokens
    stop = (128_001,) if kind == "base" else (128_001, 128_008, 128_009) if newer else (128_001, 128_009)
    return Member(
        name=name,
        hub_id=f"meta-llama/{hub_name}",
        title=hub_name.removeprefix("Meta-").replace("-", " "),
        # Guard 3 8B is a fine-tuned 3.1 8B and has its RoPE; llama_models' list calls it unscaled.
        shape=_shape(size, rope_factor=facts.rope_factor),
        instruct=kind == "instruct",
        guard=kind == "guard",
        tokens=SpecialTokens(
            begin_of_text=128_000,
            end_of_text=128_001,
            start_header=128_006,
            end_header=128_007,
            end_of_turn=128_009,
            end_of_message=128_008 if newer else None,
            pad=128_004 if newer else None,
            stop=stop,
        ),
        licence=facts.licence,
        released=facts.released,
        languages=facts.languages,
        tool_use=kind == "instruct" and newer,
    )


def _all_members() -> dict[str, Member]:
    members = []
    for release, sizes in {"3": ("8b", "70b"), "3.1": ("8b", "70b", "405b"), "3.2": ("1b", "3b")}.items():
        for size in sizes:
            hub_name = f"{'Meta-' if release == '3' else ''}Llama-{release}-{size.upper()}"
            members.append(_member(f"{release}-{size}", hub_name, release=release, size=size, kind="base"))
            members.append(
                _member(
                    f"{release}-{size}-instruct",
                    f"{hub_name}-Instruct",
                    release=release,
                    size=size,
                    kind="instruct",
                )
            )
    # Of 3.3 there is no base: it was tuned anew from 3.1 70B.
    members.append(_member("3.3-70b-instruct", "Llama-3.3-70B-Instruct", release="3.3", size="70b", kind="instruct"))
    members.append(_member("guard-3-8b", "Llama-Guard-3-8B", release="3.1", size="8b", kind="guard"))
    members.append(_member("guard-3-1b", "Llama-Guard-3-1B", release="3.2", size="1b", kind="guard"))
    return {member.name: member for member in members}


MEMBERS: dict[str, Member] = _all_members()
"""Every member by its name in ``model.name``."""


# The herd as a table


def herd_rows(members: Sequence[Member] = tuple(MEMBERS.values())) -> list[dict[str, Any]]:
    """The facts about each member, by column."""
    return [
        {
            "name": member.name,
            "parameters": member.shape.num_parameters(),
            "finetuned": member.is_finetuned,
            "multilingual": member.is_multilingual,
            "long context": member.has_long_context,
            "tool use": member.tool_use,
            "context": member.shape.context,
            "release": member.released.isoformat(),
            "licence": member.licence,
            "purpose": member.purpose,
            "hub id": member.hub_id,
        }
        for member in members
    ]


def herd_table() -> list[list[str]]:
    """The herd as a table, header first."""
    columns = ["name", "parameters", "finetuned", "multilingual", "long context", "tool use", "tokens", "release",
               "licence", "purpose"]  # fmt: skip
    rows = [columns]
    for row in herd_rows():
        rows.append(
            [
                row["name"],
                f"{row['parameters'] / 1e9:.1f} B",
                *("yes" if row[fact] else "no" for fact in ("finetuned", "multilingual", "long context", "tool use")),
                f"{row['context']:,}",
                row["release"],
                row["licence"],
                row["purpose"].partition(" (")[0],  # the columns already say what is in brackets
            ]
        )
    return rows
