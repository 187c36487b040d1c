"""The Triton kernels: interpreted beside float64, compiled for GPUs that aren't there, and counted as they load and store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.traffic.counter import Counter
from dist_lora.base.kernels import operators, support
from tests import ROOT
from tests.unit.base.kernels.cases import CASES, Case

# The interpreter (Triton 3.7) cuts numbers off where it makes bf16 of fp32, and a GPU rounds them: up to twice as far off, and once
# more where what was rounded is rounded again.
TRUNCATED = 3.0


def run(module: str, *, cache: Path) -> dict[str, Any]:
    """What a program of this folder prints."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", f"tests.unit.base.kernels.{module}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("interpreted", cache=tmp_path_factory.mktemp("triton"))


by_name = {"ids": lambda case: case.name}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, **by_name)
def test_a_kernel_is_as_near_to_float64_as_its_plain_twin(case: Case, interpreted: dict[str, Any]) -> None:
    found = interpreted[case.name]
    for of_kernel, of_twin in zip(found["kernel"], found["twin"], strict=True):
        if case.dtype == "bfloat16":
            assert of_kernel < max(TRUNCATED * of_twin, 2**-7)
        else:
            # Of sums in another order by chance one is a little nearer, or the other.
            assert of_kernel < 1.25 * of_twin


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_never_hidden(interpreted: dict[str, Any]) -> None:
    assert interpreted["not finite"] == [[True, False]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_computed_by_the_kernels_has_the_numbers_of_the_plain_one(
    recompute: bool, interpreted: dict[str, Any]
) -> None:
    distances = interpreted[f"layer, recompute={recompute}"]
    assert len(distances) == 16 and max(distances) < 2e-6


def call(case: Case) -> None:
    """The operator of a case on the meta device."""
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if case.operator == "rotate_":
        tokens, heads, key_heads, width = case.sizes
        angles = [empty(tokens, 1, width // 2) for _ in range(2)]
        operators.rotate_(empty(tokens, heads * width), empty(tokens, key_heads * width), *angles, case.flag)
        return
    rows, width = case.sizes
    x, y, z = (empty(rows, width) for _ in range(3))
    if case.operator == "norm" and case.flag:
        operators.add_norm(x, y, empty(width), 1e-5)
    elif case.operator == "norm":
        operators.norm(x, empty(width), 1e-5)
    elif case.operator == "norm_backward_":
        more = (y, empty(rows, width)) if case.flag else (None, None)
        operators.norm_backward_(x, z, empty(width), empty(rows, 1, dtype=torch.float32), *more)
    elif case.operator == "silu_times":
        operators.silu_times(x, y)
    elif case.operator == "silu_times_backward_":
        operators.silu_times_backward_(x, y, z, case.flag)
    else:
        operators.cross_entropy_(x, empty(rows, 1, dtype=torch.int64), case.flag)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, **by_name)
def test_an_operator_is_counted_as_one_kernel_with_what_it_loads_and_stores(
    case: Case, interpreted: dict[str, Any]
) -> None:
    with Counter() as counter:
        call(case)
    kernels = [each.kernel for each in counter.kernels if not each.kernel.name.startswith("aten::")]
    assert [(kernel.loaded_bytes, kernel.stored_bytes) for kernel in kernels] == [
        (interpreted[case.name]["loaded"], interpreted[case.name]["stored"])
    ]


@pytest.mark.slow
def test_no_kernel_spills_a_register_on_sm_80_or_sm_90(tmp_path: Path) -> None:
    found = run("resources", cache=tmp_path)
    assert len(found) == 124
    assert {name: used for name, used in found.items() if used["STACK"] or used["LOCAL"]} == {}
    # So many that a multiprocessor holds two programs of the largest at once, and eight of the others.
    assert max(used["REG"] for used in found.values()) <= 128


# The operators on the CPU, where they are plain torch


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        (operators.norm, (torch.rand(5, 8), torch.rand(8), 1e-5)),
        (operators.add_norm, (torch.rand(5, 8), torch.rand(5, 8), torch.rand(8), 1e-5)),
        (operators.norm_backward_, (*(torch.rand(5, 8) for _ in range(2)), torch.rand(8), torch.rand(5, 1), None, None)),
        (
            operators.norm_backward_,
            (*(torch.rand(5, 8) for _ in range(2)), torch.rand(8), torch.rand(5, 1), torch.rand(5, 8), torch.rand(5, 8)),
        ),
        (operators.silu_times, (torch.rand(5, 8), torch.rand(5, 8))),
        (operators.silu_times_backward_, (*(torch.rand(5, 8) for _ in range(3)), True)),
        (operators.rotate_, (torch.rand(5, 16), torch.rand(5, 8), torch.rand(5, 1, 2), torch.rand(5, 1, 2), False)),
        (operators.cross_entropy_, (torch.rand(5, 8), torch.arange(5)[:, None], True)),
    ],
    ids=lambda value: getattr(value, "_name", "inputs"),
)  # fmt: skip
def test_an_operator_says_truly_what_it_overwrites_and_what_shapes_it_gives(operator: Any, inputs: Any) -> None:
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_kernels_are_refused_by_name_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(capability: tuple[int, int], *, dtype: torch.dtype = torch.bfloat16) -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return support.why_not(torch.device("cuda", 0), dtype)

    assert reason((9, 0)) == "they are made for NVIDIA's GPUs"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason((7, 5)) == "they need compute capability 8.0 or newer, and this GPU has 7.5"
    assert reason((8, 0), dtype=torch.float64) == "they don't compute in float64"
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert reason((9, 0)) == "Triton isn't installed"
    monkeypatch.setattr(support, "find_spec", lambda name: "there")
    asked: list[str] = []
    given: list[Tensor] = []
    module = SimpleNamespace(silu_times=lambda *tensors: given.extend(tensors))
    monkeypatch.setattr(support.importlib, "import_module", lambda name: (asked.append(name), module)[1])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **settings: zeros(*shape, **settings))
    assert reason((9, 0)) is None
    assert asked == ["dist_lora.base.kernels.compiled"] and [tensor.dtype for tensor in given] == [torch.bfloat16] * 2

    def broken(*tensors: Tensor) -> None:
        raise RuntimeError("Failed to find C compiler")

    module.silu_times = broken
    assert reason((9, 0)) == "Triton can't run: RuntimeError: Failed to find C compiler"
