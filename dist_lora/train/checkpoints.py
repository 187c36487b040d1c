"""The checkpoints of one run: what is saved besides tensors, which checkpoints are kept, and resuming from one."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_lora.base.model_folder import QUANTIZED_FROM_FILE
from dist_lora.base.tokenizer_files import hash_tokenizer_files, hash_vocabulary
from dist_lora.checkpoint.folders import step_folder
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.manifest import MANIFEST_FILE, Manifest, TensorSpec
from dist_lora.checkpoint.read import load_pieces
from dist_lora.checkpoint.saver import Saver
from dist_lora.checkpoint.write import check_room, rotate, save_checkpoint
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.errors import CheckpointError, DistLoraError, SaveError
from dist_lora.files import file_exists
from dist_lora.herd.unfrozen import unfrozen_weights
from dist_lora.lora.origin import RunOrigin
from dist_lora.lora.run_facts import RunFacts
from dist_lora.lora.state import Piece
from dist_lora.run_folder.records import sync_metrics, truncate_metrics
from dist_lora.run_folder.status import job_of
from dist_lora.train.build import Base, Trainee
from dist_lora.train.guard import guard_rules
from dist_lora.train.own_code import own_code_facts
from dist_lora.train.resume import (
    NOT_EVALUATED,
    VerifiedCheckpoint,
    best_of,
    last_evaluated,
    stale_evaluations,
    warn_of_versions,
    why_other_best,
)
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass
class RunProgress:
    """The progress of a run: what a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    evaluated_step: int = NOT_EVALUATED
    stale_evaluations: int = 0  # in a row, without a lower loss than the best
    # For the model card. None where the run began with a version that didn't count.
    tokens: int | None = 0
    target_tokens: int | None = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one's values

    def trained(self, step: int, *, tokens: int, target_tokens: int) -> None:
        """Note a step of all ranks."""
        self.step = step
        if self.tokens is not None and self.target_tokens is not None:
            self.tokens, self.target_tokens = self.tokens + tokens, self.target_tokens + target_tokens

    def evaluated(self, loss: float | None) -> bool:
        """Note an evaluation after the last step; whether its loss is the lowest so far.

        One before the first step doesn't count: of a run that learns nothing, the base isn't the best that was trained.

        Args:
            loss: that decides; None if there is no held-out data.
        """
        self.evaluated_step = self.step
        if self.step == 0 or loss is None:
            return False
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
            return True
        self.stale_evaluations += 1
        return False

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the run is to end, by ``eval.patience``."""
        return patience is not None and self.stale_evaluations >= patience


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
        self.data = RunFacts()  # about the data sets, on the first rank
        self.held_out: Mapping[str, str] = {}  # see ``why_other_best``

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

    def gather_now(self, step: int, *, root: Path, tokenizer: Path) -> Path:
        """The adapter as it is now, in PEFT's format, in a new folder in ``root``. All ranks call it.

        It takes the way of a save, in ``root``: no checkpoint of the run is made, replaced or deleted.

        Raises:
            SaveError, RankError: it can't be written.
        """
        world, out = self._world, (root / f"step-{step}").resolve()
        self.saver.wait()  # the disk is asked for one of the two at a time

        def begin() -> None:
            if root.exists():
                shutil.rmtree(root)  # of an evaluation that was killed

        def cannot(error: OSError) -> DistLoraError:
            return SaveError(f"{root}: the adapter to judge can't be written: {error}. The same command resumes")

        world.on_first("the adapter to judge", begin, os_error=cannot)
        share = {piece: values.detach().cpu().clone() for piece, values in self._trainee.adapters.share().items()}
        progress = RunProgress(step)
        saved = save_checkpoint(root, step=step, share=share, specs=self._specs(), world=world, **self._facts(progress))

        def gather() -> None:
            with world.progress.phase(f"step {step}, gathering the adapter", kind="long"):
                gather_adapter(saved, out=out, verify=False, tokenizer=tokenizer, has_learned=False)
                shutil.rmtree(saved)

        world.on_first("the adapter to judge", gather, os_error=cannot)
        return out

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
        best, stale = best_of(checkpoint), stale_evaluations(checkpoint, self._config, self.held_out)
        why_other = "" if best[0] is None else self._why_other_best(checkpoint, best[0])
        if why_other:
            best, stale = (None, math.inf), 0
        progress = RunProgress(manifest.step, *best, last_evaluated(checkpoint), stale)
        self._resume_facts(progress, path, manifest)
        self.saver.last, self.saved_step = path, manifest.step
        if self._world.is_first:
            truncate_metrics(self._run_folder, last_step=manifest.step, last_evaluation=progress.evaluated_step)
            log.info(f"resumed {path}: step {manifest.step} of {self._num_steps}")
            if why_other:
                log.warning(f"{why_other}: the best step is looked for anew from here on")
            warn_of_versions(path, manifest.versions)
        return progress

    def _why_other_best(self, checkpoint: VerifiedCheckpoint, best: int) -> str:
        """Why the best step so far doesn't count from here on, in words; "" if it does. All ranks call it."""

        def look() -> bytes:
            is_kept = checkpoint.path.parent.resolve() == self.folder.resolve()
            is_kept = is_kept and file_exists(self.folder / step_folder(best) / MANIFEST_FILE)
            return b"1" * is_kept

        why = why_other_best(checkpoint, self._config, self.held_out)
        if why or not self._config.checkpoint.keep_best or self._world.once("the best checkpoint", look):
            return why
        return f"the checkpoint of step {best}, the best until step {checkpoint.manifest.step}, wasn't kept"

    def _resume_facts(self, progress: RunProgress, path: Path, manifest: Manifest) -> None:
        """What the model card tells goes on from the checkpoint's; it doesn't know all of a run of an older version."""
        card = RunFacts.of_json(manifest.progress.get("card"), where=f"{path / MANIFEST_FILE}: progress.card")
        progress.tokens, progress.target_tokens = card.tokens, card.target_tokens
        if manifest.step == 0 and card.tokens is None:
            progress.tokens = progress.target_tokens = 0
        progress.evaluation = dict(card.evaluation)

    def _card(self, progress: RunProgress) -> dict[str, Any]:
        """What the model card tells besides the config; see ``checkpoint.gather.run_facts``."""
        finite = {name: value for name, value in progress.evaluation.items() if math.isfinite(value)}
        facts = dataclasses.replace(
            self.data,
            tokens=progress.tokens,
            target_tokens=progress.target_tokens,
            evaluation=finite,
            evaluated_step=progress.evaluated_step if finite else None,
        )
        return facts.to_json()

    def _facts(self, progress: RunProgress) -> dict[str, Any]:
        """What a checkpoint saved now holds besides its tensors."""
        lora, shape = self._config.lora, self._trainee.base.shape
        unfrozen = unfrozen_weights(self._config, shape)
        return {
            "progress": {
                "best_step": progress.best_step,
                "best_loss": progress.best_loss if math.isfinite(progress.best_loss) else None,
                "evaluated_step": progress.evaluated_step,
                "stale_evaluations": progress.stale_evaluations,
                "best_set": self._config.eval.best_set,
                "held_out": dict(self.held_out),
                "begun_by": [job_of(os.environ)[0], str(self._config.checkpoint.resume)],
                "data": self._loader.fingerprint if self._world.is_first else None,
                "num_steps": self._num_steps,
                "card": self._card(progress),
                "origin": self._origin.to_json(),
                "weight_norms": {name: float(f"{norm:.7g}") for name, norm in self._trainee.weight_norms.items()},
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
            | ({} if lora.modules is None else {"modules": [module.model_dump() for module in lora.modules]})
            | ({} if not lora.train_tokens else {"train_tokens": list(lora.token_ids())})
            | ({} if not unfrozen else {"unfrozen": list(unfrozen)}),
        }

    def _best(self, progress: RunProgress) -> int | None:
        """The step whose checkpoint is kept regardless of its age."""
        return progress.best_step if self._config.checkpoint.keep_best else None

    def _rotate(self, best: int | None) -> None:
        rotate(self.folder, keep=self._config.checkpoint.keep, best=best)

    def _specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape) for name, shape in self._trainee.adapters.shapes.items())


def run_origin(config: Config, base: Base, kinds: Sequence[str]) -> RunOrigin:
    """What an adapter records of its run; ``kinds``: see ``Encoded.kind``."""
    template = getattr(base.tokenizer, "chat_template", None)
    # A quantized copy has its original's identity, and is the base all the same.
    is_of_hub = base.identity.revision is not None and not file_exists(base.folder / QUANTIZED_FROM_FILE)
    guard = guard_rules(config, base, augments=False)
    return RunOrigin(
        model=base.identity.name if is_of_hub else str(base.folder.resolve()),
        revision=base.identity.revision if is_of_hub else None,
        quant=config.model.quant,
        kinds=tuple(kinds),
        chat_template=template if isinstance(template, str) else None,
        tokenizer=hash_tokenizer_files(base.folder),
        vocabulary=hash_vocabulary(base.folder),
        guard_version=guard.version if guard is not None else None,
        guard_categories=tuple((one.name, one.description) for one in guard.categories) if guard is not None else (),
    )
