"""The checkpoints of one run: what is saved besides tensors, which checkpoints are kept, and resuming from one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_lora.checkpoint.folders import step_folder
from dist_lora.checkpoint.manifest import TensorSpec
from dist_lora.checkpoint.read import load_pieces
from dist_lora.checkpoint.saver import Saver
from dist_lora.checkpoint.write import check_room, rotate, save_checkpoint
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.errors import CheckpointError
from dist_lora.lora.state import Piece
from dist_lora.run_folder.records import sync_metrics, truncate_metrics
from dist_lora.train.build import Trainee, run_origin
from dist_lora.train.own_code import own_code_facts
from dist_lora.train.resume import VerifiedCheckpoint, best_of, last_evaluated, warn_of_versions
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass
class RunProgress:
    """The progress of a run: what a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    evaluated_step: int = 0


class RunCheckpoints:
    """Saves and resumes a run. All ranks make one, and call its methods for the same steps."""

    def __init__(
        self, config: Config, trainee: Trainee, *, loader: Loader, num_steps: int, folder: Path, world: World
    ) -> None:
        self._config, self._trainee, self._loader, self._num_steps = config, trainee, loader, num_steps
        self._run_folder, self._world = folder, world
        self._origin = run_origin(config, trainee.base, loader.kinds)
        self._own_code = own_code_facts(config)
        self.folder = folder / "checkpoints"
        self.saver = Saver(world)
        self.saved_step: int | None = None

    def check_room(self) -> None:
        """Raise on all ranks if the disk can't hold the checkpoints that this run keeps."""
        section, specs = self._config.checkpoint, self._specs()
        num_kept = section.keep + section.keep_best
        self._world.on_first("room for the checkpoints", lambda: check_room(self.folder, specs, num_kept=num_kept))

    def save(self, progress: RunProgress) -> None:
        """Start writing this step's checkpoint, on all ranks; ``saver.wait`` waits for its end.

        Once it is complete, those that are no longer kept are deleted.
        """
        step = progress.step
        if self.saved_step == step:
            return
        self.saved_step = step
        best, facts = self._best(progress), self._facts(progress)

        def write(world: World, share: Mapping[Piece, Tensor]) -> Path:
            if world.is_first:
                sync_metrics(self._run_folder)  # before the checkpoint: a power failure must not lose its step's line
            path = save_checkpoint(self.folder, step=step, share=share, specs=self._specs(), world=world, **facts)
            if world.is_first:
                self._rotate(best)
            return path

        self.saver.start(self._trainee.adapters.share(), write)

    def finish(self, progress: RunProgress) -> None:
        """Wait for the save in flight, and delete what is no longer kept and the leftovers of killed saves.

        Raises:
            SaveError, RankError: see ``Saver.wait``.
        """
        self.saver.wait()
        if self._world.is_first:
            self._rotate(self._best(progress))  # of a last save that was killed before it could

    def of_adapter(self, progress: RunProgress) -> Path:
        """The checkpoint that the run's adapter is gathered from: the best if it is kept, else the last."""
        best = self._best(progress)
        checkpoint = self.saver.last if best is None else self.folder / step_folder(best)
        assert checkpoint is not None
        return checkpoint

    def resume(self, checkpoint: VerifiedCheckpoint) -> RunProgress:
        """Load a checkpoint from ``find_checkpoint``: the trained tensors, their moments and the run's progress.

        Raises:
            CheckpointError: it holds other tensors than this config attaches, or is damaged.
        """
        path, manifest, adapters = checkpoint.path, checkpoint.manifest, self._trainee.adapters
        self._world.progress.now(f"resuming {path.name}", kind="long")
        if manifest.tensors != self._specs():
            raise CheckpointError(
                f"{path} holds {len(manifest.tensors)} trained tensors and this config attaches "
                f"{len(self._specs())}, or their names or shapes differ: the checkpoint is another run's"
            )
        adapters.restore(load_pieces(path, manifest, adapters.pieces()), num_steps=manifest.step)
        progress = RunProgress(manifest.step, *best_of(checkpoint), last_evaluated(checkpoint))
        self.saver.last, self.saved_step = path, manifest.step
        if self._world.is_first:
            truncate_metrics(self._run_folder, last_step=manifest.step, last_evaluation=progress.evaluated_step)
            log.info(f"resumed {path}: step {manifest.step} of {self._num_steps}")
            warn_of_versions(path, manifest.versions)
        return progress

    def _facts(self, progress: RunProgress) -> dict[str, Any]:
        """What a checkpoint saved now holds besides its tensors."""
        lora, shape = self._config.lora, self._trainee.base.shape
        return {
            "progress": {
                "best_step": progress.best_step,
                "best_loss": progress.best_loss if math.isfinite(progress.best_loss) else None,
                "evaluated_step": progress.evaluated_step,
                "data": self._loader.fingerprint if self._world.is_first else None,
                "num_steps": self._num_steps,
                "origin": {**dataclasses.asdict(self._origin), "kinds": list(self._origin.kinds)},
                **self._own_code,
            },
            "config": dump_config(self._config),
            "base": dataclasses.asdict(self._trainee.base.identity),
            "adapter": {
                "rank": lora.rank,
                "alpha": lora.alpha,
                "dropout": lora.dropout,
                "targets": list(lora.target_names()),
                "layers": list(lora.layer_indices(shape.num_layers)),
                "num_layers": shape.num_layers,
            }
            | ({} if lora.modules is None else {"modules": [module.model_dump() for module in lora.modules]}),
        }

    def _best(self, progress: RunProgress) -> int | None:
        """The step whose checkpoint is kept regardless of its age."""
        return progress.best_step if self._config.checkpoint.keep_best else None

    def _rotate(self, best: int | None) -> None:
        rotate(self.folder, keep=self._config.checkpoint.keep, best=best)

    def _specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape) for name, shape in self._trainee.adapters.shapes.items())
