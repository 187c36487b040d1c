"""Counted kernels and bytes of small cases, each beside the numbers by hand; M rows, K inputs, N outputs, R rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.traffic import cuda
from bench.traffic.counter import Counter
from bench.traffic.cuda import Kernel, UnknownOperatorError
from bench.traffic.rates import seconds_of
from bench.traffic.step import Case, count_step
from bench.traffic.totals import StepTime, layer_sum, step_time
from dist_lora.base.quant.nf4 import dequantize_nf4
from dist_lora.plan import speed
from dist_lora.plan.measured import AtSize
from tests.unit.plan.test_measured import INSTANT

M, K, N, R = 256, 64, 32, 4
BF16, FP32 = 2, 4


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)


def counted(counter: Counter, phase: str = "forward") -> list[tuple[str, str, int, int, int]]:
    """Name, kind, loaded and stored bytes and operations of the kernels of a phase, in the order in which they ran."""
    return [
        (kernel.name.partition("::")[2], kernel.kind, kernel.loaded_bytes, kernel.stored_bytes, kernel.flops)
        for kernel, each_phase in ((each.kernel, each.phase) for each in counter.kernels)
        if each_phase == phase
    ]


def test_a_linear_with_an_adapter_is_counted_as_by_hand() -> None:
    x, weight = on_meta(M, K, trained=True), on_meta(N, K)
    a, b = on_meta(R, K, trained=True), on_meta(N, R, trained=True)
    with Counter() as counter:
        counter.freeze([weight])
        y = torch.addmm(x @ weight.t(), x @ a.t(), b.t())
        y.backward(torch.empty_like(y))
    assert counted(counter) == [
        ("mm", "frozen matmuls", BF16 * (M * K + N * K), BF16 * M * N, 2 * M * K * N),
        ("mm", "LoRA's matmuls", BF16 * (M * K + R * K), BF16 * M * R, 2 * M * K * R),
        ("addmm", "copies", BF16 * M * N, BF16 * M * N, 0),  # y, into which the product is added
        ("addmm", "LoRA's matmuls", BF16 * (M * N + M * R + N * R), BF16 * M * N, 2 * M * R * N),
    ]
    products = [kernel for kernel in counted(counter, "backward") if kernel[0] == "mm"]
    assert sorted(products) == sorted(
        [
            ("mm", "LoRA's matmuls", BF16 * (M * N + N * R), BF16 * M * R, 2 * M * R * N),  # of x A^T
            ("mm", "LoRA's matmuls", BF16 * (M * N + M * R), BF16 * N * R, 2 * M * R * N),  # of B
            ("mm", "LoRA's matmuls", BF16 * (M * R + M * K), BF16 * R * K, 2 * M * R * K),  # of A
            ("mm", "LoRA's matmuls", BF16 * (M * R + R * K), BF16 * M * K, 2 * M * R * K),  # of x
            ("mm", "frozen matmuls", BF16 * (M * N + N * K), BF16 * M * K, 2 * M * K * N),  # of x
        ]
    )
    rest = [kernel for kernel in counted(counter, "backward") if kernel[0] != "mm"]
    assert rest == [("add", "elementwise", BF16 * 2 * M * K, BF16 * M * K, 0)]  # both gradients of x


def test_an_addmm_in_place_and_a_bias_need_no_copy() -> None:
    y, low, b, bias = on_meta(M, N), on_meta(M, R), on_meta(R, N), on_meta(N)
    with Counter() as counter:
        y.addmm_(low, b)
        torch.addmm(bias, low, b)
    added, biased = counted(counter)
    assert added == ("addmm_", "LoRA's matmuls", BF16 * (M * N + M * R + R * N), BF16 * M * N, 2 * M * R * N)
    assert biased == ("addmm", "LoRA's matmuls", BF16 * (N + M * R + R * N), BF16 * M * N, 2 * M * R * N)


def test_a_frozen_product_takes_whole_tiles_of_rows() -> None:
    weight = on_meta(N, K)
    with Counter() as counter:
        counter.freeze([weight])
        _ = on_meta(261, K) @ weight.t()
        _ = weight @ on_meta(K, 261)
    assert [flops for *_, flops in counted(counter)] == [2 * 384 * K * N] * 2


def test_a_norm_is_one_kernel_each_way_and_keeps_its_input_once() -> None:
    x = on_meta(M, K, dtype=torch.float32, trained=True) * 1.0
    row, inverse_rms = FP32 * M * K, FP32 * M
    with Counter() as counter:
        y = F.rms_norm(x, (K,), None, 1e-5)
        y.backward(torch.empty_like(y))
    assert counted(counter) == [("_fused_rms_norm", "elementwise", row, row + inverse_rms, 0)]
    assert counted(counter, "backward")[0] == (
        "_fused_rms_norm_backward", "elementwise", 2 * row + inverse_rms, row, 0,
    )  # fmt: skip
    assert sum(counter.kept_bytes.values()) == row + inverse_rms


def test_a_norm_by_its_operator_is_counted_alike_and_afterwards_is_as_it_was() -> None:
    x = on_meta(M, K)
    with Counter() as counter:
        torch.ops.aten._fused_rms_norm(x, [K], None, 1e-5)
    assert counted(counter) == [("_fused_rms_norm", "elementwise", BF16 * M * K, BF16 * M * K + FP32 * M, 0)]
    values = torch.rand(M, K, device="cpu")
    expected = values / values.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    assert torch.allclose(F.rms_norm(values, (K,), None, 1e-5), expected)
    assert F.rms_norm(x, (K,), None, 1e-5).shape == (M, K)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "Meta")


def test_a_storage_is_kept_once_whoever_saves_it() -> None:
    x = on_meta(M, K, trained=True) * 1.0
    with Counter() as counter:
        y = x.sin() + x[: M // 2].cos().sum() + (x * 2).exp()
    assert y.requires_grad
    assert sum(counter.kept_bytes.values()) == BF16 * 2 * M * K  # x, and the result of exp


def test_a_cat_is_loaded_and_stored_and_a_view_is_nothing() -> None:
    a, b = on_meta(M, K), on_meta(M, N)
    with Counter() as counter:
        torch.cat((a, b), dim=-1).view(-1).detach()
    assert counted(counter) == [("cat", "copies", BF16 * M * (K + N), BF16 * M * (K + N), 0)]


def test_the_gradient_of_a_slice_is_zeros_and_a_copy() -> None:
    x = on_meta(M, K, trained=True)
    with Counter() as counter:
        x[: M // 4].backward(on_meta(M // 4, K))
    assert counted(counter, "backward")[:2] == [
        ("slice_backward", "copies", 0, BF16 * M * K, 0),
        ("slice_backward", "copies", BF16 * M * K // 4, BF16 * M * K // 4, 0),
    ]


def test_silu_is_one_kernel_each_way() -> None:
    x = on_meta(M, K, trained=True)
    with Counter() as counter:
        F.silu(x).backward(on_meta(M, K))
    assert counted(counter) == [("silu", "elementwise", BF16 * M * K, BF16 * M * K, 0)]
    assert counted(counter, "backward")[0] == ("silu_backward", "elementwise", BF16 * 2 * M * K, BF16 * M * K, 0)


def test_what_is_expanded_is_loaded_once_and_what_is_filled_is_not_loaded() -> None:
    x, row = on_meta(M, K), on_meta(K)
    with Counter() as counter:
        x.mul_(row.expand(M, K))
        x * x
        x.zero_()
        x.copy_(row)
    assert [kernel[2:4] for kernel in counted(counter)] == [
        (BF16 * (M * K + K), BF16 * M * K),
        (BF16 * M * K, BF16 * M * K),
        (0, BF16 * M * K),
        (BF16 * K, BF16 * M * K),
    ]


def test_only_chosen_rows_are_touched() -> None:
    table, ids, labels = on_meta(1000, K), on_meta(M, dtype=torch.int64), on_meta(M, 1, dtype=torch.int64)
    with Counter() as counter:
        x = F.embedding(ids, table)
        table.index_add_(0, ids, x)
        x.gather(1, labels)
        x.scatter_(1, labels, -1.0)
        x.scatter(1, labels, on_meta(M, 1))
    assert [kernel[2:4] for kernel in counted(counter)] == [
        (8 * M + BF16 * M * K, BF16 * M * K),
        (8 * M + BF16 * 2 * M * K, BF16 * M * K),
        (8 * M + BF16 * M, BF16 * M),
        (8 * M, BF16 * M),
        (BF16 * M * K, BF16 * M * K),  # out of place: a copy first
        (8 * M + BF16 * M, BF16 * M),
    ]


def test_attention_counts_the_causal_half_of_each_document() -> None:
    from torch.nn.attention.varlen import varlen_attn

    query, key = on_meta(12, 4, 64, trained=True), on_meta(12, 2, 64, trained=True)
    starts = torch.tensor([0, 4, 12], dtype=torch.int32)

    def run(counter: Counter) -> None:
        with counter:
            bounds = starts.to("meta")
            y = varlen_attn(query, key, key, bounds, bounds, 8, 8, window_size=(-1, 0), enable_gqa=True)
            y.backward(torch.empty_like(y))

    counter = Counter(documents=(4, 8))
    run(counter)
    pairs = (4 * 4 + 8 * 8) // 2
    assert [k.kernel.flops for k in counter.kernels if k.kernel.kind == "attention"] == [
        2 * 2 * 4 * 64 * pairs,
        5 * 2 * 4 * 64 * pairs,
    ]
    with pytest.raises(UnknownOperatorError, match=r"attends over 12 tokens, and the documents given .* have 11"):
        run(Counter(documents=(4, 7)))


def test_copies_between_host_and_device_are_transfers_and_no_kernels() -> None:
    x = on_meta(2, dtype=torch.float32)
    with Counter() as counter:
        y = torch.ones(3, dtype=torch.int64).to("meta")
        x.copy_(torch.ones(2))
        assert y.sum().item() == 0
        assert x.tolist() == [0.0, 0.0]
        assert (torch.ones(5) * 2).sum() == 10  # what the host computes is none of the device's
    assert [(each.to_device, each.num_bytes) for each in counter.transfers] == [
        (True, 24),
        (True, 8),
        (False, 8),
        (False, 8),
    ]
    assert [name for name, *_ in counted(counter)] == ["sum"]


def test_a_dequantized_weight_is_a_frozen_one() -> None:
    codes, absmax = on_meta(N, K // 2, dtype=torch.uint8), on_meta(N, K // 64, dtype=torch.float32)
    with Counter() as counter:
        counter.freeze([codes, absmax])
        _ = on_meta(M, K) @ dequantize_nf4(codes, absmax, torch.bfloat16).t()
    dequantized, product = counted(counter)
    # half a byte and a 64th of fp32 loaded, 2 bytes stored for each weight
    assert dequantized == ("dequantize_nf4", "dequantizing", N * K * 9 // 16, N * K * 2, 0)
    assert product[1] == "frozen matmuls"


@torch.library.custom_op("bench_traffic_test::halved", mutates_args=())
def halved(codes: Tensor) -> Tensor:
    """Composed of two kernels."""
    return codes.float().mul_(0.5)


@halved.register_fake
def _(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def test_an_operator_of_ours_is_refused_until_the_table_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, x = on_meta(N, K, dtype=torch.int8), on_meta(M, K, dtype=torch.float32)
    with (
        pytest.raises(UnknownOperatorError, match=r"bench_traffic_test.halved.default: .* no rule .* Add one to RULES"),
        Counter(),
    ):
        halved(codes)
    monkeypatch.setitem(cuda.COMPOSED, "bench_traffic_test::halved", "dequantizing")
    with Counter() as counter:
        counter.freeze([codes])
        _ = x @ halved(codes).t()
    assert [kernel[1:4] for kernel in counted(counter)] == [
        ("dequantizing", N * K, FP32 * N * K),
        ("dequantizing", FP32 * N * K, FP32 * N * K),
        ("frozen matmuls", FP32 * (M * K + N * K), FP32 * M * N),
    ]


def test_a_kernel_takes_its_longer_time_and_attention_its_operations() -> None:
    assert seconds_of(Kernel("mm", "frozen matmuls", 0, 0, flops=7 * 10**14), "forward") == 1.0
    assert seconds_of(Kernel("mm", "LoRA's matmuls", 14 * 10**11, 14 * 10**11, flops=7 * 10**14), "backward") == 1.0
    assert seconds_of(Kernel("add", "elementwise", 28 * 10**11, 28 * 10**11), "forward") == 2.0
    attention = Kernel("attention", "attention", 10**15, 10**15, flops=33 * 10**13)
    assert seconds_of(attention, "recomputation") == 1.0
    assert seconds_of(attention, "backward") == pytest.approx(33 / 27)


def test_gathers_overlap_with_the_kernels_of_their_own_direction() -> None:
    def step_s(gather_s: float) -> float:
        return StepTime({}, 3.0, 6.0, 1.0, gather_s, num_layers=1, num_recomputed=0).step_s

    assert step_s(0.0) == step_s(6.0) == 10.0
    assert step_s(8.0) == 4.0 + 6.0 + 1.0
    assert step_s(20.0) == 10.0 + 10.0 + 1.0


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_the_real_step_computes_the_products_that_the_shape_has(quant: str) -> None:
    case = Case("3.2-1b", quant=quant, sequences=2, length=128, recompute=False)  # type: ignore[arg-type]
    kept = count_step(case, num_layers=3)
    again = count_step(Case(**{**vars(case), "recompute": True}), num_layers=3)
    shape = case.shape
    products = 2 * case.tokens * shape.weights_of_linears()
    attention = 2 * 2 * shape.num_heads * shape.head_dim * case.sequences * case.length**2 // 2

    def flops(counter: Counter, phase: str, kind: str) -> int:
        return sum(
            each.kernel.flops
            for each in counter.kernels
            if (each.place, each.phase, each.kernel.kind) == (1, phase, kind)
        )

    for counter in (kept, again):
        assert flops(counter, "forward", "frozen matmuls") == products
        assert flops(counter, "backward", "frozen matmuls") == products
        assert flops(counter, "forward", "attention") == attention
        assert flops(counter, "backward", "attention") == attention * 5 // 2
        assert bool(layer_sum(counter, 1, "forward", "dequantizing").num_kernels) == (quant != "none")
    assert not any(each.phase == "recomputation" for each in kept.kernels)
    assert 0 < flops(again, "recomputation", "frozen matmuls") <= products
    assert again.kept_bytes[1] < kept.kept_bytes[1] / 4
    time = step_time(case, again)
    assert sum(time.parts.values()) == pytest.approx(time.forward_s + time.backward_s + time.update_s)
    assert min(time.parts["recomputation"], time.parts["optimizer"], time.parts["embedding, head and loss"]) > 0
    assert (time.num_recomputed, time.gather_s, time.parts["FSDP2's copies"]) == (3, 0.0, 0.0)
    head = 2 * 2 * 256 * shape.hidden * shape.vocab  # 254 rows: two tiles
    assert (
        sum(
            each.kernel.flops
            for each in kept.kernels
            if each.place == "head and loss" and each.kernel.kind == "frozen matmuls"
        )
        == head
    )


def test_a_layer_by_the_kernels_is_20_kernels_and_46_in_the_backward_and_the_plan_counts_their_bytes() -> None:
    case = Case("3.2-1b", sequences=2, length=128, recompute=False)
    counter = count_step(case, num_layers=3)
    assert [layer_sum(counter, 1, phase).num_kernels for phase in ("forward", "backward")] == [20, 46]
    setup = case.setup()
    at_one_byte_per_s = replace(INSTANT, elementwise=(AtSize(1, (1.0, 1.0)),))
    elementwise = layer_sum(counter, 1, "forward", "elementwise").num_bytes
    # The plan leaves out a row's number of 1 / rms, and a norm's weight.
    assert speed._elementwise(setup, at_one_byte_per_s).best == pytest.approx(elementwise, rel=0.02)
    loss = [each.kernel for each in counter.kernels if each.kernel.name == "dist_lora::cross_entropy_"]
    planned = speed._loss(setup, at_one_byte_per_s).best
    assert planned == pytest.approx(sum(kernel.num_bytes for kernel in loss), rel=0.01)


def test_without_the_kernels_the_same_layer_is_counted_in_torchs() -> None:
    case = Case("3.2-1b", sequences=2, length=128, recompute=False, fused_kernels="none")
    counter = count_step(case, num_layers=3)
    assert not any(each.kernel.name.startswith("dist_lora::") for each in counter.kernels)
    assert layer_sum(counter, 1, "forward").num_kernels > 30
