"""The loop: batches in, one adapter out; it does not know which engine or launcher it has."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lora.base.index import first_few
from dist_lora.checkpoint.manifest import Manifest, TensorSpec, read_manifest
from dist_lora.checkpoint.resume import load_pieces, newest_whole, verify
from dist_lora.checkpoint.shards import rotate, save_checkpoint, versions_here
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader, StepBatch
from dist_lora.data.tokens import TokenSet
from dist_lora.errors import CheckpointError, StoppedOnRequest, TrainingError
from dist_lora.lora.attach import layers_of
from dist_lora.parallel.world import World
from dist_lora.train.build import Trainee
from dist_lora.train.held_out import exact_match_of, loss_of
from dist_lora.train.meter import Meter, peak_bytes, truncate_metrics
from dist_lora.train.optim import lr_at
from dist_lora.train.signals import StopRequest

log = logging.getLogger("dist_lora")


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf


class Run:
    """One training run on this rank, from its first step here to its last. Built by ``train.main``."""

    def __init__(
        self,
        config: Config,
        trainee: Trainee,
        *,
        loader: Loader,
        held_out: TokenSet | None,
        num_steps: int,
        folder: Path,
        world: World,
    ) -> None:
        self.config, self.trainee, self.world = config, trainee, world
        self.loader, self.held_out, self.num_steps = loader, held_out, num_steps
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.adapters = trainee.adapters
        self.adapters.start_training(config.optim)
        self.progress = Progress()
        self.last_saved: Path | None = None

    def train(self, meter: Meter | None, stop: StopRequest) -> None:
        """Train to the last step. Raises ``StoppedOnRequest`` after a save where any rank was asked to stop."""
        section = self.config.checkpoint
        self.trainee.model.train()
        if section.save_at_start and self.last_saved is None:
            self.save()
        while self.progress.step < self.num_steps:
            step = self.progress.step + 1
            line, is_asked = self._step(step, stop)
            self.progress.step = step
            is_last = step == self.num_steps
            is_to_save = is_last or is_asked or step % section.every == 0
            if step == 1 or is_to_save:
                self._check_copies(step)
            if meter is not None:
                self.world.progress.now(f"step {step}, writing it down", kind="host")
                meter.step(line)
            if self.held_out is not None and (is_last or step % self.config.eval.every == 0):
                self._evaluate(step, meter)
            if is_to_save:
                self.save()
            if is_asked and not is_last:
                raise StoppedOnRequest(
                    f"stopped at step {step} of {self.num_steps} on {stop.signal_name or 'another rank'}'s request; "
                    f"saved {self.last_saved}. The same command goes on from there."
                )

    def _step(self, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics and whether any rank was asked to stop."""
        started_s = time.monotonic()
        self.world.progress.now(f"step {step}, reading its data", kind="host")
        batch = self.loader.batch(step - 1)
        self.adapters.begin_step()
        losses = [self._micro_batch(step, i, batch) for i in range(len(batch.micro_batches))]
        self.world.progress.now(f"step {step}, its update")
        loss_sum = torch.stack(losses).sum()
        scalars = torch.stack((loss_sum, loss_sum.new_tensor(float(stop.is_asked))))
        self.adapters.reduce(scalars)
        loss = float(scalars[0]) / batch.target_tokens
        lr = lr_at(step, section=self.config.optim, num_steps=self.num_steps)
        if lr > 0 and math.isfinite(loss):
            self._check_gradients(step)
        grad_norm = self.adapters.step(lr)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_at_not_finite(step, batch, losses, loss, grad_norm)
        if step == 1 and self.world.is_first:
            _warn_of_first_loss(loss, vocab=self.trainee.base.shape.vocab)
        step_s = time.monotonic() - started_s
        line = {
            "step": step,
            "epoch": batch.epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "target_tokens": batch.target_tokens,
            "tokens": batch.tokens,
            "tokens_per_s": batch.tokens / step_s,
            "step_s": step_s,
            "peak_bytes": peak_bytes(self.world.device),
        }
        return line, bool(scalars[1] > 0)

    def _micro_batch(self, step: int, index: int, batch: StepBatch) -> Tensor:
        """Forward and backward of one micro-batch; its gradient counts for its share of the step's target tokens."""
        self.world.progress.now(f"step {step}, micro-batch {index + 1} of {len(batch.micro_batches)}")
        if self.config.lora.dropout:
            # Keyed by what is computed, not by what was computed before: a resumed run draws the same masks.
            torch.manual_seed(hash((self.config.train.seed, step, self.world.world_rank, index)) % 2**63)
        loss = self.trainee.run(batch.micro_batches[index])
        self.adapters.backward(loss / batch.target_tokens, is_last=index == len(batch.micro_batches) - 1)
        return loss.detach()

    def _check_gradients(self, step: int) -> None:
        """Raise ``TrainingError``, naming them, where the first steps' gradients did not reach trained tensors.

        At the first step B alone moves (A's gradient is zero as long as B is), at the second A does too.
        """
        half = {1: "lora_B", 2: "lora_A"}.get(step)
        if half is None:
            return
        dead = self.adapters.without_gradient(half)
        error = None
        if dead:
            error = TrainingError(
                f"step {step}: {len(dead)} of {len(self.adapters.tensors) // 2} {half} tensors got no gradient, in "
                f"{layers_of(dead)}: {first_few(dead)}. Nothing that they are beside can learn; the graph behind them "
                "is cut."
            )
        self.world.agree(f"step {step}", error)

    def _check_copies(self, step: int) -> None:
        """Raise ``TrainingError`` where ranks that train the same adapters have come to different ones."""
        if not self.adapters.copies_agree():
            raise TrainingError(
                f"step {step}: the adapters are not the same on all ranks that hold them: a rank has other weights, "
                "other data or a faulty device. Nothing of this step was saved: the same command goes on from the last checkpoint."
            )

    def _stop_at_not_finite(
        self, step: int, batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float
    ) -> None:
        """End the run on all ranks, naming the samples; every rank gets here, since the sums are everyone's."""
        mine = [
            sample
            for micro, value in zip(batch.micro_batches, losses, strict=True)
            if not value.isfinite()
            for sample in micro.sample_ids
        ]
        saved = f"The last checkpoint is {self.last_saved}." if self.last_saved else "Nothing was saved yet."
        tail = f"Nothing of this step was kept. {saved}"
        error = None
        if mine:
            error = TrainingError(f"step {step}: the loss of {_samples(mine)} is not finite. {tail}")
        self.world.agree(f"step {step}", error)
        error = TrainingError(
            f"step {step}: the gradient is not finite (its norm is {grad_norm}, the loss {loss}) in a batch "
            f"of {_samples(batch.sample_ids)}. {tail}"
        )
        self.world.agree(f"step {step}", error)

    def _evaluate(self, step: int, meter: Meter | None) -> None:
        assert self.held_out is not None
        self.world.progress.now(f"step {step}, evaluating")
        held_out = loss_of(self.trainee, self.held_out, config=self.config, world=self.world)
        values = {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
        if self.config.eval.exact_match:
            match = exact_match_of(self.trainee, self.held_out, config=self.config, world=self.world)
            values["eval_exact_match"] = match.correct / match.total
        if held_out.loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = held_out.loss, step
            if self.config.checkpoint.keep_best:
                self.save()
        if meter is not None:
            meter.evaluated(step, values)

    # What is saved, and what a start takes up again

    def save(self) -> Path:
        """Write this step's checkpoint, all ranks together, and drop those that are no longer kept."""
        section, step = self.config.checkpoint, self.progress.step
        path = self.checkpoints / f"step-{step:08d}"
        if self.last_saved == path:
            return path
        base = self.trainee.base.identity
        lora = self.config.lora
        self.last_saved = save_checkpoint(
            self.checkpoints,
            step=step,
            share=self.adapters.share(),
            specs=self._specs(),
            world=self.world,
            progress={"best_step": self.progress.best_step, "best_loss": _plain(self.progress.best_loss)},
            config=dump_config(self.config),
            base=dataclasses.asdict(base),
            adapter={
                "rank": lora.rank,
                "alpha": lora.alpha,
                "dropout": lora.dropout,
                "targets": list(lora.target_names()),
                "layers": list(lora.layer_indices(self.trainee.base.shape.num_layers)),
                "num_layers": self.trainee.base.shape.num_layers,
            },
        )
        if self.world.is_first:
            best = self.progress.best_step if section.keep_best else None
            rotate(self.checkpoints, keep=section.keep, best=best)
        return self.last_saved

    def _specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape) for name, shape in self.adapters.shapes.items())

    def resume(self, path: Path) -> None:
        """Take up what ``checkpoint_to_resume`` found."""
        self.world.progress.now(f"resuming {path.name}", kind="long")
        manifest = read_manifest(path)
        self._check_same(path, manifest)
        self.adapters.restore(load_pieces(path, manifest, self.adapters.pieces()), num_steps=manifest.step)
        best = manifest.progress.get("best_loss")
        self.progress = Progress(manifest.step, manifest.progress.get("best_step"), math.inf if best is None else best)
        self.last_saved = path
        if self.world.is_first:
            truncate_metrics(self.folder, last_step=manifest.step)
            log.info(f"resumed {path}: step {manifest.step} of {self.num_steps}")
            _warn_of_versions(path, manifest.versions)

    def _check_same(self, path: Path, manifest: Manifest) -> None:
        if manifest.tensors != self._specs():
            raise CheckpointError(
                f"{path} holds {len(manifest.tensors)} trained tensors and this config attaches "
                f"{len(self._specs())}, or their names or shapes differ: it is another run's checkpoint"
            )


def checkpoint_to_resume(config: Config, folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint of a run, or what ``checkpoint.resume`` names, verified; None if there is none.

    All ranks call it, before they load anything.

    Raises:
        CheckpointError: what is named is damaged, or none of the run's is whole.
    """
    wanted, root = config.checkpoint.resume, folder / "checkpoints"
    world.progress.now("looking for a checkpoint", kind="long")
    if wanted == "auto":
        return newest_whole(root, world)
    if wanted == "never":
        leftover = next(root.glob("step-*"), None) if world.is_first else None
        if leftover is not None:
            log.warning(f"checkpoint.resume: never: beginning anew beside {leftover}")
        return None
    error: CheckpointError | None = None
    if world.is_first:
        try:
            verify(wanted)
        except CheckpointError as caught:
            error = caught
    world.agree("checkpoint.resume", error)
    return wanted


def _samples(ids: Sequence[int]) -> str:
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _warn_of_first_loss(loss: float, *, vocab: int) -> None:
    """Say so where the base predicts the data much worse than a guess among all tokens would."""
    guess = math.log(vocab)
    if loss > 2 * guess:
        log.warning(
            f"step 1: the loss is {loss:.2f}, and a guess among the {vocab:,} tokens has {guess:.2f}: the base's weights "
            "or the chat template look wrong. The run goes on; train --dry-run shows a sample as the model sees it"
        )


def _warn_of_versions(path: Path, then: Mapping[str, str]) -> None:
    """Say so where what computes a run is of another minor version than when it was saved."""
    now = versions_here()
    others = [
        f"{name} {then[name]} then, {now[name]} now"
        for name in ("torch", "transformers")
        if name in then and then[name].split(".")[:2] != now[name].split(".")[:2]
    ]
    if others:
        log.warning(
            f"{path} was saved by other versions: {'; '.join(others)}. The run goes on, and its losses may not be "
            "those it would have had"
        )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
