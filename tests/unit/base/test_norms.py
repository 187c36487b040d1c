"""The norm of a weight is the sum of what ranks read of it: each row once, whatever the sharding and the format on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from dist_lora.base.index import open_index
from dist_lora.base.norms import Squares, norm_of, squares_of
from dist_lora.base.quant.formats import Format, Int8, Nf4, Plain
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.stream import Slot, fill_slots

NAME = "model.layers.0.mlp.up_proj.weight"


def flat_slots(fmt: Format, shape: tuple[int, int], *, world_rank: int, world_size: int) -> list[Slot]:
    """A rank's slots as ZeRO-3 cuts them: each part by its elements, across rows."""
    slots = []
    for part in fmt.parts(*shape):
        size = part.shape[0] * part.shape[1]
        chunk = -(-size // world_size)
        start, stop = min(size, chunk * world_rank), min(size, chunk * (world_rank + 1))
        home = torch.empty(stop - start, dtype=part.dtype)
        slots.append(Slot(NAME, part.name, part.shape, start, home))
    return slots


@pytest.mark.parametrize("fmt", [Plain(torch.bfloat16), Nf4(), Int8()], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("max_slice_bytes", [1, 1000, 2**20])
def test_ranks_that_share_rows_sum_each_once(
    tmp_path: Path, fmt: Format, world_size: int, max_slice_bytes: int
) -> None:
    weight = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    save_file({NAME: weight}, tmp_path / "model.safetensors")
    index = open_index(tmp_path)
    parts = [
        fill_slots(
            flat_slots(fmt, (9, 128), world_rank=rank, world_size=world_size),
            index=index,
            formats={NAME: fmt},
            norms_of=[NAME],
            max_slice_bytes=max_slice_bytes,
        ).squares[NAME]
        for rank in range(world_size)
    ]
    assert sum(part.num_rows for part in parts) == 9
    expected = float(weight.double().norm())
    assert norm_of(parts, num_rows=9) == pytest.approx(expected, rel=1e-6)  # before the format rounds it
    assert norm_of(parts * 3, num_rows=9) == pytest.approx(expected, rel=1e-6)  # three nodes with all of it


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_weight_published_in_nf4_has_the_norm_of_its_values(tmp_path: Path, is_nested: bool, world_size: int) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_nested)
    packed = {f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file({NAME: codes, **packed}, tmp_path / "model.safetensors")
    on_disk = open_base_on_disk(tmp_path, quant="nf4")
    parts = [
        fill_slots(
            flat_slots(Nf4(), (8, 128), world_rank=rank, world_size=world_size),
            index=on_disk.index,
            formats={NAME: Nf4()},
            quantized=on_disk.nf4,
            norms_of=[NAME],
            max_slice_bytes=100,
        ).squares[NAME]
        for rank in range(world_size)
    ]
    values = functional.dequantize_4bit(codes, state)
    assert norm_of(parts, num_rows=8) == pytest.approx(float(values.double().norm()), rel=1e-6)
    assert norm_of(parts, num_rows=8) != pytest.approx(float(weight.double().norm()), rel=1e-6)


def test_nothing_is_summed_unless_it_is_asked_for(tmp_path: Path) -> None:
    save_file({NAME: torch.ones(4, 64)}, tmp_path / "model.safetensors")
    slots = flat_slots(Plain(torch.float32), (4, 64), world_rank=0, world_size=1)
    assert fill_slots(slots, index=open_index(tmp_path)).squares == {}


def test_a_large_weight_in_16_bits_keeps_its_digits() -> None:
    rows = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert norm_of([squares_of(rows)], num_rows=4096) == pytest.approx(float(rows.double().norm()), rel=1e-6)


def test_a_row_that_nobody_or_not_everybody_read_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="0 rows were read of 3"):
        norm_of([], num_rows=3)
    with pytest.raises(AssertionError, match="4 rows were read of 3"):
        norm_of([Squares(3, 1.0), Squares(1, 1.0)], num_rows=3)


def test_a_weight_that_is_not_finite_has_no_norm() -> None:
    rows = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    assert norm_of([squares_of(rows)], num_rows=2) is None
