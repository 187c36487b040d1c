"""The whole model: documents that do not see each other, a loss without whole logits, and what memory it takes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.base.attention import Documents
from dist_lora.base.linear import FrozenLinear
from dist_lora.base.llama import SumOfCrossEntropy
from dist_lora.base.quant.formats import Plain
from dist_lora.data.loader import Loader
from dist_lora.layout.activations import rows_of_slice
from dist_lora.train.build import Trainee
from dist_lora.train.held_out import loss_of
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, documents, trainee_of

VOCAB, NUM_TARGETS = 128256, 2048
SLICE = rows_of_slice(VOCAB, item_bytes=4)  # rows of logits at once, in fp32
ROUNDING = 2.0**-24  # the most, relatively, that one rounding to fp32 changes


def trained(folder: Any, *, is_recomputed: bool | int = False, **sections: Any) -> Trainee:
    """A tiny model in training, its adapters away from zero."""
    config = config_of(folder, train={"activation_checkpointing": is_recomputed}, **sections)
    trainee = trainee_of(config, World.alone())
    generator = torch.Generator().manual_seed(2)
    for tensor in trainee.adapters.tensors:
        values = tensor.parameter.data
        values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
    trainee.model.train()
    return trainee


# Documents that lie in one pass do not see each other

# Two packed sequences, one after the other: in each a long document between documents of one token.
LENGTHS = [1, 9, 1, 4, 1, 7]


def stream(lengths: list[int], *, seed: int = 0) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Ids, positions and bounds of random documents."""
    ids = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return ids, torch.cat([torch.arange(length) for length in lengths]), tuple(bounds)


def forward(trainee: Trainee, ids: Tensor, positions: Tensor, bounds: tuple[int, ...], backend: Any) -> tuple:
    """Logits of every token, and the loss of every one by its successor, as training computes it."""
    rows = torch.arange(len(ids))
    attention = Documents(bounds, backend)
    logits = trainee.model(ids, positions=positions, attention=attention, rows=rows)
    labels = (ids * 7 + 3) % 512
    losses = [
        trainee.model(ids, positions=positions, attention=attention, rows=rows[a:b], labels=labels[a:b])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return logits, torch.stack(losses)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("is_recomputed", [True, False])
def test_documents_of_a_pass_have_the_logits_losses_and_gradients_that_they_have_alone(
    tiny_llama, is_recomputed, backend
) -> None:
    trainee = trained(tiny_llama("llama31"), is_recomputed=is_recomputed)
    assert all(block.recompute == is_recomputed for block in trainee.model.blocks())
    ids, positions, bounds = stream(LENGTHS)
    logits, losses = forward(trainee, ids, positions, bounds, backend)
    trainee.adapters.gradient.zero_()
    losses.sum().backward()
    together = trainee.adapters.gradient.clone()
    trainee.adapters.gradient.zero_()
    for document, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone, loss = forward(trainee, ids[a:b], positions[a:b], (0, b - a), backend)
        torch.testing.assert_close(logits[a:b], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(losses[document], loss[0], atol=1e-5, rtol=1e-5)
        # (ids * 7 + 3) depends on the token alone, so labels are the same here and there.
        loss[0].backward()
    assert (trainee.adapters.gradient - together).norm() < 1e-5 * together.norm()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_change_in_one_document_leaves_every_other_bit_of_the_model_where_it_was(
    tiny_llama, changed, backend
) -> None:
    trainee = trained(tiny_llama("llama31"), is_recomputed=True)
    ids, positions, bounds = stream(LENGTHS)
    before = [values.detach() for values in forward(trainee, ids, positions, bounds, backend)]
    own = slice(bounds[changed], bounds[changed + 1])
    ids[own] = (ids[own] + 100) % 512
    after = [values.detach() for values in forward(trainee, ids, positions, bounds, backend)]
    others = torch.ones(len(ids), dtype=torch.bool)
    others[own] = False
    assert torch.equal(before[0][others], after[0][others])
    assert not torch.equal(before[0][own], after[0][own])
    assert [i for i in range(len(LENGTHS)) if before[1][i] != after[1][i]] == [changed]


# Which layers recompute


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.5}, {"layers": [1]}], ids=["all", "dropout", "one layer"])
def test_any_number_of_layers_that_recompute_gives_the_same_losses_and_gradients(tiny_llama, lora) -> None:
    """And they are the first from the first adapted one on: each runs forward once more, and no other layer does."""
    folder = tiny_llama("llama31", num_layers=3)
    ids, positions, bounds = stream(LENGTHS)
    found = []
    for setting in (0, 1, 2, True):
        trainee = trained(folder, is_recomputed=setting, lora=lora)
        blocks = list(trainee.model.blocks())
        runs = [0] * len(blocks)

        def count(layer: int, runs: list[int] = runs) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                runs[layer] += 1

            return hook

        for layer, block in enumerate(blocks):
            block.self_attn.register_forward_hook(count(layer))
        torch.manual_seed(5)
        loss = trainee.model(
            ids,
            positions=positions,
            attention=Documents(bounds, "sdpa"),
            rows=torch.arange(len(ids)),
            labels=ids.roll(-1),
        )
        trainee.adapters.gradient.zero_()
        loss.backward()
        first = min(lora.get("layers", [0]))
        again = range(first, first + (len(blocks) if setting is True else int(setting)))
        assert runs == [2 if layer in again else 1 for layer in range(len(blocks))], setting
        found.append((loss.detach(), trainee.adapters.gradient.clone()))
    assert found[0][1].norm() > 0
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


# Logits are never whole


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        given = func(*args, **kwargs or {})
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor) and leaf.numel() > self.num_elements:
                self.num_elements, self.operation = leaf.numel(), str(func)
        return given


def exact_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Sum and gradient by ``F.cross_entropy`` in float64, some rows at a time: a whole one would take gigabytes."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.double()
    total = 0.0
    for rows, of_rows in zip(hidden.split(100), labels.split(100), strict=True):
        loss = F.cross_entropy(rows @ weight.T, of_rows, reduction="sum")
        loss.backward()
        total += float(loss.detach())
    assert hidden.grad is not None
    return total, hidden.grad


def test_loss_and_gradient_in_slices_of_logits_are_those_of_plain_cross_entropy() -> None:
    num_targets = 2 * SLICE + 50  # two slices and a part of one
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, 16, generator=generator) * 0.5
    hidden = torch.randn(num_targets, 16, generator=generator)
    labels = torch.randint(0, VOCAB, (num_targets,), generator=generator)
    ours = hidden.clone().requires_grad_()
    with Largest() as largest:
        loss = SumOfCrossEntropy.apply(ours, weight, labels)
        (loss / num_targets).backward()
    wanted, gradient = exact_loss(hidden, weight, labels)
    assert VOCAB < largest.num_elements <= SLICE * VOCAB, largest.operation
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-6)
    assert ours.grad is not None
    # A gradient adds up as many products as the vocabulary has words, in an order that is the processor's, at worst one
    # by one. Of the roundings, now up and now down, as many are left as a walk of so many steps goes far: 2e-5 in all.
    # (In fp32 plain cross entropy was off by 6e-7 on one processor, and by 1e-6 on another.)
    bound = math.sqrt(VOCAB) * ROUNDING
    for of_slice, exact in zip((ours.grad * num_targets).split(SLICE), gradient.split(SLICE), strict=True):
        assert (of_slice - exact).norm() < bound * exact.norm()


def test_no_gradient_is_off_by_a_factor_that_was_rounded_to_16_bits() -> None:
    """1 / 300 in bf16 is off by 0.21 %; of the roundings of the products, some up and some down, a tenth of that is left."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(4096, 64, generator=generator) * 0.5).bfloat16()
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    labels = torch.randint(0, 4096, (300,), generator=generator)
    gradients = []
    for factor in (1.0, 1 / 300):
        ours = hidden.clone().requires_grad_()
        (SumOfCrossEntropy.apply(ours, weight, labels) * factor).backward()
        assert ours.grad is not None
        gradients.append(ours.grad.double())
    whole, scaled = gradients
    assert float((whole * scaled).sum() / (whole * whole).sum()) == pytest.approx(1 / 300, rel=4e-4)


def big_vocabulary(tiny_llama: Callable[..., Any]) -> tuple[Trainee, Any]:
    """A tiny model with Llama 3's vocabulary, and a pass of 2048 targets."""
    trainee = trained(tiny_llama("llama32", num_layers=1, vocab=VOCAB))
    tokens = documents(seed=0, lengths=[512, 1024, 516], vocab=VOCAB, targets_from=0)
    loader = Loader(
        tokens, sequence_length=1024, packing=False, global_batch=3, micro_batch=3, seed=0, world_rank=0, world_size=1
    )
    (batch,) = loader.batch(0).micro_batches
    assert len(batch.labels) >= NUM_TARGETS
    return trainee, batch


def test_no_tensor_of_a_training_pass_or_an_evaluation_is_larger_than_a_slice_of_logits(tiny_llama) -> None:
    trainee, batch = big_vocabulary(tiny_llama)
    with Largest() as largest:
        loss = trainee.run(batch)
        (loss / len(batch.labels)).backward()
    assert VOCAB < largest.num_elements <= SLICE * VOCAB, largest.operation
    assert trainee.adapters.gradient.any()
    with Largest() as largest, torch.no_grad():
        again = trainee.run(batch)
    assert VOCAB < largest.num_elements <= SLICE * VOCAB, largest.operation
    assert float(again) == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("num_targets", [3, 70])  # 70 rows are two parts in fp32
def test_in_16_bits_only_the_logits_and_the_gradient_are_rounded(num_targets) -> None:
    """Labels have nearly all the probability: in 16 bits a difference from 1 would be lost, or off by half of itself."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, 32, generator=generator).bfloat16()
    labels = torch.randint(0, VOCAB, (num_targets,), generator=generator)
    weight[labels] = (weight[labels].float().sign() * 1.5).bfloat16()
    hidden = (weight[labels].float().sign() * 0.5).bfloat16().requires_grad_()
    loss = SumOfCrossEntropy.apply(hidden, weight, labels)
    loss.backward()
    logits = F.linear(hidden.detach(), weight).double().requires_grad_()
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    wanted.backward()
    assert logits.grad is not None and 1e-5 < float(wanted.detach()) / num_targets < 0.01
    # Each logarithm is off by some roundings of the largest logit, 24.
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=num_targets * 4 * 24 * ROUNDING)
    gradient = logits.grad @ weight.double()
    assert hidden.grad is not None
    assert (hidden.grad.double() - gradient).norm() < 2**-7 * gradient.norm()


@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("vocab", [100, 32000, 49152, 128256, 10**7])
def test_a_slice_of_logits_is_whole_tiles_of_128_rows_and_as_many_as_256_mib_hold(vocab, item_bytes) -> None:
    rows = rows_of_slice(vocab, item_bytes=item_bytes)
    assert rows % 128 == 0 and rows >= 128
    assert rows == 128 or rows * vocab * item_bytes <= 2**28
    assert (rows_of_slice(128256, item_bytes=2), rows_of_slice(128256, item_bytes=4)) == (1024, 256)


def test_all_slices_of_logits_have_the_same_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, num_targets = 2**18, 3 * 128  # three slices of 128 rows
    weight = torch.randn(vocab, 2, generator=generator)
    hidden = torch.randn(num_targets, 2, generator=generator)
    labels = torch.randint(0, vocab, (num_targets,), generator=generator)
    peak = peak_bytes(lambda: SumOfCrossEntropy.apply(hidden.requires_grad_(), weight, labels))
    assert peak < 1.1 * 128 * vocab * 4


# Memory


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that tensors took at once while ``action`` ran, what operations need inside counted too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    kineto = profiled.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    live = peak = 0
    for _, num_bytes in changes:
        live += num_bytes
        peak = max(peak, live)
    assert peak > 0
    return peak


@pytest.mark.parametrize("is_recomputed", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_takes_no_more_memory_than_a_training_pass(tiny_llama, packing, is_recomputed) -> None:
    train = {"activation_checkpointing": is_recomputed, "packing": packing, "micro_batch": 2, "sequence_length": 256}
    config = config_of(tiny_llama("llama31", num_layers=4), train=train)
    trainee = trainee_of(config, World.alone())
    tokens = documents(seed=0, lengths=[40, 60, 50, 30] * 4)
    cut = {"sequence_length": 256, "packing": packing, "global_batch": 2, "micro_batch": 2, "seed": 0}
    (batch,) = Loader(tokens, **cut, world_rank=0, world_size=1).batch(0).micro_batches
    trainee.model.train()

    def train_a_pass() -> None:
        trainee.run(batch).backward()

    train_a_pass()  # whatever is made once is there
    evaluation = peak_bytes(lambda: loss_of(trainee, tokens, config=config, world=World.alone()))
    assert evaluation <= peak_bytes(train_a_pass)


def test_a_linear_frees_its_weight_with_its_last_name() -> None:
    linear = FrozenLinear(4, 3, Plain(torch.float32))
    weight = weakref.ref(linear._parameters["weight"])
    gc.disable()
    try:
        del linear
        assert weight() is None, "a cycle keeps it until the collector comes"
    finally:
        gc.enable()


# Rows of tokens that are trained in place of the embedding's and the head's

TOKENS = [3, 260, 300, 511]


def with_rows(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.detach().index_copy(0, torch.tensor(TOKENS), rows)


@pytest.mark.parametrize("num_rows", [0, 1, 13])
@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_the_loss_and_its_gradients_with_trained_rows_are_those_of_a_matrix_that_has_them(
    monkeypatch, num_rows, at_once
) -> None:
    monkeypatch.setattr("dist_lora.base.llama.rows_of_slice", lambda vocab, item_bytes: at_once)
    torch.manual_seed(0)
    hidden, weight, rows = (
        torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (num_rows, 512, len(TOKENS))
    )
    labels = torch.tensor([3, 260, 7, 511, 300, 3, 99, 260, 0, 510, 5, 300, 1])[:num_rows]
    found = SumOfCrossEntropy.apply(hidden, weight.detach(), labels, False, rows.float(), torch.tensor(TOKENS))
    expected = F.cross_entropy(F.linear(hidden, with_rows(weight, rows.float().double())), labels, reduction="sum")
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss * 3, [hidden, rows]) for loss in (found, expected))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["llama31", "llama32"])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_model_with_trained_rows_is_the_model_whose_matrices_have_them(tiny_llama, variant, is_recomputed) -> None:
    """Logits, losses and the gradients of the adapters; those of the rows by differences of the loss."""
    sections = {"lora": {"rank": 4, "alpha": 8, "layers": [1]}}
    plain = trained(tiny_llama(variant), **sections)
    sections["lora"]["train_tokens"] = TOKENS
    trainee = trained(tiny_llama(variant), is_recomputed=is_recomputed, **sections)
    rows = {tensor.name: tensor.parameter for tensor in trainee.adapters.tensors if tensor.name.endswith("token_rows")}
    assert list(rows) == ["model.embed_tokens.token_rows", "lm_head.token_rows"][: 1 if trainee.base.shape.tied else 2]
    ids, positions, bounds = stream([9, 5, 11])
    ids[[0, 3, 4, 10, 20]] = torch.tensor(
        [260, 3, 3, 511, 260]
    )  # some twice, one at a document's start, and 300 nowhere

    def loss_of_all(of: Trainee) -> tuple[Tensor, Tensor]:
        logits, losses = forward(of, ids, positions, bounds, "sdpa")
        return logits, losses.sum()

    for tensor in (plain.model.model.embed_tokens, plain.model.lm_head):
        held = rows.get("lm_head.token_rows") if tensor is plain.model.lm_head else None
        tensor.weight.data = with_rows(
            tensor.weight, rows["model.embed_tokens.token_rows"] if held is None else held
        ).detach()
    logits, loss = loss_of_all(trainee)
    expected_logits, expected = loss_of_all(plain)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    trainee.adapters.begin_step()
    trainee.adapters.backward(loss, is_last=True)
    plain.adapters.begin_step()
    plain.adapters.backward(expected, is_last=True)
    for ours, theirs in zip(trainee.adapters.tensors, plain.adapters.tensors, strict=False):
        torch.testing.assert_close(ours.parameter.grad, theirs.parameter.grad, atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in rows.items():
        gradient = parameter.grad.clone()
        if name != "lm_head.token_rows" and not trainee.base.shape.tied:
            assert not gradient[TOKENS.index(300)].any(), "no sample has it"
        direction = torch.randn(parameter.shape, generator=generator)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-3 * direction
                sides.append(float(loss_of_all(trainee)[1].double()))
                parameter -= sign * 1e-3 * direction
        assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=2e-2), name


def test_rows_begin_as_the_bases_own_and_the_base_stays_as_it_was(tiny_llama) -> None:
    sections = {"lora": {"rank": 4, "alpha": 8, "train_tokens": TOKENS}}
    trainee = trainee_of(config_of(tiny_llama("llama31"), **sections), World.alone())
    decoder, head = trainee.model.model, trainee.model.lm_head
    assert torch.equal(decoder.adapter.rows, decoder.embed_tokens.weight[TOKENS])
    assert torch.equal(head.adapter.rows, head.weight[TOKENS])
    trainee.adapters.start_training(config_of(tiny_llama("llama31"), **sections).optim)
    ids, positions, bounds = stream([9, 5])
    trainee.adapters.begin_step()
    trainee.adapters.backward(forward(trainee, ids, positions, bounds, "sdpa")[1].sum(), is_last=True)
    trainee.adapters.step(1e-2)
    assert not torch.isclose(head.adapter.rows, head.weight[TOKENS]).any()
    trainee.check_base()
