"""The training loop: steps, evaluations and saves in order, and stopping on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.data.token_set import TokenSet
from dist_lora.profile.recorder import Recorder
from dist_lora.train.build import Trainee
from dist_lora.train.callbacks import Callbacks
from dist_lora.train.checkpoints import RunCheckpoints, RunProgress
from dist_lora.train.garbage import collected_between_steps
from dist_lora.train.held_out import exact_match_of, loss_of
from dist_lora.train.meter import Meter
from dist_lora.train.resume import VerifiedCheckpoint
from dist_lora.train.signals import Stopping, StopRequest
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World


class _EvaluationInterrupted(Exception):
    """An evaluation ends early, on all ranks, since one was asked to stop."""


class Run:
    """One training run on this rank, from its first step to its last. Independent of engine and launcher."""

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
        self.recorder: Recorder | None = None  # on a rank that makes a profile
        self.callbacks: Callbacks | None = None  # on the first rank, where there are any
        self._world, self._held_out = world, held_out
        trainee.adapters.start_training(config.optim)
        self.progress = RunProgress()
        self.checkpoints = RunCheckpoints(
            config, trainee, loader=loader, num_steps=num_steps, folder=folder, world=world
        )
        self.saver = self.checkpoints.saver
        self.step = TrainStep(config, trainee, loader=loader, num_steps=num_steps, saver=self.saver, world=world)

    def resume(self, checkpoint: VerifiedCheckpoint) -> None:
        """Load a checkpoint; see ``RunCheckpoints.resume``."""
        self.progress = self.checkpoints.resume(checkpoint)

    def save(self) -> None:
        """Start writing the checkpoint of the last step; see ``RunCheckpoints.save``."""
        self.checkpoints.save(self.progress)

    def train(self, meter: Meter | None, request: StopRequest) -> None:
        """Train to the last step.

        Raises:
            StoppedOnRequest: after a save, if any rank was asked to stop.
        """
        with collected_between_steps() as collect_after:
            self._train(meter, request, collect_after)

    def _train(self, meter: Meter | None, request: StopRequest, collect_after: Callable[[int], None]) -> None:
        section = self.config.checkpoint
        stopping = Stopping(self._world, request, self.saver)
        self.trainee.model.train()
        self.checkpoints.check_room()
        if section.save_at_start and self.checkpoints.saved_step is None:
            self.save()

        def interrupt(step: int) -> NoReturn:
            stopping.begin()
            self.save()  # of the previous step: nothing of this one is kept
            stopping.stop(f"during step {step}/{self.num_steps} (it will be redone)")

        longest_s = 0.0  # of a step with all that is done before the next one
        # The previous attempt was asked to stop before it had evaluated.
        if self._is_to_evaluate() and not self._evaluate(meter, stopping):
            stopping.stop(f"at step {self.progress.step}/{self.num_steps}")
        while self.progress.step < self.num_steps:
            started_s = time.monotonic()
            step = self.progress.step + 1
            with self.recorder.around(step) if self.recorder is not None else contextlib.nullcontext():
                line, is_asked = self.step.take(
                    step, is_asked=stopping.is_asked, interrupt=interrupt, longest_s=longest_s
                )
            self.progress.step = step
            is_last = step == self.num_steps
            is_to_save = is_last or is_asked or step % section.every == 0
            if step == 1 or is_to_save or self._is_to_evaluate():
                self.step.check_copies(step)
            if meter is not None:
                self._world.progress.now(f"step {step}, writing its metrics", kind="host")
                meter.step(line)
            if self._is_to_evaluate() and not is_asked:
                is_asked = not self._evaluate(meter, stopping)
            if is_asked:
                stopping.begin()
            if is_to_save or is_asked:
                self.save()
            self.tell_of_saves()
            collect_after(step)
            longest_s = max(longest_s, time.monotonic() - started_s)
            if is_asked and (not is_last or self._is_to_evaluate()):
                stopping.stop(f"at step {step}/{self.num_steps}")
        self.checkpoints.finish(self.progress)
        self.tell_of_saves()

    def tell_of_saves(self) -> None:
        """Tell the callbacks of a checkpoint that has become complete."""
        if self.callbacks is not None:
            self.callbacks.look_at(self.saver.last)

    def _is_to_evaluate(self) -> bool:
        """Whether the held-out set is due to be evaluated after the last step, and wasn't yet."""
        step = self.progress.step
        is_due = step > 0 and (step == self.num_steps or step % self.config.eval.every == 0)
        return self._held_out is not None and is_due and self.progress.evaluated_step != step

    def _evaluate(self, meter: Meter | None, stopping: Stopping) -> bool:
        """Evaluate the held-out set; False if any rank was asked to stop during it, and the evaluation is discarded."""
        assert self._held_out is not None
        step = self.progress.step
        self._world.progress.now(f"step {step}, evaluating")

        def check_stop() -> None:
            if self._world.any(stopping.is_asked()):
                raise _EvaluationInterrupted

        arguments: dict[str, Any] = {"config": self.config, "world": self._world, "check_stop": check_stop}
        try:
            held_out = loss_of(self.trainee, self._held_out, **arguments)
            values = {"eval_loss": held_out.loss, "eval_perplexity": held_out.perplexity}
            if self.config.eval.exact_match or self.config.eval.metrics:
                match = exact_match_of(self.trainee, self._held_out, **arguments)
                if self.config.eval.exact_match:
                    values["eval_exact_match"] = match.correct / match.total
                values |= {f"eval_{name}": mean for name, mean in match.metrics.items()}
        except _EvaluationInterrupted:
            return False
        self.progress.evaluated_step = step
        if held_out.loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = held_out.loss, step
            if self.config.checkpoint.keep_best:
                self.save()
        if meter is not None:
            meter.evaluated(step, values)
        return True
