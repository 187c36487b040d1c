"""GPUs by name: what they hold, compute and move, by their makers' data sheets, and what programs reach of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dist_lora.errors import ConfigError

GIB = 2**30

# What programs reach of the makers' figures, from poor to good. Compute: "The Llama 3 Herd of Models" (arXiv 2407.21783,
# table 4) reports 38 to 43% of the bf16 peak for large dense training on H100; LoRA's thin products and short passes
# reach less. Memory and wires: NCCL's and STREAM-like tests reach 70 to 90% for large transfers, less for small ones.
REACHED_COMPUTE = (0.25, 0.50)
REACHED_WIRE = (0.50, 0.85)
REACHED_MEMORY = (0.60, 0.85)

# Not to be seen on a machine without such a GPU: CUDA's context and the libraries' kernels, NCCL's buffers, and what the
# caching allocator loses between blocks of unlike sizes. Figures for CUDA 12 and NCCL 2: about 0.5 GiB, 0.5 to 1 GiB for
# several communicators; fragmentation as a part of what is held.
CONTEXT_BYTES = 1.5 * GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it; bytes a second are one way, ``source`` the data sheet.

    ``tflops`` are dense bf16 products with fp32 sums; ``link_gb_s`` to the other GPUs of its node; ``host_gb_s`` to host
    memory (PCIe 4 or 5, x16); ``network_gb_s`` the part of its node's network that is common for it (an assumption, not the
    maker's).
    """

    name: str
    memory_gb: float
    tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    host_gb_s: float
    source: str

    @property
    def memory_bytes(self) -> int:
        """What the driver leaves: makers count GB of 2^30, and some hundred MiB are kept."""
        return int(self.memory_gb * GIB * 0.985)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a10g-24gb", 24, 70, 600, 32, 3.1, 32, "NVIDIA A10G, AWS G5: 70 TFLOPS, PCIe 4"),
        Gpu(
            "rtx3090-24gb", 24, 71, 936, 32, 1.2, 32, "NVIDIA Ampere GA102 whitepaper, table 2 (FP16, FP32 accumulate)"
        ),
        Gpu("rtx4090-24gb", 24, 165, 1008, 32, 1.2, 32, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        Gpu("l40s-48gb", 48, 362, 864, 32, 12.5, 32, "NVIDIA L40S data sheet"),
        Gpu("a100-40gb", 40, 312, 1555, 300, 12.5, 32, "NVIDIA A100 data sheet"),
        Gpu("a100-80gb", 80, 312, 2039, 300, 25, 32, "NVIDIA A100 80GB data sheet, SXM"),
        Gpu("h100-80gb", 80, 989, 3350, 450, 50, 64, "NVIDIA H100 data sheet, SXM (dense)"),
        Gpu("h200-141gb", 141, 989, 4800, 450, 50, 64, "NVIDIA H200 data sheet, SXM (dense)"),
        Gpu("b200-180gb", 180, 2250, 8000, 900, 50, 64, "NVIDIA HGX B200 data sheet (dense)"),
        Gpu("mi300x-192gb", 192, 1307, 5300, 448, 50, 64, "AMD Instinct MI300X data sheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        ConfigError: there is none; with the nearest names.
    """
    gpu = GPUS.get(name.lower())
    if gpu is not None:
        return gpu
    near = difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.3)
    told = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(GPUS)}"
    raise ConfigError(f"--gpu: no GPU called {name} is known ({told}). Give another, or its memory: --gpu-gib 80")
