"""Full-size checkpoints that take no disk space: safetensors headers of the real shapes over sparse files.

    python -m bench.sparse 3.1-8b-instruct --out DIR [--random]

They read as zeros; with ``--random`` every weight is drawn (and takes its disk space).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dist_lora.herd.members import MEMBERS
from dist_lora.herd.shape import Shape
from tests.conftest import save_byte_tokenizer
from tests.shapes import sizes_in_config

FILE_BYTES = 4 * 10**9  # per file, as in the hub's uploads; a larger tensor has its own file
ITEM_BYTES = 2  # bf16
DRAWN_AT_ONCE = 2**24


def write_sparse(folder: Path, shape: Shape, *, has_values: bool = False, seed: int = 0) -> int:
    """A model folder in bf16 with config, index, weights and a byte tokenizer; returns the weights' bytes.

    ``has_values`` draws them from N(0, 0.02); norms are ones either way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = list(_files(shape))
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        _write_file(folder / name, tensors, has_values=has_values, seed=seed + number)
    num_bytes = ITEM_BYTES * shape.num_parameters()
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    save_byte_tokenizer(folder)
    return num_bytes


def _files(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, dims in shape.tensor_shapes().items():
        num_bytes = ITEM_BYTES * torch.Size(dims).numel()
        if tensors and size + num_bytes > FILE_BYTES:
            yield tensors
            tensors, size = {}, 0
        tensors[name] = dims
        size += num_bytes
    yield tensors


def _write_file(path: Path, tensors: dict[str, tuple[int, ...]], *, has_values: bool, seed: int) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + ITEM_BYTES * torch.Size(dims).numel()
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, dims in tensors.items():
            if has_values or "norm" in name:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])  # type: ignore[index]
                for values in _values(name, torch.Size(dims).numel(), generator):
                    file.write(values.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def _values(name: str, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for first in range(0, count, DRAWN_AT_ONCE):
        size = min(DRAWN_AT_ONCE, count - first)
        if "norm" in name:
            yield torch.ones(size, dtype=torch.bfloat16)
        else:
            yield torch.empty(size).normal_(0, 0.02, generator=generator).bfloat16()


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **sizes_in_config(shape),
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description="Makes a model folder of a herd member's full size.")
    parser.add_argument("member", choices=sorted(MEMBERS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--random", action="store_true", help="draw every weight; takes the full disk space")
    arguments = parser.parse_args()
    num_bytes = write_sparse(arguments.out, MEMBERS[arguments.member].shape, has_values=arguments.random)
    print(f"{arguments.out}: {num_bytes / 1e9:.1f} GB of weights, nominally")


if __name__ == "__main__":
    main()
