"""The sizes at which the kernels are run and counted: rows that are no multiple of a block, and each width that models have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    Args:
        sizes: rows and width of a norm or of gate and up; tokens, query heads, key heads and head width of a rotation; rows and
            vocabulary of logits.
        flag: what the operator may do besides: add first (``norm``), add the stream's gradient and give h
            (``norm_backward_``), give h (``silu_times_backward_``), turn back (``rotate_``), leave the gradient
            (``cross_entropy_``).
    """

    operator: str
    sizes: tuple[int, ...]
    dtype: str
    flag: bool = True

    @property
    def name(self) -> str:
        """By which its results are found."""
        return f"{self.operator}-{'x'.join(map(str, self.sizes))}-{self.dtype}-{self.flag}"


DTYPES = ("float32", "bfloat16", "float16")
NORMS = (("norm", 11), ("norm_backward_", 9))
CASES = (
    *(Case(name, (rows, width), "float32", flag) for name, rows in NORMS for width in (576, 2048) for flag in (True, False)),
    *(Case(name, (3, width), "float32") for name, _ in NORMS for width in (4096, 16384)),
    *(Case(name, (8, 576), dtype) for name, _ in NORMS for dtype in DTYPES[1:]),
    *(Case("silu_times", (7, 1536), dtype) for dtype in DTYPES),
    *(Case("silu_times", (2, 2048), "float32") for _ in range(1)),
    *(Case("silu_times_backward_", (7, 1536), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    *(Case("rotate_", (5, 9, 3, 64), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    *(Case("rotate_", (3, 32, 8, 128), "float32", flag) for flag in (True, False)),
    Case("rotate_", (2, 3, 1, 96), "float32"),
    *(Case("cross_entropy_", (4, 5000), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    Case("cross_entropy_", (3, 128256), "float32"),
)  # fmt: skip
