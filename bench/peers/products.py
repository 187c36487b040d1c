"""The products with frozen weights that a step can't do without, and nothing else: the limit of any trainer's speed.

For each linear of the layers ``x W^T`` and ``dy W`` (the latter not for the first layer's q, k and v, before which nothing is
trained), and the same for the head, of the tokens that have a target; in memory that is allocated once.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench.peers.turns import Turns, read_batches, read_job
from dist_lora.herd.shape import Shape
from dist_lora.layout.activations import rows_of_slice


def main() -> None:
    """One process."""
    turns, job = Turns(), read_job()
    shape = Shape.from_config(json.loads((Path(job.model) / "config.json").read_text()), where=job.model)
    documents = read_batches(job)[0]
    tokens = sum(len(ids) for ids, _ in documents)
    targets = sum(label != -100 for _, labels in documents for label in labels[1:])
    widths = shape.linear_shapes()
    weights = [
        {name: torch.randn(out, width) * 0.02 for name, (out, width) in widths.items()} for _ in range(shape.num_layers)
    ]
    inputs = {width: torch.randn(tokens, width) for _, width in widths.values()}
    outputs = {out: torch.randn(tokens, out) for out, _ in widths.values()}
    d_outputs = {out: torch.randn(tokens, out) for out in outputs}
    d_inputs = {width: torch.empty(tokens, width) for width in inputs}
    head, hidden, gradient = torch.randn(shape.vocab, shape.hidden), *(torch.randn(tokens, shape.hidden) for _ in "12")
    rows = rows_of_slice(shape.vocab, item_bytes=4)
    logits = torch.empty(rows, shape.vocab)
    turns.ready()
    for _ in turns:
        for layer in weights:
            for weight in layer.values():
                torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])
        for first in range(0, targets, rows):
            part = slice(first, min(first + rows, targets))
            of_rows = logits[: part.stop - part.start]
            torch.mm(hidden[part], head.t(), out=of_rows)
            torch.mm(of_rows, head, out=gradient[part])
        for index, layer in enumerate(weights):
            for name, weight in layer.items():
                if index or name not in ("q_proj", "k_proj", "v_proj"):
                    torch.mm(d_outputs[weight.shape[0]], weight, out=d_inputs[weight.shape[1]])
        turns.end()


if __name__ == "__main__":
    main()
