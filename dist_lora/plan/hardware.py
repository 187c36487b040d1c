"""GPUs by name: memory, compute and bandwidths from the vendors' data sheets, and the fractions that programs reach."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lora.errors import ConfigError
from dist_lora.layout.choices import DtypeName
from dist_lora.layout.machine import TOLERANCE, is_called, memory_in, names_kind
from dist_lora.plan.measured import Measured
from dist_lora.text import GIB, nearest_few

DEFAULT_GPU = "h100-80gb"
_SIZE = re.compile(r"\d+gb")  # the last part of every name

# Fractions that programs reach, from poor to good. Compute, relative to single large matmuls: torchtune's compiled LoRA runs on
# A100s reach 0.69 and 0.74 (bench/published.yaml), "The Llama 3 Herd of Models" (arXiv 2407.21783, table 4) 0.47 to 0.54 for
# dense training on H100s (38 to 43% of the vendor's figure); thin matmuls and short sequences reach less. Memory and links,
# relative to the vendors' figures: NCCL's and STREAM-like tests reach 70 to 90% for large transfers, less for small ones.
REACHED_COMPUTE = (0.30, 0.80)
# Fraction of the vendor's figure that single large matmuls reach, if unpublished: as on an A100 and an H100.
REACHED_BY_PRODUCTS = 0.85
REACHED_LINK = (0.50, 0.85)
REACHED_MEMORY = (0.60, 0.85)

USABLE = 0.985  # of a GPU's memory: the rest is the driver's
WITH_ECC = 0.937  # where ECC lies in the same memory (GDDR6) a sixteenth more: as nvidia-smi shows of L4, T4 and L40S


@dataclass(frozen=True)
class Gpu:
    """A GPU as in its vendor's data sheet (``source``); bandwidths are in one direction, and None where they aren't known.

    ``tflops`` is of dense bf16 matmuls with fp32 accumulation (without sparsity), of fp32 ones where ``has_bf16`` is False;
    ``product_tflops`` the fastest measured (github.com/stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul
    FLOPS"; for the 3090, 4090, A6000 and L40S github.com/zzc0721/torch-performance-test-data, database.md; ``None``: in
    neither); ``link_gb_s`` to the other GPUs of its node; ``host_gb_s`` to host memory (PCIe 3, 4 or 5, x16; NVLink-C2C);
    ``network_gb_s`` its usual share of its node's network (an assumption, not the vendor's). With ``measured`` those rates
    are used, and the figures here are only for display.
    """

    name: str
    memory_gb: float
    tflops: float | None
    memory_gb_s: float | None
    link_gb_s: float | None
    network_gb_s: float | None
    host_gb_s: float | None
    source: str
    product_tflops: float | None = None
    usable: float = USABLE
    has_bf16: bool = True  # compute capability 8.0 or newer
    measured: Measured | None = None

    @property
    def products_flops_per_s(self) -> float | None:
        """Rate of single large matmuls, in operations per second; None if unknown."""
        if self.product_tflops is None and self.tflops is None:
            return None
        return 1e12 * (self.product_tflops or REACHED_BY_PRODUCTS * (self.tflops or 0))

    @property
    def is_gpu(self) -> bool:
        """False for a measured CPU."""
        return self.measured is None or self.measured.is_gpu

    @property
    def memory_bytes(self) -> int:
        """Usable memory: vendors count GB of 2^30, and drivers reserve some hundred MiB."""
        if self.measured is not None:
            return self.measured.memory_bytes
        return int(self.memory_gb * GIB * self.usable)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "v100-16gb", 16, 15.7, 900, 150, 3.1, 16, "NVIDIA V100 data sheet, SXM2 (single precision)", has_bf16=False
        ),
        Gpu(
            "v100-32gb", 32, 15.7, 900, 150, 12.5, 16, "NVIDIA V100 data sheet, SXM2 (single precision)", has_bf16=False
        ),
        Gpu("t4-16gb", 16, 8.1, 320, 16, 3.1, 16, "NVIDIA T4 data sheet (single precision)", None, WITH_ECC, False),
        Gpu("l4-24gb", 24, 121, 300, 32, 3.1, 32, "NVIDIA L4 data sheet (half of 242)", None, WITH_ECC),
        Gpu("a10g-24gb", 24, 70, 600, 32, 3.1, 32, "NVIDIA A10G, AWS G5: 70 TFLOPS, PCIe 4", None, WITH_ECC),
        Gpu("rtx3090-24gb", 24, 71, 936, 32, 1.2, 32, "NVIDIA Ampere GA102 whitepaper, table 2 (FP32 sums)", 76.68),
        Gpu("rtx4090-24gb", 24, 165, 1008, 32, 1.2, 32, "NVIDIA Ada GPU architecture whitepaper, appendix A", 173.31),
        Gpu("rtx5090-32gb", 32, 209.5, 1792, 64, 1.2, 64, "NVIDIA RTX Blackwell whitepaper, appendix A (FP32 sums)"),
        Gpu("a6000-48gb", 48, 155, 768, 32, 1.2, 32, "NVIDIA RTX A6000 data sheet (half of 309.7)", 123.34),
        Gpu("l40s-48gb", 48, 362, 864, 32, 12.5, 32, "NVIDIA L40S data sheet", 269.15, WITH_ECC),
        # Its Workstation Edition has 1,792 GB/s; 4,000 TOPS in sparse FP4 are 500 in dense bf16.
        Gpu("rtx6000-pro-96gb", 96, 500, 1597, 64, 12.5, 64, "NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet"),
        Gpu("a100-40gb", 40, 312, 1555, 300, 12.5, 32, "NVIDIA A100 data sheet", 271.2),
        Gpu("a100-80gb", 80, 312, 2039, 300, 25, 32, "NVIDIA A100 80GB data sheet, SXM", 271.2),
        Gpu("a100-pcie-40gb", 40, 312, 1555, 32, 12.5, 32, "NVIDIA A100 data sheet, PCIe (without NVLink bridges)"),
        Gpu(
            "a100-pcie-80gb", 80, 312, 1935, 32, 12.5, 32, "NVIDIA A100 80GB data sheet, PCIe (without NVLink bridges)"
        ),
        Gpu("h100-80gb", 80, 989, 3350, 450, 50, 64, "NVIDIA H100 data sheet, SXM (dense)", 794.5),
        Gpu(
            "h100-pcie-80gb", 80, 756, 2000, 64, 12.5, 64, "NVIDIA H100 PCIe data sheet (dense, without NVLink bridges)"
        ),
        Gpu(
            "h100-nvl-94gb",
            94,
            835,
            3900,
            300,
            25,
            64,
            "NVIDIA H100 data sheet, NVL (half of 1,671; bridges of 600 GB/s)",
        ),
        Gpu("h20-96gb", 96, 148, 4000, 450, 50, 64, "NVIDIA H20 data sheet (dense)"),
        Gpu("h200-141gb", 141, 989, 4800, 450, 50, 64, "NVIDIA H200 data sheet, SXM (dense)", 794.5),
        Gpu("b200-180gb", 180, 2250, 8000, 900, 50, 64, "NVIDIA HGX B200 data sheet (dense)", 1745),
        # A 72nd of the rack: 360 PFLOPS with sparsity, 576 TB/s; of NVLink-C2C's 900 GB/s both ways, two GPUs share one Grace.
        Gpu("gb200-186gb", 186, 2500, 8000, 900, 50, 225, "NVIDIA GB200 NVL72 data sheet (half of 5,000)"),
        Gpu("gb300-279gb", 279, 2500, 8000, 900, 100, 225, "NVIDIA GB300 NVL72 data sheet (half of 5,000)"),
        Gpu("mi300x-192gb", 192, 1307, 5300, 448, 50, 64, "AMD Instinct MI300X data sheet", 668.4),
    )
}


def measured_gpu(measured: Measured) -> Gpu:
    """A measured device as a ``Gpu``; its link to host memory isn't measured and taken for PCIe 4."""
    best = max(product.flops_per_s[1] for product in measured.products) / 1e12
    bandwidth = max(rate.bytes_per_s[1] for rate in measured.elementwise) / 1e9
    links = {
        axis: max(rate.bytes_per_s[1] for rate in kinds["all-gather"].by_size) / 1e9
        for axis, kinds in measured.links.items()
    }
    return Gpu(
        name=f"{measured.device}, measured",
        memory_gb=measured.memory_bytes / GIB,
        tflops=best,
        memory_gb_s=bandwidth,
        link_gb_s=links.get("within a node", 0.0),
        network_gb_s=links.get("between nodes", 0.0),
        host_gb_s=32,
        source="dist-lora doctor",
        measured=measured,
    )


def gpus_here(command: Sequence[str] = ("nvidia-smi",), *, timeout_s: float = 20) -> list[Gpu]:
    """The GPUs of this machine, as reported by the driver; empty if there is no driver or it doesn't answer.

    Of a GPU that isn't in the table only the memory is known, and no speed.
    """
    try:
        output = subprocess.run(
            [*command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=timeout_s, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in output.splitlines():
        name, _, size = (cell.strip() for cell in line.rpartition(","))
        if size.isdigit():
            num_bytes = int(size) * 2**20
            known = next((gpu for gpu in GPUS.values() if is_called(gpu.name, name, num_bytes)), None)
            gpus.append(known or gpu_of_memory(num_bytes / GIB, name=name))
    return gpus


def gpu_of_memory(gib: float, *, name: str, tflops: float | None = None) -> Gpu:
    """A GPU of which only the memory is known, and perhaps its ``tflops``: neither its memory's rate nor its links'."""
    return Gpu(name, gib / USABLE, tflops, None, None, None, None, source="as given")


def find_gpu(name: str, *, given_by: str = "--gpu") -> Gpu:
    """A GPU by its name (``h100-80gb``), by parts of it (``h100``), or by its driver's name (``NVIDIA H100 80GB HBM3``).

    ``given_by`` is the option or the setting that has it.

    Raises:
        ConfigError: no GPU has that name, with the nearest names; or several have, with theirs.
    """
    named = [GPUS[found] for found in _called(name.lower())]
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(
            f"{given_by}: {len(named)} GPUs are called {name}: {', '.join(gpu.name for gpu in named)}. Give one of these names"
        )
    hint = nearest_few(name.lower(), GPUS, cutoff=0.3, otherwise=f"known: {', '.join(GPUS)}")
    raise ConfigError(
        f"{given_by}: no GPU called {name} is known ({hint}). `dist-lora plan` also takes its memory: --gpu-gib 80"
    )


def peak_flops_per_s(device: str, dtype: DtypeName) -> float | None:
    """The vendor's figure for dense matmuls in ``dtype`` on the GPU that its driver calls ``device``; None if unknown."""
    named = [GPUS[found] for found in _called(device.lower())]
    if len(named) != 1 or named[0].tflops is None or named[0].has_bf16 != (dtype == "bf16"):
        return None
    return 1e12 * named[0].tflops


def _called(name: str) -> list[str]:
    """The names in the table that a name can mean; one that is the whole type (h100) goes before one with more parts."""
    if name in GPUS:
        return [name]
    asked = set(name.split("-"))
    if not all(_SIZE.fullmatch(part) for part in asked):
        by_type = [key for key in GPUS if set(key.split("-")[:-1]) == asked]
        by_parts = [key for key in GPUS if asked <= set(key.split("-"))]
        if by_type or by_parts:
            return by_type or by_parts
    sizes = memory_in(name)
    of_driver = [key for key in GPUS if names_kind(key.split("-")[:-1], name)]
    return [key for key in of_driver if all(abs(size / GPUS[key].memory_gb - 1) <= TOLERANCE for size in sizes)]
