"""What only a GPU can show: bitsandbytes' kernels, pinned memory, and the numbers of the CPU within its rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_lora.base.attention import Documents
from dist_lora.base.llama import FrozenLinear
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.formats import Format, Int8, Nf4
from dist_lora.base.quant.nf4 import dequantize_nf4, quantize_nf4
from dist_lora.checkpoint.saver import Saver
from dist_lora.doctor.compute import measure_compute
from dist_lora.doctor.machine import ask_driver, examine_gpus, torch_build
from dist_lora.lora.state import Piece
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, join
from tests.ranks.test_frozen_base import step_of
from tests.ranks.tiny import config_of, trainee_of
from tests.unit.base.quant.test_nf4 import random_rows
from tests.unit.base.test_attention import BOUNDS, heads

pytestmark = pytest.mark.gpu

QUANTIZED = [Nf4(), Int8()]


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one process with a process group: what fsdp2 needs on one GPU."""
    made = join(LaunchedRank(0, 1, 0, 1), {}, collective_timeout_s=60, join_timeout_s=60)
    assert made.device.type == "cuda"
    yield made
    made.leave()


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_on_a_gpu_are_those_of_the_whole_and_near_the_cpus(fmt: Format, dtype) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = fmt.quantize_rows(weight.cuda())
    some = fmt.quantize_rows(weight[32:80].cuda())
    on_cpu = fmt.quantize_rows(weight)
    for name, values in whole.items():
        assert torch.equal(some[name], values[32:80]), name
        assert values.dtype == on_cpu[name].dtype and values.shape == on_cpu[name].shape
    weight, wanted = fmt.dequantize(whole, torch.float32).cpu(), fmt.dequantize(on_cpu, torch.float32)
    # A weight beside the middle of two levels may fall to either: a kernel divides, or multiplies by the inverse.
    assert (weight != wanted).float().mean() < 1e-3


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda f: f.name)
def test_the_backward_keeps_no_dequantized_weight(fmt: Format) -> None:
    linear = FrozenLinear(4096, 4096, fmt).cuda()
    for name, values in fmt.quantize_rows(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)).items():
        getattr(linear, name).data.copy_(values)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = linear(x)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= 2 * y.nbytes  # the result; a dequantized weight would be 32 MiB
    y.backward(torch.ones_like(y))
    weight = fmt.dequantize({name: getattr(linear, name) for name, _ in linear.named_parameters()}, torch.bfloat16)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ weight, atol=0.5, rtol=2e-2)
    torch.testing.assert_close(y, F.linear(x, weight), atol=0.5, rtol=2e-2)


def norms(world: World, folder: Path, **parallel: str) -> list[float]:
    config = config_of(folder, model={"quant": "nf4", "dtype": "fp32"}, parallel=parallel)
    trainee = trainee_of(config, world)
    step = step_of(trainee, world, micro_batches=2)
    found = [step() for _ in range(3)]
    trainee.check_base()
    return found


def test_a_base_in_host_memory_is_pinned_and_has_the_same_numbers(world, tiny_llama) -> None:
    folder = tiny_llama("llama31")
    wanted = norms(world, folder, engine="fsdp2")
    assert norms(world, folder, engine="fsdp2", offload="base") == pytest.approx(wanted, rel=1e-5)
    assert norms(world, folder, engine="fsdp2", offload="all") == pytest.approx(wanted, rel=1e-5)
    config = config_of(folder, model={"quant": "nf4"}, parallel={"engine": "fsdp2", "offload": "all"})
    trainee = trainee_of(config, world)
    step_of(trainee, world)()
    shares = trainee.engine.frozen_shards(trainee.model)
    assert all(share.device.type == "cpu" and share.is_pinned() for _, share in shares if share.numel())
    moments = [values for piece, values in trainee.adapters.share().items() if piece.kind != "adapter"]
    assert all(values.device.type == "cpu" for values in moments)


def test_a_gpu_in_fp32_has_the_losses_of_the_cpu(world, tiny_llama) -> None:
    folder = tiny_llama("llama31")
    alone = World.alone(torch.device("cpu"))
    torch.backends.cuda.matmul.allow_tf32 = False
    assert norms(world, folder, engine="none") == pytest.approx(norms(alone, folder, engine="none"), rel=1e-3)


def test_bf16_is_the_default_and_holds_to_its_table(world, tiny_llama) -> None:
    trainee = trainee_of(config_of(tiny_llama("llama31"), model={"dtype": "auto", "quant": "nf4"}), world)
    assert trainee.precision.dtype == torch.bfloat16 and trainee.attention == "varlen"
    step: Callable[[], float] = step_of(trainee, world)
    assert step() > 0
    trainee.check_base()


def test_a_save_holds_the_state_at_its_start_while_the_gpu_goes_on() -> None:
    """The copy is pinned and complete before the next step can change what was copied."""
    saver = Saver(World.alone(torch.device("cuda", 0)))
    live = torch.arange(2**24, dtype=torch.float32, device="cuda")
    pieces = {Piece("a", "adapter", 0, len(live)): live}
    copied: list[torch.Tensor] = []

    def write(world: World, share: Mapping[Piece, torch.Tensor]) -> Path:
        copied.append(next(iter(share.values())).clone())
        return Path("it")

    saver.start(pieces, write)
    live.fill_(-1)
    saver.wait()
    assert saver._aside is not None and saver._aside.is_pinned()
    assert copied[0].equal(torch.arange(2**24, dtype=torch.float32))


def test_the_doctor_sees_the_gpus_and_measures_one() -> None:
    driver = ask_driver()
    answer = examine_gpus(driver, num_seen=torch.cuda.device_count(), build=torch_build())
    assert "fault" not in {each.severity for each in answer.findings}
    assert answer.facts["cuda"] and answer.facts["gpus_of_torch"] >= 1
    found = measure_compute(torch.device("cuda", 0), torch.bfloat16, budget_s=5)
    largest = max(each["flops_per_s"][1] for each in found["products"])
    assert 1e12 < largest < 1e16
    assert all(each["flops_per_s"][0] <= each["flops_per_s"][1] for each in found["attention"])
    assert set(found["dense_weights_per_s"]) == {"nf4", "int8"}


def test_flash_attention_agrees_with_eager_on_a_gpu() -> None:
    inputs = [tensor.cuda().bfloat16() for tensor in heads(0)]
    flash = Documents(BOUNDS, "varlen")(0, *inputs)
    eager = Documents(BOUNDS, "eager")(0, *inputs)
    torch.testing.assert_close(flash, eager, atol=2e-2, rtol=2e-2)


def test_nf4_rows_are_independent_and_dequantized_weights_are_those_of_the_cpu() -> None:
    rows = random_rows(13, 192).cuda()
    codes, absmax = quantize_nf4(rows)
    part_codes, part_absmax = quantize_nf4(rows[5:6])
    assert torch.equal(part_codes, codes[5:6]) and torch.equal(part_absmax, absmax[5:6])
    assert torch.equal(absmax.cpu(), quantize_nf4(rows.cpu())[1])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_nf4(codes, absmax, dtype).cpu(), dequantize_nf4(codes.cpu(), absmax.cpu(), dtype))
    rows[2, 3] = float("nan")
    with pytest.raises(NotFiniteError, match="row 2, column 3 is nan"):
        quantize_nf4(rows)
