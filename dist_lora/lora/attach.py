"""The one place where adapters are put beside linears and get their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dist_lora.base.llama import Llama
from dist_lora.config.schema import LoraSection
from dist_lora.lora.layer import LoraAdapter
from dist_lora.text import ranges


@dataclass(frozen=True)
class AdapterTensor:
    """One trained tensor: its name (``model.layers.0.self_attn.q_proj.lora_A``) and where it lives."""

    name: str
    module: LoraAdapter
    attribute: str  # lora_A or lora_B

    @property
    def layer(self) -> str:
        """The full name of the linear that it is beside."""
        return self.name.removesuffix(f".{self.attribute}")

    @property
    def parameter(self) -> nn.Parameter:
        """The trained parameter."""
        parameter: nn.Parameter = getattr(self.module, self.attribute)
        return parameter


def attach_adapters(model: Llama, section: LoraSection) -> list[AdapterTensor]:
    """Put an adapter, on the meta device, beside every linear that the config names.

    Returns the trained tensors in the order that every rank, engine and file has them: layer by layer, in a
    layer as the model names its linears, A before B.

    Raises:
        ConfigError: ``lora.layers`` names a layer that the model has not.
    """
    layers = set(section.layer_indices(model.shape.num_layers))
    targets = set(section.target_names())
    attached = []
    for name, linear in model.linears().items():
        layer = int(name.split(".")[2])
        if layer not in layers or name.rsplit(".", 1)[-1] not in targets:
            continue
        with torch.device("meta"):
            adapter = LoraAdapter(
                linear.in_features,
                linear.out_features,
                rank=section.rank,
                alpha=section.alpha,
                dropout=section.dropout,
            )
        linear.adapter = adapter
        attached += [AdapterTensor(f"{name}.{half}", adapter, half) for half in ("lora_A", "lora_B")]
    return attached


def layers_of(names: Iterable[str]) -> str:
    """The layers that full names of tensors speak of, as ``layers 0-1, 5``."""
    return f"layers {ranges(int(name.split('.')[2]) for name in names)}"
