"""int8 is a scale a row and whole numbers, by the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_lora.base.quant import int8
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.int8 import dequantize_int8, quantize_int8


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_a_row_by_hand() -> None:
    # The largest magnitude is 127, so a code is the weight itself, rounded half to even.
    rows = torch.tensor(
        [[-127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.2, 127.0], [0.0] * 8, [254.0, 3.0, 1.0, -5.0] + [0.0] * 4]
    )
    codes, scale = quantize_int8(rows)
    assert codes[0].tolist() == [-127, 0, 2, 2, 0, -2, 3, 127]
    assert codes[1].tolist() == [0] * 8
    assert codes[2].tolist() == [127, 2, 0, -2, 0, 0, 0, 0]
    assert scale[0].item() == 1.0 and scale[2].item() == 2.0
    weight = dequantize_int8(codes, scale, torch.float32)
    assert weight[2].tolist() == [254.0, 4.0, 0.0, -4.0, 0.0, 0.0, 0.0, 0.0]
    assert weight[1].tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_at_once", [1, 1000, 2**17])
def test_codes_and_scales_are_those_of_the_library_and_of_numpy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weights_at_once: int
) -> None:
    monkeypatch.setattr(int8, "_CHUNK_ON_CPU", weights_at_once)
    monkeypatch.setattr(int8, "_DEQUANTIZED_ON_CPU", weights_at_once)
    rows = random_rows(37, 300).to(dtype)
    codes, scale = quantize_int8(rows)
    their_codes, their_absmax, _ = functional.int8_vectorwise_quant(rows)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (37, 1)
    assert torch.equal(codes, their_codes)
    assert torch.equal(scale, their_absmax[:, None] / 127)
    values = rows.float().numpy()
    absmax = np.abs(values).max(axis=1, keepdims=True)
    assert np.array_equal(codes.numpy(), np.rint(values * (np.float32(1) / absmax * np.float32(127))))
    expected = codes.numpy().astype(np.float32) * scale.numpy()
    assert np.array_equal(dequantize_int8(codes, scale, torch.float32).numpy(), expected)
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_int8(codes, scale, narrow), torch.from_numpy(expected).to(narrow))


def test_no_weight_is_further_from_its_code_than_half_a_scale() -> None:
    rows = random_rows(64, 512) * torch.logspace(-36, 37, 64)[:, None]
    codes, scale = quantize_int8(rows)
    error = (dequantize_int8(codes, scale, torch.float32).double() - rows.double()).abs()
    assert (error <= 0.5001 * scale.double()).all()
    assert codes.abs().amax(dim=1)[8:].eq(127).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 9.9e-36])
def test_rows_of_next_to_nothing_stay_finite(magnitude: float) -> None:
    rows = torch.full((2, 8), magnitude)
    rows[1] = -magnitude
    codes, scale = quantize_int8(rows)
    weight = dequantize_int8(codes, scale, torch.float32)
    assert weight.isfinite().all() and ((weight - rows).abs() <= 4e-38).all()
    assert (scale >= torch.finfo(torch.float32).tiny).all()


def test_huge_weights_stay_finite() -> None:
    rows = torch.tensor([[3.4e38, -3.4e38, 1.0]])
    codes, scale = quantize_int8(rows)
    assert codes.tolist() == [[127, -127, 0]]
    assert dequantize_int8(codes, scale, torch.float32).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_independent(dtype: torch.dtype) -> None:
    rows = random_rows(13, 100).to(dtype)
    codes, scale = quantize_int8(rows)
    for part in (slice(0, 5), slice(5, 6), slice(6, 13), slice(4, 4), slice(0, 13, 2)):
        part_codes, part_scale = quantize_int8(rows[part])
        assert torch.equal(part_codes, codes[part]) and torch.equal(part_scale, scale[part])
        assert part_codes.is_contiguous() and part_scale.is_contiguous()
        assert torch.equal(dequantize_int8(part_codes, part_scale, dtype), dequantize_int8(codes, scale, dtype)[part])
    columns = rows.t().contiguous().t()
    assert torch.equal(quantize_int8(columns)[0], codes) and quantize_int8(columns)[0].is_contiguous()


def test_every_code_survives() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(3, 1)  # -128 too, which nobody writes
    scale = torch.tensor([[1.0], [0.5], [3e-3]])
    assert torch.equal(dequantize_int8(codes, scale, torch.float32), codes.float() * scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(value: float, dtype: torch.dtype) -> None:
    rows = random_rows(5, 70).to(dtype)
    rows[2, 69] = value
    with pytest.raises(NotFiniteError, match=rf"A weight matrix: row 2, column 69 is {value}, and only finite"):
        quantize_int8(rows)


def test_no_graph_grows_from_the_parts_and_cast_scales_are_noticed() -> None:
    codes, scale = quantize_int8(random_rows(4, 64).requires_grad_())
    assert not scale.requires_grad and not dequantize_int8(codes, scale, torch.float32).requires_grad
    with pytest.raises(AssertionError, match=r"scale has become torch\.bfloat16"):
        dequantize_int8(codes, scale.bfloat16(), torch.float32)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_see_one_operator(device: str) -> None:
    with FakeTensorMode():
        codes = torch.empty(16384, 53248, dtype=torch.int8, device=device)
        weight = dequantize_int8(codes, torch.empty(16384, 1, device=device), torch.bfloat16)
    assert weight.shape == (16384, 53248) and weight.dtype == torch.bfloat16 and weight.device.type == device
    torch.library.opcheck(dequantize_int8, (*quantize_int8(random_rows(2, 128)), torch.bfloat16))


class Operators(TorchDispatchMode):
    """Records the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_one_operator_reads_the_codes_and_writes_the_weight(dtype: torch.dtype) -> None:
    """3 bytes are moved for a weight in 16 bits: nothing stands between its code and its value."""
    codes, scale = torch.empty(64, 2**20, dtype=torch.int8, device="meta"), torch.empty(64, 1, device="meta")
    weight = torch.empty(codes.shape, dtype=dtype, device="meta")
    with Operators() as operators:
        int8._fill_rows(weight, codes=codes, scale=scale)
    assert operators.names == ["aten.mul.out"]
