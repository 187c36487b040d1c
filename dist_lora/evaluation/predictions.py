"""Each held-out sample with its generated answer, of all ranks, in the order of the samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_lora.errors import cannot_write
from dist_lora.files import refuse_file, write_whole
from dist_lora.world.world import World


@dataclass(frozen=True)
class Prediction:
    """A sample's prompt with its special tokens, the expected answer and the generated one."""

    prompt: str
    expected: str
    generated: str
    is_correct: bool
    set: str | None = None  # the set's name, where there are several

    def to_json(self) -> dict[str, object]:
        """For the file: without what there isn't."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Predictions:
    """This rank's predictions by the number of their sample, to be written to ``path`` by the first rank."""

    path: Path
    of_samples: dict[int, Prediction] = field(default_factory=dict)

    def refuse_existing(self) -> None:
        """Raise ``ConfigError`` if the file exists, or can't be made."""
        refuse_file(self.path, option="--predictions")

    def first(self, number: int, world: World) -> list[dict[str, Any]]:
        """Those of the first ``number`` samples, of all ranks, in order; empty but on the first rank. All ranks call it."""
        chosen = {index: prediction for index, prediction in self.of_samples.items() if index < number}
        return world.on_first("the answers", self._gathering(chosen, world)) or []

    def write(self, world: World) -> None:
        """Write all ranks' predictions, a line of JSON each. All ranks call it.

        Raises:
            SaveError: the file can't be written.
        """
        gathered = self._gathering(self.of_samples, world)

        def write() -> None:
            write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in gathered()))

        world.on_first(
            "the predictions",
            write,
            os_error=lambda error: cannot_write(f"{self.path}: can't be written: {error}", error),
        )

    @staticmethod
    def _gathering(own: Mapping[int, Prediction], world: World) -> Callable[[], list[dict[str, Any]]]:
        """Publish this rank's; returns what makes a list of all ranks', in order, on the first rank. All ranks call it."""
        key = world.fresh_key("predictions")
        lines = {index: prediction.to_json() for index, prediction in own.items()}
        world.share(f"{key}/{world.world_rank}", json.dumps(lines).encode())

        def gathered() -> list[dict[str, Any]]:
            every = dict(lines)
            for rank in range(1, world.world_size):
                every |= {int(index): line for index, line in json.loads(world.fetch(f"{key}/{rank}")).items()}
            return [every[index] for index in sorted(every)]

        return gathered
