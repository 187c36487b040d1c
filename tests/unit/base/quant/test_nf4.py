"""NF4 is bitsandbytes' NF4, bit for bit, whatever the weights are and however the rows are cut."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_lora.base.quant import nf4
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.nf4 import LEVELS, dequantize_nf4, quantize_nf4

# The 16 levels as fp32, and the midpoints between neighbours as bitsandbytes rounds them.
TABLE = functional.get_4bit_type("nf4", device="cpu")
MIDPOINTS = (TABLE[:-1] + TABLE[1:]) / 2
ALL_16_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def quantize_by_library(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_4bit(rows, blocksize=64, quant_type="nf4", compress_statistics=False)
    return codes.view(len(rows), -1), state.absmax.view(len(rows), -1)


def dequantized_by_library(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    state = functional.QuantState(absmax=absmax.flatten(), shape=shape, dtype=dtype, blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(codes.reshape(-1, 1), state)


def assert_as_the_library(rows: Tensor) -> None:
    (codes, absmax), (their_codes, their_absmax) = quantize_nf4(rows), quantize_by_library(rows)
    assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
    assert torch.equal(codes, their_codes)
    assert torch.equal(bits(absmax), bits(their_absmax))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def next_floats(value: Tensor, steps: int) -> Tensor:
    """The neighbours of an fp32 number, up to ``steps`` away on both sides."""
    return (value.view(torch.int32) + torch.arange(-steps, steps + 1, dtype=torch.int32)).view(torch.float32)


def test_one_block_by_hand() -> None:
    block = torch.zeros(1, 64)
    block[0, :4] = torch.tensor([-2.0, 2.0, 1.1, 0.05])
    codes, absmax = quantize_nf4(block)
    assert absmax.tolist() == [[2.0]]
    # -1 is level 0 and 1 level 15; 0.55 is nearest to 0.5626 (13), 0.025 to 0 (7). The first weight is the high half.
    assert codes[0, :3].tolist() == [0x0F, 0xD7, 0x77]
    weight = dequantize_nf4(codes, absmax, torch.float32)
    assert weight[0, :5].tolist() == [-2.0, 2.0, 2 * LEVELS[13], 0.0, 0.0]


def test_every_level_is_the_nearest() -> None:
    rows = random_rows(8, 1024)
    codes, absmax = quantize_nf4(rows)
    levels = torch.stack([codes >> 4, codes & 15], dim=-1).view(8, 16, 64)
    values = rows.view(8, 16, 64).double() / absmax.double()[..., None]
    distances = (values[..., None] - torch.tensor(LEVELS, dtype=torch.float64)).abs()
    chosen = distances.gather(-1, levels.long()[..., None]).squeeze(-1)
    assert (chosen - distances.amin(dim=-1)).abs().max() < 1e-6  # an ulp of fp32 beside a midpoint


@pytest.mark.parametrize("on_disk", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["by magnitude", "mixed"])
def test_all_16_bit_numbers_as_the_library(on_disk: torch.dtype, order: str) -> None:
    numbers = ALL_16_BITS.view(on_disk)
    numbers = numbers[numbers.isfinite()]  # 65,280 or 63,488: whole blocks, denormals and both zeros too
    if order == "mixed":
        numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))]
    else:
        numbers = numbers[numbers.float().abs().sort(stable=True).indices]
    assert_as_the_library(numbers.view(-1, 64))
    assert_as_the_library(numbers.view(-1, 64).float())


def test_all_bf16_numbers_in_a_block_whose_absmax_is_1() -> None:
    numbers = ALL_16_BITS.view(torch.bfloat16)
    numbers = numbers[numbers.float().abs() <= 1]
    numbers = numbers[: len(numbers) // 63 * 63].view(-1, 63)
    for largest in (1.0, -1.0):
        assert_as_the_library(torch.cat([numbers.new_full((len(numbers), 1), largest), numbers], dim=1))


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 0.0213, 1 / 3, 3e38, 1e-30, 1.2e-38, 1e-38, 7e-40])
def test_weights_on_a_midpoint_and_beside_it(scale: float) -> None:
    blocks = []
    for midpoint in MIDPOINTS:
        block = torch.ones(64)
        near = next_floats(midpoint, 5)
        block[1 : 1 + len(near)] = near
        blocks += [block * scale, -block * scale]
    assert_as_the_library(torch.stack(blocks))


def test_a_weight_on_a_midpoint_takes_the_level_below() -> None:
    block = torch.ones(1, 64)
    block[0, :15] = MIDPOINTS
    block[0, 15:30] = torch.stack([next_floats(midpoint, 1)[2 if midpoint > 0 else 0] for midpoint in MIDPOINTS])
    codes, _ = quantize_nf4(block)
    levels = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
    assert levels[:15].tolist() == list(range(15))
    assert levels[15:30].tolist() == list(range(1, 16))


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 128),
        -torch.zeros(2, 128),
        torch.arange(64 * 500, dtype=torch.int32).view(torch.float32).view(-1, 64),  # the smallest denormals
        (torch.arange(64 * 2000, dtype=torch.int32) * 65).view(torch.float32).view(-1, 64),  # up to 1.2e-38
        random_rows(4, 256) * 1e38,
        torch.full((1, 64), torch.finfo(torch.float32).max),
    ],
    ids=["zeros", "negative zeros", "least denormals", "denormals", "huge", "largest"],
)
def test_extreme_weights_as_the_library(rows: Tensor) -> None:
    assert_as_the_library(rows)
    assert_as_the_library(rows.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at_once", [64, 192, 2**17])
def test_however_many_weights_are_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weights_at_once: int
) -> None:
    monkeypatch.setattr(nf4, "_CHUNK", weights_at_once)
    rows = random_rows(7, 320).to(dtype)
    assert_as_the_library(rows)
    codes, absmax = quantize_nf4(rows)
    assert torch.equal(dequantize_nf4(codes, absmax, dtype), dequantized_by_library(codes, absmax, dtype))


def test_a_matrix_of_more_than_one_chunk_as_the_library() -> None:
    rows = random_rows(129, 2048)  # two chunks and 2,048 weights
    assert rows.numel() > 2 * nf4._CHUNK
    assert_as_the_library(rows)
    codes, absmax = quantize_nf4(rows)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_nf4(codes, absmax, dtype), dequantized_by_library(codes, absmax, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_independent(dtype: torch.dtype) -> None:
    rows = random_rows(13, 192).to(dtype)
    codes, absmax = quantize_nf4(rows)
    for part in (slice(0, 5), slice(5, 6), slice(6, 13), slice(4, 4), slice(0, 13, 2)):
        part_codes, part_absmax = quantize_nf4(rows[part])
        assert torch.equal(part_codes, codes[part]) and torch.equal(part_absmax, absmax[part])
        assert part_codes.is_contiguous() and part_absmax.is_contiguous()
        assert torch.equal(dequantize_nf4(part_codes, part_absmax, dtype), dequantize_nf4(codes, absmax, dtype)[part])
    columns = rows.t().contiguous().t()
    assert not columns.is_contiguous() and torch.equal(quantize_nf4(columns)[0], codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_byte_times_every_bf16_scale_as_the_library(dtype: torch.dtype) -> None:
    scales = ALL_16_BITS.view(torch.bfloat16).float()
    scales = scales[scales.isfinite() & (scales >= 0)]
    codes = torch.arange(256).to(torch.uint8).view(8, 32).repeat(-(-len(scales) // 8), 1)[: len(scales)]
    ours, theirs = dequantize_nf4(codes, scales[:, None], dtype), dequantized_by_library(codes, scales[:, None], dtype)
    if dtype != torch.bfloat16:
        assert torch.equal(bits(ours), bits(theirs))
        return
    # Its AVX-512 kernel makes zeros of what is below bf16's normal numbers; those here are nearer.
    exact = torch.stack([TABLE[(codes >> 4).long()], TABLE[(codes & 15).long()]], dim=-1).view(len(codes), 64).double()
    exact *= scales[:, None].double()
    normal = exact.abs() >= torch.finfo(torch.bfloat16).tiny
    assert torch.equal(bits(ours)[normal], bits(theirs)[normal])
    assert ((ours - exact).abs() <= (theirs - exact).abs()).all()


def test_every_pair_of_bytes_survives() -> None:
    # All 16-bit patterns, so also those that are NaN or infinity where bytes are taken for bf16 or fp16.
    codes = ALL_16_BITS.view(torch.uint8).view(-1, 64)
    scales = random_rows(len(codes), 2).abs()
    by_hand = torch.stack([TABLE[(codes >> 4).long()], TABLE[(codes & 15).long()]], dim=-1).view(-1, 2, 64)
    expected = (by_hand * scales[..., None]).view(-1, 128)
    assert torch.equal(dequantize_nf4(codes, scales, torch.float32), expected)
    assert torch.equal(dequantize_nf4(codes, scales, torch.bfloat16), expected.bfloat16())


def test_dequantized_weights_of_a_level_are_quantized_to_it_again() -> None:
    codes, absmax = quantize_nf4(random_rows(16, 256))
    again, absmax_again = quantize_nf4(dequantize_nf4(codes, absmax, torch.float32))
    assert torch.equal(again, codes) and torch.equal(absmax_again, absmax)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(value: float, dtype: torch.dtype) -> None:
    rows = random_rows(5, 128).to(dtype)
    rows[3, 70] = value
    rows[4, 1] = float("nan")
    with pytest.raises(NotFiniteError) as raised:
        quantize_nf4(rows)
    assert (raised.value.row, raised.value.column, raised.value.exit_code) == (3, 70, 4)
    named = raised.value.within("model.layers.0.mlp.up_proj.weight", first_row=14_000)
    assert str(named) == (
        f"model.layers.0.mlp.up_proj.weight: row 14,003, column 70 is {value}, and only finite weights can be "
        "quantized. The file is damaged, or the model was saved after its training diverged: fetch it again."
    )
    quantize_nf4(rows[:3])


def test_no_graph_grows_from_the_parts() -> None:
    rows = random_rows(4, 64).requires_grad_()
    codes, absmax = quantize_nf4(rows)
    assert not codes.requires_grad and not absmax.requires_grad
    assert not dequantize_nf4(codes, absmax, torch.float32).requires_grad


def test_scales_that_something_cast_are_noticed() -> None:
    codes, absmax = quantize_nf4(random_rows(4, 64))
    with pytest.raises(AssertionError, match=r"absmax has become torch\.bfloat16"):
        dequantize_nf4(codes, absmax.bfloat16(), torch.float32)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_see_one_operator(device: str) -> None:
    with FakeTensorMode():
        codes = torch.empty(16384, 26624, dtype=torch.uint8, device=device)  # the 405B's down_proj
        absmax = torch.empty(16384, 832, device=device)
        weight = dequantize_nf4(codes, absmax, torch.bfloat16)
    assert weight.shape == (16384, 53248) and weight.dtype == torch.bfloat16 and weight.device.type == device
    torch.library.opcheck(dequantize_nf4, (*quantize_nf4(random_rows(2, 128)), torch.bfloat16))
