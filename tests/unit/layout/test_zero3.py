"""What ZeRO-3 gathers, beside sums by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from dist_lora.herd.members import MEMBERS
from dist_lora.herd.shape import module_path
from dist_lora.layout.zero3 import Step, step_of

SHAPE = dataclasses.replace(MEMBERS["3.1-8b"].shape, num_layers=4)
LAYER = 2 * (SHAPE.weights_of_linears() + 2 * SHAPE.hidden)
HEAD = 2 * SHAPE.vocab * SHAPE.hidden
RANK = 8
ADAPTER = 4 * RANK * 2 * SHAPE.hidden  # on o_proj, in fp32


def step_with(layers: range, **others: Any) -> Step:
    """Adapters on o_proj of some layers."""
    ranks = tuple((module_path("o_proj", layer=layer), RANK) for layer in layers)
    settings = {"trained_rows": 0, "first_trained": min(layers), "num_ranks": 2, "is_on_host": False} | others
    return step_of(SHAPE, "none", 2, (), ranks, **settings)


def test_layers_that_are_alike_are_gathered_one_ahead() -> None:
    gathered = step_with(range(4)).gathered
    layer = LAYER + ADAPTER
    # Twice while it is copied out of its buffer; then beside the buffer of the next.
    assert gathered["forward", 1].fetching == gathered["forward", 1].computing == 2 * layer
    # After the last layer the norm and the head have a buffer together.
    norm = 2 * SHAPE.hidden
    assert gathered["forward", 3].computing == layer + norm + HEAD
    assert gathered["forward", "norm"].fetching == 2 * (norm + HEAD)


def test_where_layers_differ_the_head_comes_with_the_rest_of_the_last_one() -> None:
    gathered = step_with(range(3, 4)).gathered
    alike = step_with(range(4)).gathered
    # The buffer, with the head and a part of the layer, is there while both are copied out of it.
    assert gathered["forward", 3].fetching > 2 * HEAD + LAYER > alike["forward", 3].fetching
    assert gathered["forward", 3].computing > alike["forward", 3].computing + HEAD


def test_a_single_rank_copies_what_is_on_the_host_without_buffers() -> None:
    of_host, of_device = (
        step_with(range(4), num_ranks=1, is_on_host=is_on_host).gathered for is_on_host in (True, False)
    )
    layer = LAYER + ADAPTER
    assert of_host["forward", 1].fetching == layer and of_host["forward", 1].computing == 2 * layer
    assert {(held.fetching, held.computing) for held in of_device.values()} == {(0, 0)}


def test_gradients_wait_until_a_reduction_is_full() -> None:
    unfrozen = tuple(module_path("down_proj", layer=layer) for layer in range(4))
    gradients = step_of(
        SHAPE, "none", 2, unfrozen, (), trained_rows=0, first_trained=0, num_ranks=2, is_on_host=False
    ).gradients
    weight = 4 * SHAPE.hidden * SHAPE.ffn
    # The last layer's are reduced when the next one's come: both, and a copy of the first.
    assert gradients[3].waiting == 0 and gradients[3].reducing == 0
    assert gradients[2].waiting == weight and gradients[2].reducing == 3 * weight
