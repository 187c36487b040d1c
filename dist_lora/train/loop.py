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

from dist_lora.checkpoint.manifest import TensorSpec
from dist_lora.checkpoint.read import load_pieces
from dist_lora.checkpoint.saver import Saver
from dist_lora.checkpoint.write import check_room, rotate, save_checkpoint
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader, StepBatch
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import CheckpointError, StoppedForGood, StoppedOnRequest, TrainingError
from dist_lora.lora.attach import layers_of
from dist_lora.lora.state import Piece
from dist_lora.run_folder.records import sync_metrics, truncate_metrics
from dist_lora.text import first_few
from dist_lora.train.build import Trainee
from dist_lora.train.held_out import exact_match_of, loss_of
from dist_lora.train.meter import Meter, peak_bytes
from dist_lora.train.resume import Found, best_of, last_evaluated, warn_of_versions
from dist_lora.train.schedule import lr_at
from dist_lora.train.signals import StopRequest
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

LONG_STEP_S = 10.0  # a step that takes longer is left between two micro-batches where the run is asked to stop


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    evaluated_step: int = 0


class _Asked(Exception):
    """An evaluation is left, on all ranks, since one was asked to stop."""


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
        self.saver = Saver(world)
        self._saved_step: int | None = None
        self.is_step_long = True  # so that ranks ask each other between micro-batches; until one is known
        self._stop_key = world.fresh_key("stop")
        self._own_reason = ""
        self._longest_s = 0.0  # of a step with all that comes before the next one

    def train(self, meter: Meter | None, stop: StopRequest) -> None:
        """Train to the last step. Raises ``StoppedOnRequest`` after a save where any rank was asked to stop."""
        section = self.config.checkpoint
        self.trainee.model.train()
        self._check_room()
        if section.save_at_start and self._saved_step is None:
            self.save()
        # The start before this one was asked to stop before it had evaluated.
        if self._is_to_evaluate() and not self._evaluate(meter, stop):
            self._stop(stop, f"at step {self.progress.step} of {self.num_steps}")
        while self.progress.step < self.num_steps:
            started_s = time.monotonic()
            step = self.progress.step + 1
            line, is_asked = self.take_step(step, stop)
            self.progress.step = step
            is_last = step == self.num_steps
            is_to_save = is_last or is_asked or step % section.every == 0
            if step == 1 or is_to_save or self._is_to_evaluate():
                self._check_copies(step)
            if meter is not None:
                self.world.progress.now(f"step {step}, writing it down", kind="host")
                meter.step(line)
            if self._is_to_evaluate() and not is_asked:
                is_asked = not self._evaluate(meter, stop)
            if is_to_save or is_asked:
                self.save()
            self._longest_s = max(self._longest_s, time.monotonic() - started_s)
            if is_asked and (not is_last or self._is_to_evaluate()):
                self._stop(stop, f"at step {step} of {self.num_steps}")
        self.saver.wait()
        if self.world.is_first:
            self._rotate(self._best())  # a run that was killed after its last save has left that one's to this start

    def take_step(self, step: int, stop: StopRequest) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics and whether any rank was asked to stop."""
        started_s = time.monotonic()
        self.world.progress.now(f"step {step}, reading its data", kind="host")
        batch = self.loader.batch(step - 1)
        self.adapters.begin_step()
        losses = []
        for i in range(len(batch.micro_batches)):
            if self.is_step_long and self.world.any(bool(self._reason(stop))):
                self.save()  # of the step before: nothing of this one is kept
                self._stop(stop, f"in step {step} of {self.num_steps}, which begins again,")
            losses.append(self._micro_batch(step, i, batch))
        self.world.progress.now(f"step {step}, its update")
        loss_sum = torch.stack(losses).sum()
        own = [bool(self._reason(stop, needed_s=self._longest_s)), self.saver.has_failed, time.monotonic() - started_s]
        scalars = torch.cat((loss_sum[None], loss_sum.new_tensor(own)))
        self.adapters.reduce(scalars)
        loss, asked, failed, total_s = scalars.tolist()
        if failed:
            self.saver.wait()  # which raises on every rank
        self.is_step_long = total_s / self.world.world_size > LONG_STEP_S
        loss /= batch.target_tokens
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
            **self.saver.take_times(),
        }
        return line, bool(asked)

    def _reason(self, stop: StopRequest, *, needed_s: float = 0.0) -> str:
        """What asks this rank to stop, which the first rank then can tell; "" where nothing does."""
        reason = stop.reason(needed_s=needed_s + 2 * self.saver.longest_s)
        if reason and not self._own_reason:
            who = f" to rank {self.world.world_rank}" if self.world.world_size > 1 else ""
            self._own_reason = f"{reason}{who}"
            self.world.share(f"{self._stop_key}/{self.world.world_rank}", self._own_reason.encode())
        return reason

    def _stop(self, stop: StopRequest, where: str) -> None:
        """End the run after its save, on all ranks."""
        self.saver.wait()
        kind = StoppedForGood if stop.obeyed() else StoppedOnRequest
        reason = self._own_reason
        if self.world.store is not None:
            keys = [f"{self._stop_key}/{rank}" for rank in range(self.world.world_size)]
            reason = next(self.world.fetch(key).decode() for key in keys if self.world.store.check([key]))
        raise kind(f"stopped {where} on {reason}; saved {self.saver.last}. The same command goes on from there.")

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
            self.saver.wait()
            error = TrainingError(
                f"step {step}: {len(dead)} of {len(self.adapters.tensors) // 2} {half} tensors got no gradient, in "
                f"{layers_of(dead)}: {first_few(dead)}. Nothing that they are beside can learn; the graph behind them "
                "is cut."
            )
        self.world.agree(f"step {step}", error)

    def _check_copies(self, step: int) -> None:
        """Raise ``TrainingError`` where ranks that train the same adapters have come to different ones."""
        if not self.adapters.copies_agree():
            self.saver.wait()
            raise TrainingError(
                f"step {step}: the adapters are not the same on all ranks that hold them: a rank has other weights, "
                "other data or a faulty device. Nothing of this step was saved: the same command goes on from the last checkpoint."
            )

    def _stop_at_not_finite(
        self, step: int, batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float
    ) -> None:
        """End the run on all ranks, naming the samples; every rank gets here, since the sums are everyone's."""
        self.saver.wait()
        mine = [
            sample
            for micro, value in zip(batch.micro_batches, losses, strict=True)
            if not value.isfinite()
            for sample in micro.sample_ids
        ]
        saved = f"The last checkpoint is {self.saver.last}." if self.saver.last else "Nothing was saved yet."
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

    def _is_to_evaluate(self) -> bool:
        """Whether the step that was done last is one after which the held-out set is measured, and it wasn't yet."""
        step = self.progress.step
        is_due = step > 0 and (step == self.num_steps or step % self.config.eval.every == 0)
        return self.held_out is not None and is_due and self.progress.evaluated_step != step

    def _evaluate(self, meter: Meter | None, stop: StopRequest) -> bool:
        """Measure the held-out set; False where any rank was asked to stop meanwhile, and nothing of it counts."""
        assert self.held_out is not None
        step = self.progress.step
        self.world.progress.now(f"step {step}, evaluating")

        def ask() -> None:
            if self.world.any(bool(self._reason(stop))):
                raise _Asked

        given: dict[str, Any] = {"config": self.config, "world": self.world, "ask": ask}
        try:
            held_out = loss_of(self.trainee, self.held_out, **given)
            values = {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
            if self.config.eval.exact_match:
                match = exact_match_of(self.trainee, self.held_out, **given)
                values["eval_exact_match"] = match.correct / match.total
        except _Asked:
            return False
        self.progress.evaluated_step = step
        if held_out.loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = held_out.loss, step
            if self.config.checkpoint.keep_best:
                self.save()
        if meter is not None:
            meter.evaluated(step, values)
        return True

    # What is saved, and what a start takes up again

    def save(self) -> None:
        """Begin to write this step's checkpoint, all ranks together; ``saver.wait`` sees the end of it.

        Once it is whole, those that are no longer kept are dropped.
        """
        step = self.progress.step
        if self._saved_step == step:
            return
        self._saved_step = step
        best, facts = self._best(), self._facts()

        def write(world: World, share: Mapping[Piece, Tensor]) -> Path:
            if world.is_first:
                sync_metrics(self.folder)  # no checkpoint of a step whose line a power failure can take
            path = save_checkpoint(self.checkpoints, step=step, share=share, specs=self._specs(), world=world, **facts)
            if world.is_first:
                self._rotate(best)
            return path

        self.saver.start(self.adapters.share(), write)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors, as of now."""
        lora, shape = self.config.lora, self.trainee.base.shape
        return {
            "progress": {
                "best_step": self.progress.best_step,
                "best_loss": _plain(self.progress.best_loss),
                "evaluated_step": self.progress.evaluated_step,
                "data": self.loader.fingerprint if self.world.is_first else None,
                "num_steps": self.num_steps,
            },
            "config": dump_config(self.config),
            "base": dataclasses.asdict(self.trainee.base.identity),
            "adapter": {
                "rank": lora.rank,
                "alpha": lora.alpha,
                "dropout": lora.dropout,
                "targets": list(lora.target_names()),
                "layers": list(lora.layer_indices(shape.num_layers)),
                "num_layers": shape.num_layers,
            },
        }

    def _check_room(self) -> None:
        """Raise on all ranks where the disk can't hold the checkpoints that this run is to keep."""
        section, specs = self.config.checkpoint, self._specs()
        num_kept = section.keep + section.keep_best
        self.world.on_first("room for the checkpoints", lambda: check_room(self.checkpoints, specs, num_kept=num_kept))

    def _best(self) -> int | None:
        """The step whose checkpoint is kept however old it is."""
        return self.progress.best_step if self.config.checkpoint.keep_best else None

    def _rotate(self, best: int | None) -> None:
        """Drop the checkpoints that are no longer kept and what killed saves have left. On the first rank."""
        rotate(self.checkpoints, keep=self.config.checkpoint.keep, best=best)

    def _specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, shape) for name, shape in self.adapters.shapes.items())

    def resume(self, found: Found) -> None:
        """Take up what ``find_checkpoint`` found."""
        path, manifest = found.path, found.manifest
        self.world.progress.now(f"resuming {path.name}", kind="long")
        if manifest.tensors != self._specs():
            raise CheckpointError(
                f"{path} holds {len(manifest.tensors)} trained tensors and this config attaches "
                f"{len(self._specs())}, or their names or shapes differ: it is another run's checkpoint"
            )
        self.adapters.restore(load_pieces(path, manifest, self.adapters.pieces()), num_steps=manifest.step)
        self.progress = Progress(manifest.step, *best_of(found), last_evaluated(found))
        self.saver.last, self._saved_step = path, manifest.step
        if self.world.is_first:
            truncate_metrics(self.folder, last_step=manifest.step, last_evaluation=self.progress.evaluated_step)
            log.info(f"resumed {path}: step {manifest.step} of {self.num_steps}")
            warn_of_versions(path, manifest.versions)


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


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
