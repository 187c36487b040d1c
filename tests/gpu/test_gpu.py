"""What only a GPU can show: bitsandbytes' kernels, pinned memory, and the numbers of the CPU within its rounding."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

from bench import gpu as bench
from dist_lora.base.attention import Documents
from dist_lora.base.kernels import plain
from dist_lora.base.linear import FrozenLinear
from dist_lora.base.llama import SumOfCrossEntropy
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.formats import Format, Int8, Nf4
from dist_lora.base.quant.nf4 import dequantize_nf4, quantize_nf4
from dist_lora.checkpoint.saver import Saver
from dist_lora.data.loader import Loader
from dist_lora.data.prefetch import on_device
from dist_lora.doctor.compute import measure_compute
from dist_lora.doctor.machine import ask_driver, examine_gpus, torch_build
from dist_lora.engines.host_layers import HostLayers
from dist_lora.errors import HangError
from dist_lora.layout.choices import AttentionName
from dist_lora.lora.state import Piece
from dist_lora.supervision.hang import HangWatch
from dist_lora.supervision.out_of_memory import out_of_memory
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests.ranks.test_frozen_base import step_of
from tests.ranks.tiny import config_of, documents, trainee_of
from tests.unit.base.quant.test_nf4 import random_rows
from tests.unit.base.test_attention import BOUNDS, heads
from tests.unit.base.test_llama import VOCAB, exact_loss

pytestmark = pytest.mark.gpu

QUANTIZED = [Nf4(), Int8()]


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
    linear(x.detach())  # the first product allocates cuBLAS's workspace, 32 MiB on H100, and keeps it
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


def test_layers_in_host_memory_are_pinned_and_have_the_same_numbers(world, tiny_llama) -> None:
    folder = tiny_llama("llama31", num_layers=4)
    wanted = norms(world, folder, engine="none")
    assert norms(world, folder, offload="base", engine="none") == pytest.approx(wanted, rel=1e-5)
    assert norms(world, folder, offload="all", engine="none") == pytest.approx(wanted, rel=1e-5)
    config = config_of(folder, model={"quant": "nf4"}, parallel={"offload": "base", "engine": "none"})
    trainee = trainee_of(config, world)
    for slot in trainee.engine.slots(trainee.model):
        assert slot.destination.is_pinned() if trainee.engine.is_on_host(slot) else slot.destination.is_cuda, slot.name


def test_a_layer_is_copied_while_the_one_before_it_computes(world, tiny_llama, monkeypatch) -> None:
    """Events in the order that only two streams give: a layer begins, the next one's copy ends, and then the layer does."""
    folder = tiny_llama("llama31", num_layers=4)
    trainee = trainee_of(config_of(folder, parallel={"offload": "base", "engine": "none"}), world)
    began: dict[int, torch.cuda.Event] = {}
    arrived: dict[int, torch.cuda.Event] = {}
    ended: dict[int, torch.cuda.Event] = {}
    fetch, need = HostLayers._fetch, HostLayers._need

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def fetched_slowly(self: HostLayers, layer: int) -> object:
        buffer = fetch(self, layer)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(8_000_000)  # cycles
            buffer.arrived = arrived[layer] = mark()
        return buffer

    def computed_slowly(self: HostLayers, layer: int, *, then: int) -> None:
        need(self, layer, then=then)
        began[layer] = mark()
        torch.cuda._sleep(20_000_000)
        ended[layer] = mark()

    monkeypatch.setattr(HostLayers, "_fetch", fetched_slowly)
    monkeypatch.setattr(HostLayers, "_need", computed_slowly)
    with torch.no_grad():
        trainee.run(loader_of_steps(1).batch(0).micro_batches[0])
    torch.cuda.synchronize()
    del arrived[0]  # that of the forward that would follow
    for layer in (0, 1, 2):
        assert began[layer].elapsed_time(arrived[layer + 1]) > 0
        assert arrived[layer + 1].elapsed_time(ended[layer]) > 0


def loader_of_steps(num_steps: int) -> Loader:
    return Loader(
        documents(seed=0, lengths=[20, 30, 9, 14] * num_steps), sequence_length=64, packing=False, global_batch=4,
        micro_batch=2, seed=0, world_rank=0, world_size=1,
    )  # fmt: skip


def test_a_step_waits_for_the_gpu_once_and_the_next_ones_first_batch_is_on_its_way(world, tiny_llama) -> None:
    config = config_of(tiny_llama("llama31"), model={"dtype": "auto"}, optim={"max_grad_norm": 1e-3})
    trainee = trainee_of(config, world)
    trainee.adapters.start_training(config.optim)
    step = TrainStep(config, trainee, loader=loader_of_steps(4), num_steps=4, saver=Saver(world), world=world)
    for number in (1, 2):  # what is made once may wait, and missing gradients are looked for
        step.take(number)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step.take(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in seen) == 1
    first, second = step._batches.take(3).micro_batches
    assert first.ids.is_cuda and second.ids.is_pinned()


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
    assert saver._buffer is not None and saver._buffer.is_pinned()
    assert copied[0].equal(torch.arange(2**24, dtype=torch.float32))


def test_the_host_never_waits_within_a_micro_batch_whose_tensors_arrive_as_they_were(world, tiny_llama) -> None:
    trainee = trainee_of(config_of(tiny_llama("llama31"), model={"dtype": "auto"}), world)
    loader = Loader(
        documents(seed=0, lengths=[20, 30, 9, 14, 40, 7]), sequence_length=64, packing=False, global_batch=6, micro_batch=2,
        seed=0, world_rank=0, world_size=1,
    )  # fmt: skip
    batches = loader.batch(0).micro_batches
    assert batches[0].packed(is_pinned=True).is_pinned()
    trainee.adapters.begin_step()
    arrived = []
    for is_warm in (False, True):  # what is made once may wait
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
        try:
            for index, micro in enumerate(on_device(batches, world.device)):
                loss = trainee.run(micro)
                trainee.adapters.backward(loss / 100, is_last=index == len(batches) - 1)
                arrived.append(micro)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for micro, on_host in zip(arrived, batches * 2, strict=True):
        for name in ("ids", "positions", "starts", "target_index", "labels"):
            assert getattr(micro, name).is_cuda and torch.equal(getattr(micro, name).cpu(), getattr(on_host, name)), (
                name
            )


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


def values_and_gradients(backend: AttentionName, dtype: torch.dtype) -> list[torch.Tensor]:
    """Attended values of several documents with grouped heads, and the gradients of their squares' sum, in float64."""
    inputs = [tensor.cuda().to(dtype).requires_grad_() for tensor in heads(0)]
    attended = Documents(BOUNDS, backend)(0, *inputs)
    attended.double().square().sum().backward()
    return [tensor.detach().double() for tensor in (attended, *(tensor.grad for tensor in inputs))]


def test_flash_attention_is_as_near_to_float64_as_eager_in_values_and_gradients() -> None:
    exact = values_and_gradients("eager", torch.float64)
    flash = values_and_gradients("varlen", torch.bfloat16)
    eager = values_and_gradients("eager", torch.bfloat16)
    for of_flash, of_eager, wanted in zip(flash, eager, exact, strict=True):
        # Both round to 8 bits, at different places: of two equally good ones neither is twice as far off.
        assert (of_flash - wanted).norm() < 2 * (of_eager - wanted).norm() + 1e-3 * wanted.norm()


def test_fp32_attention_with_grouped_heads_runs_in_the_memory_efficient_kernel_and_makes_no_scores() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens, num_heads, width = 4096, 32, 64
    query = torch.randn(tokens, num_heads, width, device="cuda", requires_grad=True)
    key, value = (torch.randn(tokens, 8, width, device="cuda", requires_grad=True) for _ in range(2))
    attend = Documents((0, tokens), "sdpa-repeated")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # another kernel would be an error
        attend(0, query, key, value).sum().backward()
    scores = 4 * num_heads * tokens**2  # 2 GiB
    assert torch.cuda.max_memory_allocated() - before < scores / 4


@pytest.mark.parametrize("is_fused", [False, True])
def test_loss_and_gradient_over_llama_3s_vocabulary_are_those_of_float64(is_fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCAB, 256, generator=generator) * 0.1).cuda().bfloat16()
    hidden = torch.randn(600, 256, generator=generator).cuda().bfloat16()
    labels = torch.randint(0, VOCAB, (600,), generator=generator).cuda()
    ours = hidden.clone().requires_grad_()
    loss = SumOfCrossEntropy.apply(ours, weight, labels, is_fused)
    (loss / 300).backward()  # a factor that bf16 rounds by 0.2 %
    wanted, gradient = exact_loss(hidden, weight, labels)
    # Logits are rounded to 8 bits, each by up to 2**-9 of itself, and of 600 rows' roundings little is left in the sum.
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3)
    assert ours.grad is not None
    found = ours.grad.double() * 300
    assert (found - gradient).norm() < 2e-2 * gradient.norm()
    assert float((found * gradient).sum() / (gradient * gradient).sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2**-20), (torch.bfloat16, 2**-6)], ids=str)
def test_the_backward_of_a_norm_is_float64s(dtype, bound) -> None:
    generator = torch.Generator().manual_seed(0)
    x, d_h = (torch.randn(300, 4096, generator=generator).to(dtype).double() for _ in range(2))
    weight = torch.rand(4096, generator=generator).to(dtype).double()
    x.requires_grad_()
    F.rms_norm(x, weight.shape, weight, 1e-5).backward(d_h)
    on_gpu = [tensor.detach().to("cuda", dtype) for tensor in (x, weight, d_h)]
    inverse_rms = plain.norm(*on_gpu[:2], 1e-5)[1]
    d_x = plain.norm_backward(on_gpu[2], *on_gpu[:2], inverse_rms)
    assert d_x.dtype == dtype
    assert x.grad is not None
    assert (d_x.cpu().double() - x.grad).norm() < bound * x.grad.norm()


def test_int8_scales_and_codes_are_the_cpus() -> None:
    weight = random_rows(64, 4096)
    on_gpu, on_cpu = Int8().quantize_rows(weight.cuda()), Int8().quantize_rows(weight)
    assert torch.equal(on_gpu["scale"].cpu(), on_cpu["scale"])
    assert (on_gpu["codes"].cpu() != on_cpu["codes"]).float().mean() < 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        dense = Int8().dequantize({name: part.cuda() for name, part in on_cpu.items()}, dtype)
        assert torch.equal(dense.cpu(), Int8().dequantize(on_cpu, dtype))


def test_a_rank_whose_micro_batch_is_empty_has_no_loss_and_gradients_of_zero(world, tiny_llama) -> None:
    config = config_of(tiny_llama("llama31"), model={"dtype": "bf16", "attention": "auto"})
    trainee = trainee_of(config, world)
    loader = Loader(
        documents(seed=0, lengths=[20]), sequence_length=64, packing=False, global_batch=1, micro_batch=1, seed=0,
        world_rank=1, world_size=2,
    )  # fmt: skip
    (empty,) = loader.batch(0).micro_batches
    assert len(empty.labels) == 0
    trainee.adapters.begin_step()
    loss = trainee.run(empty)
    trainee.adapters.backward(loss, is_last=True)
    trainee.adapters.reduce(loss.detach()[None])
    assert float(loss.detach()) == 0.0
    assert all(not gradient.any() for gradient in trainee.adapters.gradients())


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_recomputation_changes_no_number_but_by_the_order_of_sums(world, tiny_llama, quant) -> None:
    found = []
    for recompute in (False, True):
        settings = {"model": {"quant": quant, "dtype": "bf16"}, "train": {"activation_checkpointing": recompute}}
        trainee = trainee_of(config_of(tiny_llama("llama31"), **settings), world)
        step = step_of(trainee, world, micro_batches=2)
        found.append([step() for _ in range(3)])
    # Flash attention's backward adds with atomics, in another order each time.
    assert found[1] == pytest.approx(found[0], rel=5e-3)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_an_engine_on_one_gpu_has_the_numbers_of_none(world, tiny_llama, engine, quant) -> None:
    folder = tiny_llama("llama31")

    def norms_of(engine: str) -> list[float]:
        config = config_of(folder, model={"quant": quant, "dtype": "fp32"}, parallel={"engine": engine})
        step = step_of(trainee_of(config, world), world, micro_batches=2)
        return [step() for _ in range(3)]

    assert norms_of(engine) == pytest.approx(norms_of("none"), rel=1e-4)


def test_a_gpu_out_of_memory_is_said_with_what_is_held_there(world) -> None:
    with pytest.raises(torch.OutOfMemoryError) as refused:
        torch.empty(2**50, device="cuda")
    world.progress.now("step 3, micro-batch 1 of 2")
    found = out_of_memory(refused.value, world=world, config=config_of(Path("model")))
    assert found is not None
    assert str(found).startswith("out of memory on the GPU: ") and " GiB of " in str(found)
    assert "What helps, the cheapest first: " in str(found)


def test_pinned_memory_that_the_host_has_not_is_the_hosts(world) -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2 * psutil.virtual_memory().total, dtype=torch.uint8, pin_memory=True)
    found = out_of_memory(refused.value, world=world, config=config_of(Path("model")))
    assert found is not None and str(found).startswith("out of memory on the host: ")


def test_a_rank_that_waits_for_its_gpu_too_long_is_found_to_hang(tmp_path) -> None:
    world = World.alone()
    world.stacks = tmp_path / "stacks"
    reported: list[HangError] = []
    ended = threading.Event()
    watch = HangWatch(world, timeout_s=1.0, report=reported.append, end=lambda code: ended.set())
    watch.start()
    world.progress.now("step 1, micro-batch 1 of 1")
    rate = torch.cuda.get_device_properties(0).clock_rate * 1000 if hasattr(
        torch.cuda.get_device_properties(0), "clock_rate"
    ) else 2e9  # fmt: skip
    torch.cuda._sleep(
        int(10 * rate)
    )  # a kernel of about ten seconds: waiting for it is a busy loop, and no sign of life
    torch.cuda.synchronize()
    assert ended.wait(5)
    watch.stop()
    assert "hangs: step 1, micro-batch 1 of 1, without progress for" in str(reported[0])


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("offload", ["none", "base"])
def test_the_memory_of_a_step_of_8b_is_the_plans(quant, recompute, offload) -> None:
    """Four layers of 8B's shape, 2 x 4,096 tokens: within 5 %."""
    config = bench.config_of(
        model={"quant": quant}, train={"activation_checkpointing": recompute}, parallel={"offload": offload}
    )
    found = bench.measure(config)
    assert found.peak_bytes == pytest.approx(found.planned_bytes, rel=0.05)


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
