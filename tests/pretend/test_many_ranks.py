"""One rank of 128, the others simulated: its share of real shapes, read from a checkpoint of full size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.sparse import write_sparse
from dist_lora.herd.members import MEMBERS
from tests import ROOT

MIB = 2**20


def share(folder: Path, *arguments: object) -> dict[str, int]:
    """What ``bench.share`` printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.share", folder, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


@pytest.mark.turn(of=3)
@pytest.mark.parametrize("quant", ["nf4", "none", "int8"])
def test_a_rank_of_128_keeps_its_part_of_8b_and_hardly_more_while_it_loads(tmp_path, quant) -> None:
    shape = MEMBERS["3.1-8b"].shape
    write_sparse(tmp_path, shape)
    found = share(tmp_path, "--ranks", 128, "--rank", 5, "--quant", quant)
    linears = shape.num_layers * sum(out * in_ for out, in_ in shape.linear_shapes().values())
    rows = shape.num_layers * sum(out for out, _ in shape.linear_shapes().values())
    kept = {"none": 2 * linears, "nf4": 0.5625 * linears, "int8": linears + 4 * rows}[quant]
    expected = (kept + 2 * (shape.num_parameters() - linears)) / 128
    assert found["share_bytes"] == pytest.approx(expected, rel=0.01)
    assert found["bytes_read"] == pytest.approx(found["disk_bytes"] / 128, rel=0.01)
    assert found["peak_growth_bytes"] <= found["share_bytes"] + 3 * found["slice_bytes"] + 150 * MIB


@pytest.mark.turn(of=2)
def test_a_rank_of_128_really_loads_its_part_of_405b(tmp_path) -> None:
    write_sparse(tmp_path, MEMBERS["3.1-405b"].shape)
    found = share(tmp_path, "--ranks", 128, "--quant", "nf4")
    assert found["disk_bytes"] == 811_706_777_600
    assert found["bytes_read"] == found["disk_bytes"] // 128
    assert found["peak_growth_bytes"] <= found["share_bytes"] + 3 * found["slice_bytes"] + 500 * MIB


@pytest.mark.slow
def test_more_ranks_than_rows_leave_some_with_nothing_and_load(tmp_path, tiny_llama) -> None:
    # 64 rows of most tensors over 128 ranks: the upper half has none of them.
    last = share(tiny_llama("llama31"), "--ranks", 128, "--rank", 127, "--quant", "nf4", "--dtype", "fp32")
    first = share(tiny_llama("llama31"), "--ranks", 128, "--rank", 0, "--quant", "nf4", "--dtype", "fp32")
    assert 0 < last["share_bytes"] < first["share_bytes"]
