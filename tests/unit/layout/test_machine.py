"""Whether a device is the one that a config names, by the names that drivers give."""

from __future__ import annotations

import pytest

from dist_lora.layout.machine import is_called

MIB = 2**20


@pytest.mark.parametrize(
    ("gpu", "device", "mib", "expected"),
    [
        ("h100-80gb", "NVIDIA H100 80GB HBM3", 81559, True),
        ("a100-40gb", "NVIDIA A100-SXM4-40GB", 40960, True),
        ("a100-80gb", "NVIDIA A100-SXM4-40GB", 40960, False),
        ("rtx4090-24gb", "NVIDIA GeForce RTX 4090", 24564, True),
        ("rtx3090-24gb", "NVIDIA GeForce RTX 4090", 24564, False),
        ("a10g-24gb", "NVIDIA A10G", 23028, True),
        ("l40s-48gb", "NVIDIA L40S", 46068, True),
        ("a6000-48gb", "NVIDIA RTX A6000", 49140, True),
        ("h200-141gb", "NVIDIA H200", 143771, True),
        ("b200-180gb", "NVIDIA B200", 183359, True),
        ("mi300x-192gb", "AMD Instinct MI300X", 196592, True),
        ("h100-nvl-94gb", "NVIDIA H100 NVL", 95830, True),
        ("rtx-6000-ada-48gb", "NVIDIA RTX 6000 Ada Generation", 49140, True),
        ("l40-48gb", "NVIDIA L40S", 46068, False),
        ("h100-80gb", "no GPU", 0, False),
        ("80gb", "NVIDIA H100 80GB HBM3", 81559, False),
        ("h100", "NVIDIA H100 80GB HBM3", 81559, True),
        ("a100", "NVIDIA A100-SXM4-40GB", 40960, True),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 24564, True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", 81559, True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200", 143771, False),
        ("rtx6000-pro-96gb", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, True),
        ("rtx6000-pro-96gb", "NVIDIA RTX 6000 Ada Generation", 49140, False),
        ("gb200-186gb", "NVIDIA GB200", 189471, True),
        ("h20-96gb", "NVIDIA H200", 143771, False),
        ("t4-16gb", "Tesla T4", 15360, True),
        ("v100-32gb", "Tesla V100-SXM2-32GB", 32768, True),
        ("h100-80gb", "NVIDIA H100 PCIe", 81559, False),  # slower, and without NVLink's switches
        ("h100-pcie-80gb", "NVIDIA H100 PCIe", 81559, True),
        ("rtx4090-24gb", "NVIDIA GeForce RTX 4090 D", 24564, False),
        ("rtx3090-24gb", "NVIDIA GeForce RTX 3090 Ti", 24564, False),
    ],
)
def test_a_device_is_known_by_its_kind_and_memory(gpu: str, device: str, mib: int, expected: bool) -> None:
    assert is_called(gpu, device, mib * MIB) is expected
