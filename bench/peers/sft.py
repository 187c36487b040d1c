"""TRL's ``SFTTrainer`` with PEFT's adapters, as it is shipped: its own loop, which waits for a turn before each step."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench.peers.hf import build
from bench.peers.turns import Turns, read_batches, read_job


class InOrder(SFTTrainer):
    """Takes the documents as they come."""

    def _get_train_sampler(self, *given: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class InTurn(TrainerCallback):
    """Waits for a turn before a step, and reports after it."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._is_first = turns, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """See ``TrainerCallback``."""
        if self._is_first:
            self._turns.ready()
            self._is_first = False
        if not self._turns.wait():
            raise SystemExit

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        """See ``TrainerCallback``."""
        if logs and "loss" in logs:
            self._turns.end(loss=float(logs["loss"]))


def main() -> None:
    """One process."""
    turns, job = Turns(), read_job()
    steps = read_batches(job)
    documents = [document for step in steps for document in step]
    data = Dataset.from_dict(
        {"input_ids": [ids for ids, _ in documents], "labels": [labels for _, labels in documents]}
    )
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=len(steps[0]),
            num_train_epochs=1,
            max_length=None,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=build(job),
            args=options,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(job.model),
            callbacks=[InTurn(turns)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
