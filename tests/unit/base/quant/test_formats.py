"""What each format stores, what it refuses, and that only a GPU asks for bitsandbytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bitsandbytes import cextension

from dist_lora.base.quant.finite import NotFiniteError, check_finite
from dist_lora.base.quant.formats import Format, Int8, Nf4, PartSpec, Plain, format_of
from dist_lora.base.quant.library import gpu_functions
from dist_lora.config.schema import Quant
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from tests import ROOT

FORMATS: tuple[Format, ...] = (Plain(torch.bfloat16), Plain(torch.float32), Nf4(), Int8())


def test_a_format_is_a_value_named_as_in_the_config() -> None:
    names: tuple[Quant, ...] = ("none", "nf4", "int8")
    formats = [format_of(name, torch.bfloat16) for name in names]
    assert formats == [Plain(torch.bfloat16), Nf4(), Int8()]
    assert tuple(form.name for form in formats) == names
    assert format_of("none", torch.float32) != formats[0] and len({*formats, *formats}) == 3


def test_the_parts_of_a_matrix() -> None:
    assert Plain(torch.bfloat16).parts(96, 128) == (PartSpec("weight", (96, 128), torch.bfloat16),)
    assert Nf4().parts(96, 128) == (
        PartSpec("codes", (96, 64), torch.uint8),
        PartSpec("absmax", (96, 2), torch.float32),
    )
    assert Int8().parts(96, 128) == (
        PartSpec("codes", (96, 128), torch.int8),
        PartSpec("scale", (96, 1), torch.float32),
    )


def stored_bytes(form: Format, out_features: int, in_features: int) -> int:
    """Bytes of all parts of a whole weight."""
    return sum(math.prod(part.shape) * part.dtype.itemsize for part in form.parts(out_features, in_features))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_rows_are_as_specified_and_stand_for_them(form: Format, dtype: torch.dtype) -> None:
    rows = (torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    parts = form.quantize_rows(rows)
    assert [(name, tuple(part.shape), part.dtype) for name, part in parts.items()] == [
        (spec.name, spec.shape, spec.dtype) for spec in form.parts(96, 128)
    ]
    assert all(part.is_contiguous() and not part.requires_grad for part in parts.values())
    assert stored_bytes(form, 96, 128) == sum(part.nbytes for part in parts.values())
    tolerance = {"none": 4e-4, "nf4": 0.013, "int8": 5e-4}[form.name]
    for result in (torch.float32, torch.bfloat16):
        weight = form.dequantize(parts, result)
        assert weight.shape == rows.shape and weight.dtype == result
        assert (weight.float() - rows.float()).abs().max() < tolerance
    some = form.quantize_rows(rows[40:41])
    assert all(torch.equal(part, parts[name][40:41]) for name, part in some.items())
    none = form.quantize_rows(rows[:0])
    assert form.dequantize(none, torch.float32).shape == (0, 128)


def test_plain_weights_are_passed_on_without_a_copy() -> None:
    rows = torch.randn(4, 6)
    form = Plain(torch.float32)
    parts = form.quantize_rows(rows)
    assert parts["weight"].data_ptr() == form.dequantize(parts, torch.float32).data_ptr() == rows.data_ptr()
    weight = torch.nn.Parameter(rows)
    assert not form.dequantize({"weight": weight}, torch.float32).requires_grad


def test_bytes_of_the_405b_in_each_format() -> None:
    shape = MEMBERS["3.1-405b"].shape
    linears = shape.linear_shapes().values()
    weights = shape.num_layers * sum(out * in_ for out, in_ in linears)
    totals = {str(f): shape.num_layers * sum(stored_bytes(f, out, in_) for out, in_ in linears) for f in FORMATS}
    rows = shape.num_layers * sum(out for out, _ in linears)
    assert list(totals.values()) == [2 * weights, 4 * weights, weights * 9 // 16, weights + 4 * rows]


def test_a_shape_whose_rows_are_no_whole_blocks_is_refused_by_nf4_alone() -> None:
    assert [form.refusal(10, 128) for form in FORMATS] == [None] * 4
    assert [form.refusal(10, 100) is None for form in FORMATS] == [True, True, False, True]
    assert Nf4().refusal(4_096, 11_000) == (
        "nf4 splits each row into blocks of 64 weights, and a linear of (4,096, 11,000) has 56 left over in each: set "
        "model.quant to int8 or none."
    )
    with pytest.raises(AssertionError, match="rows of 100 weights are not whole blocks of 64"):
        Nf4().quantize_rows(torch.zeros(2, 100))


def test_the_check_for_finite_weights_names_the_first_that_is_not() -> None:
    rows = torch.zeros(3, 5, dtype=torch.bfloat16)
    check_finite(rows)
    check_finite(rows[:0])
    rows[1, 4], rows[2, 0] = float("inf"), float("nan")
    with pytest.raises(NotFiniteError, match="row 1, column 4 is inf"):
        check_finite(rows)


def forget_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)


def message(device: str = "cuda:1") -> str:
    with pytest.raises(ConfigError) as raised:
        gpu_functions(torch.device(device))
    assert raised.value.exit_code == 2
    assert str(raised.value).endswith(
        "Install one that has them (`pip install 'bitsandbytes>=0.50'`; `python -m bitsandbytes` reports what it finds "
        "on this machine), or set model.quant to int8 or none, which don't need it."
    )
    return str(raised.value)


def test_bitsandbytes_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_bitsandbytes(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert message().startswith(
        "model.quant: nf4 on cuda:1 needs the kernels of bitsandbytes, and bitsandbytes is not installed. Install"
    )


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import no_such_module", "can't be imported (No module named 'no_such_module')"),
        (
            "raise OSError('libcudart.so.13: no such file')",
            "can't be imported (OSError: libcudart.so.13: no such file)",
        ),
    ],
)
def test_bitsandbytes_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, what: str
) -> None:
    forget_bitsandbytes(monkeypatch)
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert f"and bitsandbytes {version('bitsandbytes')} {what}. Install" in message()


def test_bitsandbytes_without_kernels_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cextension, "lib", cextension.BNBNativeLibrary(None))
    assert "has no kernels for CUDA 13.0: it loaded its CPU library. Install" in message()
    broken = cextension.ErrorHandlerMockBNBNativeLibrary(
        "No compatible CUDA binary found at /x/libbitsandbytes_cuda130.so"
    )
    monkeypatch.setattr(cextension, "lib", broken)
    assert (
        "kernels for CUDA 13.0: No compatible CUDA binary found at /x/libbitsandbytes_cuda130.so. Install" in message()
    )


def test_bitsandbytes_with_kernels_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cextension.lib, "compiled_with_cuda", True, raising=False)
    assert gpu_functions(torch.device("cuda")).__name__ == "bitsandbytes.functional"


MEASURE = """
import json, sys, torch
from dist_lora.base.quant.formats import format_of
def peak():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024
form = format_of(sys.argv[1], torch.bfloat16)
rows = torch.full((256, 65536), 0.01, dtype=torch.bfloat16)
form.dequantize(form.quantize_rows(rows[:1]), torch.bfloat16)
before = peak()
parts = form.quantize_rows(rows)
quantized = peak()
weight = form.dequantize(parts, torch.bfloat16)
print(json.dumps([quantized - before, peak() - quantized, "bitsandbytes" in sys.modules]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [Nf4(), Int8()], ids=str)
def test_peak_memory_is_the_result_and_little_more_and_a_cpu_needs_no_library(form: Format) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, form.name],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    quantizing, dequantizing, has_imported = json.loads(done.stdout)
    stored = stored_bytes(form, 256, 65536)
    # The kernel counts pages by batches of each thread: some megabytes of noise. A second copy would be 16 or more.
    assert stored - 4_000_000 < quantizing < stored + 8_000_000
    assert 0.9 * 2 * 256 * 65536 < dequantizing < 2 * 256 * 65536 + 8_000_000
    assert not has_imported
