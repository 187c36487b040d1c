"""The training loop: steps, evaluations and saves in order, and stopping on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.errors import SaveError
from dist_lora.evaluation.predictions import Predictions
from dist_lora.profile.recorder import Recorder
from dist_lora.run_folder.samples import NUM_KEPT, SAMPLES_FILE, write_samples
from dist_lora.train.build import Trainee
from dist_lora.train.callbacks import Callbacks
from dist_lora.train.checkpoints import RunCheckpoints, RunProgress
from dist_lora.train.evaluating import HeldOutSets, evaluate_sets
from dist_lora.train.garbage import collected_between_steps
from dist_lora.train.judge import OWN_NAMES, Interrupted, Judge
from dist_lora.train.meter import Meter
from dist_lora.train.resume import VerifiedCheckpoint
from dist_lora.train.signals import Stopping, StopRequest
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World


class Run:
    """One training run on this rank, from its first step to its last. Independent of engine and launcher."""

    def __init__(
        self,
        config: Config,
        trainee: Trainee,
        *,
        loader: Loader,
        held_out: HeldOutSets | None,
        num_steps: int,
        folder: Path,
        world: World,
    ) -> None:
        self.config, self.trainee, self.num_steps = config, trainee, num_steps
        self.recorder: Recorder | None = None  # on a rank that makes a profile
        self.callbacks: Callbacks | None = None  # on the first rank, where there are any
        self._world, self._held_out, self._folder = world, held_out or {}, folder
        trainee.adapters.start_training(config.optim)
        self.progress = RunProgress()
        self.checkpoints = RunCheckpoints(
            config, trainee, loader=loader, num_steps=num_steps, folder=folder, world=world
        )
        self.saver = self.checkpoints.saver
        self._judge = None
        if config.eval.command is not None:
            self._judge = Judge(
                config, folder, self.checkpoints, tokenizer=trainee.base.folder, save=self._save_and_wait, world=world
            )
        self.step = TrainStep(config, trainee, loader=loader, num_steps=num_steps, saver=self.saver, world=world)

    def resume(self, checkpoint: VerifiedCheckpoint) -> None:
        """Load a checkpoint; see ``RunCheckpoints.resume``."""
        self.progress = self.checkpoints.resume(checkpoint)

    def save(self) -> None:
        """Start writing the checkpoint of the last step; see ``RunCheckpoints.save``."""
        self.checkpoints.save(self.progress)

    def _save_and_wait(self) -> None:
        self.save()
        self.saver.wait()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to train: all steps are done, or ``eval.patience`` is used up."""
        is_out_of_patience = self.progress.is_out_of_patience(self.config.eval.patience)
        return self.progress.step >= self.num_steps or is_out_of_patience

    def train(self, meter: Meter | None, request: StopRequest) -> None:
        """Train to the last step, or until ``eval.patience`` is used up.

        Raises:
            StoppedOnRequest: after a save, if any rank was asked to stop.
        """
        with collected_between_steps() as collect_after:
            self._train(meter, request, collect_after)

    def _train(self, meter: Meter | None, request: StopRequest, collect_after: Callable[[int], None]) -> None:
        section = self.config.checkpoint
        stopping = Stopping(self._world, request, self.saver, resume=section.resume)
        self.trainee.model.train()
        self.checkpoints.check_room()
        if section.save_at_start and self.checkpoints.saved_step is None:
            self.save()

        def interrupt(step: int) -> NoReturn:
            stopping.begin()
            self.save()  # of the previous step: nothing of this one is kept
            stopping.stop(f"during step {step}/{self.num_steps} (it will be redone)")

        longest_s = 0.0  # of a step with all that is done before the next one
        # Before the first step, or the previous attempt was asked to stop before it had evaluated.
        if self._is_to_evaluate() and not self._evaluate(meter, stopping):
            stopping.begin()
            self.save()
            stopping.stop(f"at step {self.progress.step}/{self.num_steps}")
        while not self.has_ended:
            started_s = time.monotonic()
            step = self.progress.step + 1
            with self.recorder.around(step) if self.recorder is not None else contextlib.nullcontext():
                line, is_asked = self.step.take(
                    step, is_asked=stopping.is_asked, interrupt=interrupt, longest_s=longest_s
                )
            self.progress.trained(step, tokens=line["tokens"], target_tokens=line["target_tokens"])
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
            if is_to_save or is_asked or self.has_ended:
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
        """Whether an evaluation is due after the last step, and wasn't done yet."""
        section, step = self.config.eval, self.progress.step
        is_due = section.at_start if step == 0 else step == self.num_steps or step % section.every == 0
        has_any = bool(self._held_out) or self._judge is not None
        return has_any and is_due and self.progress.evaluated_step != step

    def _evaluate(self, meter: Meter | None, stopping: Stopping) -> bool:
        """Evaluate all that there is; False if any rank was asked to stop during it, and the evaluation is discarded."""
        section, step = self.config.eval, self.progress.step
        self._world.progress.now(f"step {step}, evaluating")

        def check_stop() -> None:
            if self._world.any(stopping.is_asked()):
                raise Interrupted

        try:
            evaluation = evaluate_sets(
                self.trainee, self._held_out, config=self.config, world=self._world, check_stop=check_stop
            )
            values = evaluation.values()
            if self._judge is not None:
                values |= self._judge.numbers(step, is_asked=stopping.is_asked, taken=OWN_NAMES | values.keys())
        except Interrupted:
            return False
        # Recorded before a checkpoint says that it was done: the next start doesn't evaluate this step again.
        if evaluation.matches:
            self._keep_samples(step, Predictions(self._folder / SAMPLES_FILE, evaluation.answers))
        if meter is not None:
            meter.evaluated(step, values, tool_calls=evaluation.tool_counts())
        self.progress.evaluation = values
        if self.progress.evaluated(evaluation.deciding_loss(section.best_set)) and self.config.checkpoint.keep_best:
            self.save()
        return True

    def _keep_samples(self, step: int, samples: Predictions) -> None:
        """Write some answers to the run's folder, for its report. All ranks call it."""
        answers = samples.first(NUM_KEPT, self._world)
        self._world.on_first(
            "the answers of samples",
            lambda: write_samples(self._folder, step=step, answers=answers),
            os_error=lambda error: SaveError(f"{samples.path}: can't be written: {error}. The same command resumes"),
        )
