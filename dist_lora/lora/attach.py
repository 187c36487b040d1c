"""The only place where adapters are attached to linears and named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dist_lora.base.llama import Llama
from dist_lora.config.schema import LoraSection, ModuleAdapter
from dist_lora.herd.shape import module_path
from dist_lora.lora.layer import LoraAdapter
from dist_lora.text import ranges


@dataclass(frozen=True)
class AdapterTensor:
    """One trained tensor: its name (``model.layers.0.self_attn.q_proj.lora_A``) and the module that holds it."""

    name: str
    module: LoraAdapter
    attribute: str  # lora_A or lora_B

    @property
    def linear(self) -> str:
        """The full name of the linear that it adapts."""
        return self.name.removesuffix(f".{self.attribute}")

    @property
    def parameter(self) -> nn.Parameter:
        """The trained parameter."""
        parameter: nn.Parameter = getattr(self.module, self.attribute)
        return parameter


def adapters_of(section: LoraSection, *, num_layers: int) -> dict[str, ModuleAdapter]:
    """The adapters of a config on a model, by the full name of the linear, in the model's order.

    Raises:
        ConfigError: ``lora.layers`` or ``lora.modules`` names a layer that the model doesn't have.
    """
    layers, targets = section.layer_indices(num_layers), section.target_names()
    names = [module_path(target, layer=layer) for layer in layers for target in targets]
    if section.modules is None:
        return {name: ModuleAdapter(name=name, rank=section.rank, alpha=section.alpha) for name in names}
    by_name = {module.name: module for module in section.modules}
    return {name: by_name[name] for name in names if name in by_name}


def attach_adapters(model: Llama, section: LoraSection) -> list[AdapterTensor]:
    """Attach an adapter, on the meta device, to every linear that the config names.

    Returns the trained tensors in the order that every rank, engine and file has them: layer by layer, in a
    layer as the model names its linears, A before B.

    Raises:
        ConfigError: ``lora.layers`` names a layer that the model doesn't have.
    """
    settings = adapters_of(section, num_layers=model.shape.num_layers)
    attached = []
    for name, linear in model.linears().items():
        if name not in settings:
            continue
        with torch.device("meta"):
            adapter = LoraAdapter(
                linear.in_features,
                linear.out_features,
                rank=settings[name].rank,
                alpha=settings[name].alpha,
                dropout=section.dropout,
            )
        linear.adapter = adapter
        attached += [AdapterTensor(f"{name}.{half}", adapter, half) for half in ("lora_A", "lora_B")]
    return attached


def layers_of(names: Iterable[str]) -> str:
    """The layers in the full names of tensors, as ``layers 0-1, 5``."""
    return f"layers {ranges(int(name.split('.')[2]) for name in names)}"
