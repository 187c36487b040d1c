"""The loop: steps, evaluations and saves in their order, and the end on request."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.data.token_set import TokenSet
from dist_lora.train.build import Trainee
from dist_lora.train.checkpoints import RunCheckpoints, RunProgress
from dist_lora.train.held_out import exact_match_of, loss_of
from dist_lora.train.meter import Meter
from dist_lora.train.resume import Found
from dist_lora.train.signals import Stopping, StopRequest
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World


class _Asked(Exception):
    """An evaluation is left, on all ranks, since one was asked to stop."""


class Run:
    """One training run on this rank, from its first step here to its last. It knows neither its engine nor its launcher."""

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
        self.config, self.trainee, self.num_steps = config, trainee, num_steps
        self._world, self._held_out = world, held_out
        trainee.adapters.start_training(config.optim)
        self.progress = RunProgress()
        self.checkpoints = RunCheckpoints(
            config, trainee, loader=loader, num_steps=num_steps, folder=folder, world=world
        )
        self.saver = self.checkpoints.saver
        self.step = TrainStep(config, trainee, loader=loader, num_steps=num_steps, saver=self.saver, world=world)

    def resume(self, found: Found) -> None:
        """Take up what ``find_checkpoint`` found; see ``RunCheckpoints.resume``."""
        self.progress = self.checkpoints.resume(found)

    def save(self) -> None:
        """Begin to write the checkpoint of the step that was done last; see ``RunCheckpoints.save``."""
        self.checkpoints.save(self.progress)

    def train(self, meter: Meter | None, request: StopRequest) -> None:
        """Train to the last step.

        Raises:
            StoppedOnRequest: after a save, where any rank was asked to stop.
        """
        section = self.config.checkpoint
        stopping = Stopping(self._world, request, self.saver)
        self.trainee.model.train()
        self.checkpoints.check_room()
        if section.save_at_start and self.checkpoints.saved_step is None:
            self.save()

        def interrupt(step: int) -> NoReturn:
            self.save()  # of the step before: nothing of this one is kept
            stopping.stop(f"in step {step} of {self.num_steps}, which begins again,")

        longest_s = 0.0  # of a step with all that comes before the next one
        # The start before this one was asked to stop before it had evaluated.
        if self._is_to_evaluate() and not self._evaluate(meter, stopping):
            stopping.stop(f"at step {self.progress.step} of {self.num_steps}")
        while self.progress.step < self.num_steps:
            started_s = time.monotonic()
            step = self.progress.step + 1
            line, is_asked = self.step.take(step, is_asked=stopping.is_asked, interrupt=interrupt, longest_s=longest_s)
            self.progress.step = step
            is_last = step == self.num_steps
            is_to_save = is_last or is_asked or step % section.every == 0
            if step == 1 or is_to_save or self._is_to_evaluate():
                self.step.check_copies(step)
            if meter is not None:
                self._world.progress.now(f"step {step}, writing it down", kind="host")
                meter.step(line)
            if self._is_to_evaluate() and not is_asked:
                is_asked = not self._evaluate(meter, stopping)
            if is_to_save or is_asked:
                self.save()
            longest_s = max(longest_s, time.monotonic() - started_s)
            if is_asked and (not is_last or self._is_to_evaluate()):
                stopping.stop(f"at step {step} of {self.num_steps}")
        self.checkpoints.finish(self.progress)

    def _is_to_evaluate(self) -> bool:
        """Whether the step that was done last is one after which the held-out set is measured, and it wasn't yet."""
        step = self.progress.step
        is_due = step > 0 and (step == self.num_steps or step % self.config.eval.every == 0)
        return self._held_out is not None and is_due and self.progress.evaluated_step != step

    def _evaluate(self, meter: Meter | None, stopping: Stopping) -> bool:
        """Measure the held-out set; False where any rank was asked to stop meanwhile, and nothing of it counts."""
        assert self._held_out is not None
        step = self.progress.step
        self._world.progress.now(f"step {step}, evaluating")

        def ask() -> None:
            if self._world.any(stopping.is_asked()):
                raise _Asked

        given: dict[str, Any] = {"config": self.config, "world": self._world, "ask": ask}
        try:
            held_out = loss_of(self.trainee, self._held_out, **given)
            values = {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
            if self.config.eval.exact_match:
                match = exact_match_of(self.trainee, self._held_out, **given)
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
