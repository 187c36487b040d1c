"""Which FlashAttention is taken, on pretended GPUs and with pretended packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from torch.nn.attention import _fa4, current_flash_attention_impl, restore_flash_attention_impl

from dist_lora.base.flash import activate_flash

MODULES = ("flash_attn_interface", "flash_attn", "flash_attn.cute", "flash_attn.cute.interface")


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No package is installed before, and torch's own kernels are active after."""
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    _fa4._fa4_import_module.cache_clear()
    yield
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def install_fa4(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    """A package of FlashAttention 4 that has these kernels."""
    for module in MODULES[1:]:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    for kernel in kernels:
        setattr(sys.modules["flash_attn.cute.interface"], kernel, lambda *_: None)


@pytest.mark.parametrize("major", [9, 10])
def test_an_installed_package_that_is_made_for_the_gpu_is_activated(monkeypatch: pytest.MonkeyPatch, major) -> None:
    install_fa4(monkeypatch, "_flash_attn_fwd", "_flash_attn_bwd")
    assert activate_flash(major) == "flash     FlashAttention 4, from flash_attn.cute.interface"
    assert current_flash_attention_impl() == "FA4"


@pytest.mark.parametrize("major", [8, 12])
def test_a_gpu_that_it_is_not_made_for_keeps_torchs_own(monkeypatch: pytest.MonkeyPatch, major) -> None:
    install_fa4(monkeypatch, "_flash_attn_fwd", "_flash_attn_bwd")
    assert activate_flash(major) == (
        f"flash     FlashAttention 2, torch's own: no other is made for GPUs of compute capability {major}.x"
    )
    assert current_flash_attention_impl() is None


def test_where_none_is_installed_torchs_own_is_taken_and_the_packages_are_named() -> None:
    assert activate_flash(9) == (
        "flash     FlashAttention 2, torch's own: not installed: FlashAttention 3 (flash_attn_interface), "
        "FlashAttention 4 (flash_attn.cute.interface)"
    )
    assert activate_flash(10).endswith("not installed: FlashAttention 4 (flash_attn.cute.interface)")
    assert current_flash_attention_impl() is None


def test_a_package_that_cannot_be_loaded_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface")
    )  # without its operators
    line = activate_flash(9)
    assert line.startswith(
        "flash     FlashAttention 2, torch's own: FlashAttention 3 (flash_attn_interface) can't be loaded: "
    )
    assert "does not expose FA3" in line and current_flash_attention_impl() is None
