"""NaN and infinity in a weight: no scale fits a block that holds one, so such weights are refused by position."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_lora.errors import WeightsError


class NotFiniteError(WeightsError):
    """A weight is NaN or infinite. ``row`` and ``column`` are its position in the rows that were checked."""

    def __init__(self, *, row: int, column: int, value: float, tensor_name: str = "") -> None:
        super().__init__(
            f"{tensor_name or 'A weight matrix'}: row {row:,}, column {column:,} is {value}, and only finite weights "
            "can be quantized. The file is damaged, or the model was saved after its training diverged: fetch it again."
        )
        self.row = row
        self.column = column
        self.value = value

    def within(self, tensor_name: str, *, first_row: int = 0) -> NotFiniteError:
        """The same error with the tensor's name and the row in it, for rows that were a slice from ``first_row`` on."""
        return NotFiniteError(row=first_row + self.row, column=self.column, value=self.value, tensor_name=tensor_name)


def check_finite(rows: Tensor) -> None:
    """Reads all of ``rows`` ``(rows, D_in)`` once, and synchronizes on a GPU.

    Raises:
        NotFiniteError: one of them is NaN or infinite; names the first.
    """
    if rows.numel() == 0 or all(end.isfinite() for end in torch.aminmax(rows)):  # NaN wins in both
        return
    row, column = (~rows.isfinite()).nonzero()[0].tolist()
    raise NotFiniteError(row=row, column=column, value=rows[row, column].item())
