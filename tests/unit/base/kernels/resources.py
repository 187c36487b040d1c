"""Compiles every kernel for sm_80 and sm_90, without a GPU, and prints as JSON what each takes: registers, spilled bytes.

A program of its own: in a process that has imported Triton for its interpreter, nothing can be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_lora.base.kernels import compiled

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90)
POINTERS = {"inverse_rms_at": "*fp32", "labels_at": "*i64", "losses_at": "*fp32"}
SCALARS = {"num_rows": "i32", "num_numbers": "i32", "eps": "fp32"}


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and constants, of each width that models have; ``num_warps`` is among the constants."""
    for width in (576, 2048, 4096, 8192, 16384):
        for flag in (True, False):
            sizes = compiled.sizes_of_norm(width, is_backward=False)
            yield f"norm-{width}-{flag}", compiled._norm, {"HAS_DELTA": flag, **sizes}
            sizes = compiled.sizes_of_norm(width, is_backward=True)
            yield (
                f"norm_backward_-{width}-{flag}",
                compiled._norm_backward,
                {"HAS_STREAM": flag, "NEEDS_H": flag, **sizes},
            )
    block = {"BLOCK": compiled.NUMBERS_PER_PROGRAM, "num_warps": 8}
    yield "silu_times", compiled._silu_times, block
    for flag in (True, False):
        yield f"silu_times_backward_-{flag}", compiled._silu_times_backward, {"NEEDS_H": flag, **block}
        for heads, key_heads, width in ((32, 8, 64), (32, 8, 128), (128, 8, 128)):
            query, key = torch.empty(1, heads * width), torch.empty(1, key_heads * width)
            sizes = compiled.sizes_of_rotate(query, key, torch.empty(1, 1, width // 2))
            yield f"rotate_-{heads}-{width}-{flag}", compiled._rotate, {"IS_BACK": flag, **sizes}
        constants = {"TO_GRADIENT": flag, "VOCAB": 128256, "BLOCK": compiled.LOGITS_AT_ONCE, "num_warps": 8}
        yield f"cross_entropy_-{flag}", compiled._cross_entropy, constants


def resources(kernel: Any, constants: dict[str, Any], number: str, architecture: int) -> dict[str, int]:
    """Registers of a thread and the bytes that it keeps in local memory, as ``cuobjdump`` reads them from the binary."""
    constants = dict(constants)
    warps = constants.pop("num_warps")
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name) or SCALARS.get(name) or f"*{number}" for name in names}
    signature |= {name: "constexpr" for name in constants}
    # As the launcher finds them: pointers that torch allocates are multiples of 16.
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name not in SCALARS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout)}


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name}-{number}-sm_{architecture}": resources(kernel, constants, number, architecture)
                for name, kernel, constants in variants()
                for number in ("bf16", "fp32")
                for architecture in ARCHITECTURES
            }
        )
    )
