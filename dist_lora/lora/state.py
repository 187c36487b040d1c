"""What is saved of a trained tensor, and how a part of it is named: by elements, whichever rank holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["adapter", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, stop)`` of a flattened tensor, of one kind: adapter or one of AdamW's moments."""

    name: str
    kind: Kind
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """How many elements the piece has."""
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Its name in a safetensors file and in the manifest: ``adapter/model....lora_A/0-1024``."""
        return f"{self.kind}/{self.name}/{self.start}-{self.stop}"
