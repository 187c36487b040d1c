"""The only place that imports bitsandbytes. Only a GPU needs it: on a CPU this package computes the formats."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from dist_lora.errors import ConfigError

_REMEDY = (
    "Install one that has them (`pip install 'bitsandbytes>=0.50'`; `python -m bitsandbytes` reports what it "
    "finds on this machine), or set model.quant to int8 or none, which don't need it."
)


def gpu_functions(device: torch.device) -> ModuleType:
    """``bitsandbytes.functional``, after a check that its kernels for ``device`` can be called.

    Raises:
        ConfigError: bitsandbytes is absent, can't be imported, or was loaded without kernels for this GPU.
    """
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        native = importlib.import_module("bitsandbytes.cextension").lib
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "bitsandbytes":
            raise ConfigError(_lacking(device, "bitsandbytes is not installed")) from error
        raise ConfigError(_lacking(device, f"bitsandbytes {_version()} can't be imported ({error})")) from error
    except Exception as error:  # a broken library fails in many ways: OSError, RuntimeError, AttributeError
        problem = f"bitsandbytes {_version()} can't be imported ({type(error).__name__}: {error})"
        raise ConfigError(_lacking(device, problem)) from error
    if device.type == "cuda" and not getattr(native, "compiled_with_cuda", False):
        reason = vars(native).get("error_msg") or "it loaded its CPU library"  # getattr returns a function
        toolkit = torch.version.cuda or torch.version.hip
        problem = f"bitsandbytes {_version()} has no kernels for CUDA {toolkit}: {reason}"
        raise ConfigError(_lacking(device, problem))
    return functional


def _lacking(device: torch.device, problem: str) -> str:
    return f"model.quant: nf4 on {device} needs the kernels of bitsandbytes, and {problem}. {_REMEDY}"


def _version() -> str:
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return "(version unknown)"
