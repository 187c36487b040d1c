"""Which FlashAttention computes ``varlen``: the newest one that is installed and made for the GPU, or torch's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn.attention import activate_flash_attention_impl

# By the major number of a GPU's compute capability, the fastest first: FlashAttention 3 has kernels for 9.0 only, 4 for 9.0 and 10.0
# (torch 2.13, torch/nn/attention/_fa3.py and _fa4.py). torch knows both by name whether they are installed or not.
_MADE_FOR: Mapping[int, tuple[str, ...]] = {9: ("FA3", "FA4"), 10: ("FA4",)}
_PACKAGES: Mapping[str, tuple[str, str]] = {
    "FA3": ("FlashAttention 3", "flash_attn_interface"),
    "FA4": ("FlashAttention 4", "flash_attn.cute.interface"),
}


def activate_flash(capability_major: int) -> str:
    """Have torch compute flash attention by the best kernels there are; returns which, as a line for the log.

    It acts on the whole process. A package that is installed and can't be loaded is named with its error, and passed over.

    Args:
        capability_major: of this process's GPU.
    """
    broken = []
    for name in _MADE_FOR.get(capability_major, ()):
        title, module = _PACKAGES[name]
        try:
            activate_flash_attention_impl(name)
        except ModuleNotFoundError as caught:
            if caught.name is None or not f"{module}.".startswith(f"{caught.name}."):
                broken.append(f"{title} ({module}) can't be loaded: {caught}")  # it lacks a package itself
        except (ImportError, OSError, RuntimeError, AttributeError) as caught:
            broken.append(f"{title} ({module}) can't be loaded: {caught}")
        else:
            return f"flash     {title}, from {module}"
    reason = "; ".join(broken) or _why_own(capability_major)
    return f"flash     FlashAttention 2, torch's own: {reason}"


def _why_own(capability_major: int) -> str:
    names = [_PACKAGES[name] for name in _MADE_FOR.get(capability_major, ())]
    if not names:
        return f"no other is made for GPUs of compute capability {capability_major}.x"
    return f"not installed: {', '.join(f'{title} ({module})' for title, module in names)}"
