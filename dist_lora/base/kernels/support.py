"""Whether this process can run the kernels on its device."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)  # of compute capability: what Triton 3.7 is made for, and the kernels are compiled for in tests
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run on a CUDA device in a dtype; None if they can: one was compiled and has run. Takes a second or two."""
    if torch.version.cuda is None:
        return "they are made for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"they need compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer, and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in _TYPES:
        return f"they don't compute in {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "Triton isn't installed"
    try:
        compiled = importlib.import_module("dist_lora.base.kernels.compiled")
        with torch.cuda.device(device):
            compiled.silu_times(*torch.zeros(2, 1, 1, dtype=dtype, device=device))
    except Exception as caught:  # anything: it needs a C compiler, a cache that can be written, a fitting driver
        return f"Triton can't run: {type(caught).__name__}: {caught}"
    return None
