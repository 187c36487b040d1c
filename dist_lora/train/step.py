"""One optimizer step on this rank: its micro-batches, its update, and the checks of both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader, MicroBatch, StepBatch
from dist_lora.data.prefetch import StepsAhead, on_device
from dist_lora.errors import TrainingError
from dist_lora.lora.attach import layers_of
from dist_lora.profile.parts import mark
from dist_lora.text import first_few
from dist_lora.train.build import Trainee
from dist_lora.train.meter import device_memory, peak_bytes
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

LONG_STEP_S = 10.0  # a longer step is interrupted between two micro-batches if the run is asked to stop


class TrainStep:
    """Takes the optimizer steps of a run. All ranks make one and take the same steps."""

    def __init__(
        self, config: Config, trainee: Trainee, *, loader: Loader, num_steps: int, saver: Saver, world: World
    ) -> None:
        self._config, self._trainee, self._num_steps = config, trainee, num_steps
        self._batches = StepsAhead(loader, world.device)
        self._saver, self._world = saver, world
        self._adapters = trainee.adapters
        self.is_long = True  # until the first step is timed: ranks check for a stop between micro-batches

    def take(
        self,
        step: int,
        *,
        is_asked: Callable[[float], bool] = lambda needed_s: False,
        interrupt: Callable[[int], NoReturn] | None = None,
        longest_s: float = 0.0,
    ) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics, and whether any rank was asked to stop.

        Args:
            step: its number, from 1.
            is_asked: whether this rank is asked to stop, or will be within the given number of seconds.
            interrupt: called on all ranks with ``step`` if any is asked within a long step, of which nothing is kept.
            longest_s: the longest step so far, with all that is done before the next one.

        Raises:
            TrainingError: on all ranks: the loss or the gradient is not finite, or gradients did not arrive.
            SaveError: the save that was in flight has failed.
        """
        started_s = time.monotonic()
        self._world.progress.now(f"step {step}, reading its data", kind="host")
        with mark("data"):
            batch = self._batches.take(step - 1)
        self._adapters.begin_step()
        losses = []
        for index, micro_batch in enumerate(on_device(batch.micro_batches, self._world.device)):
            if interrupt is not None and self.is_long and self._world.any(is_asked(0.0)):
                interrupt(step)
            losses.append(self._micro_batch(step, index, batch, micro_batch))
        self._world.progress.now(f"step {step}, its update")
        scalars = self._summed(losses, [is_asked(longest_s), self._saver.has_failed, time.monotonic() - started_s])
        lr = lr_at(step, section=self._config.optim, num_steps=self._num_steps)
        if lr > 0:
            self._check_gradients(step, scalars[0])
        with mark("optimizer"):
            norm = self._adapters.step(lr)
        self._prepare_next(step)
        # The only place in a step where the host waits for the device.
        loss, num_asked, num_failed, total_s, grad_norm = torch.cat((scalars.double(), norm[None])).tolist()
        if num_failed:
            self._saver.wait()  # raises on every rank
        self.is_long = total_s / self._world.world_size > LONG_STEP_S
        loss /= batch.target_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_at_not_finite(step, batch, losses, loss, grad_norm)
        if step == 1 and self._world.is_first:
            _warn_of_first_loss(loss, vocab=self._trainee.base.shape.vocab)
        line = self._line(step, batch, {"loss": loss, "grad_norm": grad_norm, "lr": lr}, time.monotonic() - started_s)
        return line, bool(num_asked)

    def _summed(self, losses: Sequence[Tensor], own: Sequence[float]) -> Tensor:
        """The losses' sum and ``own`` numbers of this rank, summed over all ranks with the gradients: fp32, on the device."""
        loss_sum = torch.stack(list(losses)).sum()
        # Pinned, so that the host doesn't wait here for all that is computed, and then once more for the sums.
        on_host = torch.tensor(own, dtype=loss_sum.dtype, pin_memory=loss_sum.is_cuda)
        scalars = torch.cat((loss_sum[None], on_host.to(loss_sum.device, non_blocking=True)))
        with mark("communication"):
            self._adapters.reduce(scalars)
        return scalars

    def _prepare_next(self, step: int) -> None:
        """Make the next step's batch while the device computes this one."""
        if step < self._num_steps:
            self._world.progress.now(f"step {step + 1}, reading its data", kind="host")
            with mark("data"):
                self._batches.prepare(step)
            self._world.progress.now(f"step {step}, its update")

    def _line(self, step: int, batch: StepBatch, values: dict[str, float], step_s: float) -> dict[str, Any]:
        """The line of metrics of a step that took ``step_s`` seconds."""
        return {
            "step": step,
            "epoch": batch.epoch,
            **values,
            "target_tokens": batch.target_tokens,
            "tokens": batch.tokens,
            "tokens_per_s": batch.tokens / step_s,
            "model_flops_per_s": self._flops(batch) / step_s / self._world.world_size,
            "step_s": step_s,
            "peak_bytes": peak_bytes(self._world.device),
            **device_memory(self._world.device),
            **self._saver.take_times(),
        }

    def _flops(self, batch: StepBatch) -> float:
        """Operations that the step needed, on all ranks; see ``Shape.flops``."""
        return self._trainee.base.shape.flops(
            tokens=batch.tokens,
            rows=batch.target_tokens,
            pairs=batch.pairs,
            trained_weights=self._adapters.num_elements,
            unfrozen_weights=self._adapters.num_unfrozen,
        )

    def check_copies(self, step: int) -> None:
        """Raise ``TrainingError`` if ranks that train copies of the same adapters have diverged."""
        if not self._adapters.copies_agree():
            self._saver.wait()
            raise TrainingError(
                f"step {step}: the adapters are not the same on all ranks that hold them: a rank has other weights, "
                "other data or a faulty device. This step was not saved: the same command resumes from the last "
                "checkpoint."
            )

    def _micro_batch(self, step: int, index: int, batch: StepBatch, micro_batch: MicroBatch) -> Tensor:
        """Forward and backward of one micro-batch; its loss is divided by all target tokens of the step."""
        self._world.progress.now(f"step {step}, micro-batch {index + 1} of {len(batch.micro_batches)}")
        if self._config.lora.dropout:
            # Seeded by the step's own numbers, not by earlier draws: a resumed run draws the same masks.
            torch.manual_seed(hash((self._config.train.seed, step, self._world.world_rank, index)) % 2**63)
        loss = self._trainee.run(micro_batch)
        self._adapters.backward(loss / batch.target_tokens, is_last=index == len(batch.micro_batches) - 1)
        return loss.detach()

    def _check_gradients(self, step: int, loss_sum: Tensor) -> None:
        """Raise ``TrainingError`` naming the trained tensors that got no gradient in the first steps.

        In the first step only B gets one (A's gradient is zero as long as B is), in the second A does too.
        """
        half = {1: "lora_B", 2: "lora_A"}.get(step)
        if half is None or not loss_sum.isfinite():
            return
        without = self._adapters.without_gradient(half)
        error = None
        if without:
            self._saver.wait()
            num_halves = sum(tensor.attribute == half for tensor in self._adapters.tensors)
            error = TrainingError(
                f"step {step}: {len(without)} of {num_halves} {half} tensors got no gradient, in "
                f"{layers_of(without)}: {first_few(without)}. They can't learn: the graph behind them is broken."
            )
        self._world.agree(f"step {step}", error)

    def _stop_at_not_finite(
        self, step: int, batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float
    ) -> None:
        """End the run on all ranks, naming the samples; every rank gets here, since the sums are the same on all."""
        self._saver.wait()
        mine = [
            sample
            for micro, value in zip(batch.micro_batches, losses, strict=True)
            if not value.isfinite()
            for sample in micro.sample_ids
        ]
        saved = f"The last checkpoint is {self._saver.last}." if self._saver.last else "Nothing was saved yet."
        tail = f"This step was not kept. {saved}"
        error = None
        if mine:
            error = TrainingError(f"step {step}: the loss of {_samples(mine)} is not finite. {tail}")
        self._world.agree(f"step {step}", error)
        error = TrainingError(
            f"step {step}: the gradient is not finite (its norm is {grad_norm}, the loss {loss}) in the batch "
            f"of {_samples(batch.sample_ids)}. {tail}"
        )
        self._world.agree(f"step {step}", error)


def _samples(ids: Sequence[int]) -> str:
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _warn_of_first_loss(loss: float, *, vocab: int) -> None:
    """Warn if the base predicts the data much worse than a uniform guess over all tokens."""
    guess = math.log(vocab)
    if loss > 2 * guess:
        log.warning(
            f"step 1: the loss is {loss:.2f}, and a uniform guess over the {vocab:,} tokens has {guess:.2f}: the "
            "base's weights or the chat template look wrong. The run continues; train --dry-run shows a sample as the "
            "model sees it"
        )
