"""What a run writes down is the same on any number of ranks: its steps, losses, rates, and a held-out loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_lora.data.loader import Loader, StepBatch
from dist_lora.data.token_set import TokenSet
from dist_lora.train.held_out import loss_of
from dist_lora.world.world import World
from tests.ranks.runs import run_steps
from tests.ranks.tiny import config_of, documents, trainee_of

LENGTHS = [5, 40, 3, 17, 9, 30, 2, 11, 25]
SIZES = (1, 2, 3, 5, 9)


class Remembering(Loader):
    """A loader that keeps what this rank was given to train on."""

    seen: list[list[int]]

    def batch(self, step: int) -> StepBatch:
        """See ``Loader.batch``."""
        batch = super().batch(step)
        self.seen = [*getattr(self, "seen", []), [i for micro in batch.micro_batches for i in micro.sample_ids]]
        return batch


def remembering(tokens: TokenSet, world: World, **settings: Any) -> Remembering:
    defaults = {"sequence_length": 48, "packing": False, "global_batch": 4, "micro_batch": 1, "seed": 0}
    return Remembering(tokens, world_rank=world.world_rank, world_size=world.world_size, **defaults | settings)


def on(ranks: Any, size: int, function: Any, *arguments: Any) -> list[Any]:
    """What a function gives on each of ``size`` ranks; one is this process."""
    return ranks(size).run(function, *arguments) if size > 1 else [function(World.alone(), *arguments)]


# Every rank the same number of batches


def small_sets(world: World, model: str, folder: str, packing: bool) -> dict[str, Any]:
    """Held-out losses of tiny sets, and the lines and samples of two epochs over 1 to 9 samples."""
    config = config_of(Path(model), train={"sequence_length": 48, "micro_batch": 1, "packing": packing})
    trainee = trainee_of(config, world)
    generator = torch.Generator().manual_seed(1)
    for tensor in trainee.adapters.tensors:
        values = tensor.parameter.data
        values.copy_(torch.randn(values.shape, generator=generator) * 0.05)
    held_out = {}
    for size in (1, 3):
        found = loss_of(trainee, documents(seed=50 + size, lengths=LENGTHS[-size:]), config=config, world=world)
        held_out[size] = (found.loss, found.target_tokens)
    runs = {}
    for size in SIZES:
        loader = remembering(documents(seed=size, lengths=LENGTHS[:size]), world, packing=packing)
        num_steps = 2 * loader.steps_in_epoch(0)
        into = Path(folder, f"{world.world_size} ranks, {size} samples, packing {packing}")
        lines = run_steps(world, config, trainee, loader, folder=into, num_steps=num_steps)
        runs[size] = {"lines": lines, "seen": loader.seen}
    return {"held_out": held_out, "runs": runs}


@pytest.fixture(scope="module")
def small(ranks, tiny_llama, tmp_path_factory) -> dict[tuple[int, bool], list[dict[str, Any]]]:
    """What 1, 2 and 3 ranks make of tiny sets, packed or not; that they end at all is a test of its own."""
    model, folder = str(tiny_llama("llama31")), str(tmp_path_factory.mktemp("small"))
    return {
        (size, packing): on(ranks, size, small_sets, model, folder, packing)
        for size in (1, 2, 3)
        for packing in (True, False)
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_runs_over_few_samples_end_and_train_on_each_once_an_epoch(small, num_ranks, packing, size) -> None:
    found = [of_rank["runs"][size] for of_rank in small[num_ranks, packing]]
    lines = found[0]["lines"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    steps = [list(itertools.chain(*of_step)) for of_step in zip(*(run["seen"] for run in found), strict=True)]
    assert len(steps) == len(lines)
    for epoch in (0, 1):
        of_epoch = [ids for ids, line in zip(steps, lines, strict=True) if line["epoch"] == epoch]
        assert sorted(itertools.chain(*of_epoch)) == list(range(size))
    wanted = small[1, packing][0]["runs"][size]["lines"]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], abs=1e-5)
    assert [line["target_tokens"] for line in lines] == [line["target_tokens"] for line in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_a_held_out_set_smaller_than_the_ranks_has_the_loss_of_one_process(small, num_ranks, packing, size) -> None:
    wanted, num_targets = small[1, True][0]["held_out"][size]
    assert num_targets == documents(seed=50 + size, lengths=LENGTHS[-size:]).num_target_tokens
    for of_rank in small[num_ranks, packing]:
        found = of_rank["held_out"][size]
        assert found[1] == num_targets
        assert found[0] == pytest.approx(wanted, abs=1e-5)  # 1e-6 is two units in the last place of such a loss


# The learning rate

SCHEDULES = ("constant", "linear", "cosine")
# Of 8 steps, 3 of them warm-up, at 0.006: step 1, the last of the warm-up, the last of all (4/5 of the way down).
FIRST, WARM = 0.002, 0.006
LAST = {"constant": 0.006, "linear": 0.0012, "cosine": 0.000572949017}


def rates(world: World, model: str, folder: str, passes: int) -> dict[str, list[float]]:
    """The lr column of a run by each schedule, a step of 24 sequences cut into ``passes`` a rank."""
    found = {}
    for schedule in SCHEDULES:
        config = config_of(Path(model), optim={"lr": 0.006, "schedule": schedule, "warmup_steps": 3})
        loader = remembering(
            documents(seed=0, lengths=[3] * 24), world, global_batch=24, micro_batch=24 // world.world_size // passes
        )
        assert len(loader.batch(0).micro_batches) == passes
        into = Path(folder, f"{world.world_size} ranks, {passes} passes, {schedule}")
        lines = run_steps(world, config, trainee_of(config, world), loader, folder=into, num_steps=8)
        found[schedule] = [line["lr"] for line in lines]
    return found


@pytest.mark.slow
def test_rates_depend_neither_on_ranks_nor_on_accumulation_and_are_those_by_hand(ranks, tiny_llama, tmp_path) -> None:
    model = str(tiny_llama("llama31", num_layers=1))
    columns = [
        column
        for size, passes in itertools.product([1, 2, 3], [1, 4])
        for column in on(ranks, size, rates, model, str(tmp_path), passes)
    ]
    assert len(columns) == 12 and all(column == columns[0] for column in columns)
    for schedule, column in columns[0].items():
        assert [column[0], column[2], column[7]] == pytest.approx([FIRST, WARM, LAST[schedule]], rel=1e-9)


# The reported loss


def easy_and_hard(model: Any) -> TokenSet:
    """A long document that the model finds likely, and a short one that it does not."""
    generator = np.random.default_rng(0)
    easy = [int(i) for i in generator.integers(0, 256, 4)]
    while len(easy) < 34:
        with torch.no_grad():
            easy.append(int(model(torch.tensor([easy])).logits[0, -1].argmax()))
    hard = [int(i) for i in generator.integers(0, 256, 11)]
    is_target = np.array([False] * 4 + [True] * 30 + [False] * 5 + [True] * 6)
    lengths = np.array([len(easy), len(hard)])
    return TokenSet(
        np.array(easy + hard, np.uint32), is_target, np.array([0, len(easy)]), lengths, np.array([30, 6]), np.arange(2)
    )


def two_samples(world: World, model: str, folder: str, tokens: TokenSet, lr: float) -> tuple[Any, Any]:
    """Lines of three steps over two samples, and the samples that this rank had."""
    config = config_of(Path(model), optim={"lr": lr, "schedule": "constant", "warmup_steps": 0})
    loader = remembering(tokens, world, global_batch=2)
    lines = run_steps(world, config, trainee_of(config, world), loader, folder=Path(folder, "run"), num_steps=3)
    return lines, loader.seen


def test_the_reported_loss_is_that_of_all_target_tokens_where_ranks_differ(ranks, tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama("llama31")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = easy_and_hard(theirs)
    sums = []
    for document in (0, 1):
        ids, is_target = tokens.document(document)
        with torch.no_grad():
            logits = theirs(torch.tensor(ids.astype(np.int64))[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:].astype(np.int64)), reduction="none")
        sums.append(float(losses[torch.tensor(is_target[1:])].sum()))
    by_hand = (sums[0] + sums[1]) / 36
    assert sums[1] / 6 - sums[0] / 30 > 2, "the samples are equally hard"
    # So small a rate that three steps have the loss of the base.
    found = ranks(2).run(two_samples, str(model), str(tmp_path), tokens, 1e-12)
    assert [seen for _, seen in found] == [[[0]] * 3, [[1]] * 3]
    lines = found[0][0]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == pytest.approx([by_hand] * 3, abs=1e-5)
    assert [line["target_tokens"] for line in lines] == [36] * 3
