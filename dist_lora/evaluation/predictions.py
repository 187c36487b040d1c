"""Each held-out sample with its generated answer, of all ranks, in the order of the samples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
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

    def add_set(self, name: str, of_set: Predictions, *, num_before: int) -> None:
        """Add this rank's predictions of a further set, of whose samples ``num_before`` of other sets come first."""
        for index, prediction in of_set.of_samples.items():
            self.of_samples[num_before + index] = replace(prediction, set=name or None)

    def first(self, number: int, world: World) -> list[dict[str, Any]]:
        """Those of the first ``number`` samples, of all ranks, in order; empty but on the first rank. All ranks call it."""
        key = world.fresh_key("answers")
        own = {index: prediction.to_json() for index, prediction in self.of_samples.items() if index < number}
        if not world.is_first:
            world.share(f"{key}/{world.world_rank}", json.dumps(own).encode())
            return []
        every = dict(own)
        for rank in range(1, world.world_size):
            every |= {int(index): answer for index, answer in json.loads(world.fetch(f"{key}/{rank}")).items()}
        return [every[index] for index in sorted(every)]

    def write(self, world: World) -> None:
        """Write all ranks' predictions, a line of JSON each. All ranks call it.

        Raises:
            SaveError: the file can't be written.
        """
        own = {index: prediction.to_json() for index, prediction in self.of_samples.items()}
        world.share(f"predictions/{world.world_rank}", json.dumps(own).encode())

        def write() -> None:
            lines = {int(index): line for index, line in json.loads(json.dumps(own)).items()}
            for rank in range(1, world.world_size):
                lines |= {int(index): line for index, line in json.loads(world.fetch(f"predictions/{rank}")).items()}
            text = "".join(json.dumps(lines[index], ensure_ascii=False) + "\n" for index in sorted(lines))
            write_whole(self.path, text)

        world.on_first(
            "the predictions",
            write,
            os_error=lambda error: cannot_write(f"{self.path}: can't be written: {error}", error),
        )
