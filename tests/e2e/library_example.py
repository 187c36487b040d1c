"""Trains, evaluates and merges: torchrun --nproc-per-node 2 library_example.py CONFIG OUT"""

import sys
from pathlib import Path

from dist_lora import api


def as_chat(record: dict) -> dict:
    """A data format: a record of ours from one of yours."""
    turns = [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]
    return {"messages": turns}


def share_of_words(expected: str, generated: str) -> float:
    """A metric: how many of the expected words the answer has."""
    return sum(word in generated.split() for word in expected.split()) / len(expected.split())


class Best(api.Callback):
    """A callback: the lowest loss of all steps."""

    loss = float("inf")

    def on_step(self, line: dict) -> None:
        self.loss = min(self.loss, line["loss"])


if __name__ == "__main__":  # rank by rank; the module is imported again for its format and metric
    config = api.load(
        sys.argv[1], "data.format=library_example:as_chat", "eval.metrics=[library_example:share_of_words]"
    )
    best = Best()
    run = api.train(config, callbacks=[best])
    values = api.evaluate(config, adapter=run.adapter)
    if api.is_first():
        report = api.merge(run.adapter, out=Path(sys.argv[2]))
        print(f"best loss {best.loss}, {values['share_of_words']}, {report.changed_tensors} matrices merged")
