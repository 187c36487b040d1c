"""The only place where what is trained is attached to the model and named: adapters on linears, and tokens' rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_lora.base.before import RMSNorm
from dist_lora.base.index import WeightIndex
from dist_lora.base.linear import FrozenLinear
from dist_lora.base.llama import Llama
from dist_lora.base.stored_shape import EMBEDDING, HEAD
from dist_lora.base.stream import read_rows
from dist_lora.config.schema import LoraSection
from dist_lora.lora.layer import LoraAdapter, TokenRows, initial_a
from dist_lora.lora.patterns import adapters_of
from dist_lora.lora.tokens import EMBEDDING_ROWS, HEAD_ROWS
from dist_lora.text import ranges

# A trained tensor's first values, fp32 on the CPU, by its whole shape, the run's seed and the base on disk.
# None where they are those of the base's tensor of the same name.
Initial = Callable[[tuple[int, ...], int, WeightIndex | None], Tensor]


@dataclass(frozen=True)
class TrainedTensor:
    """One trained tensor: its name (``model.layers.0.self_attn.q_proj.lora_A``), and where its first values come from.

    ``modules`` hold the parameter, all the same one, as their ``attribute``.
    """

    name: str
    modules: tuple[nn.Module, ...]
    attribute: str
    initial: Initial | None

    @property
    def parameter(self) -> nn.Parameter:
        """The trained parameter."""
        parameter: nn.Parameter = getattr(self.modules[0], self.attribute)
        return parameter

    def put(self, parameter: nn.Parameter) -> None:
        """Train this parameter from here on."""
        for module in self.modules:
            setattr(module, self.attribute, parameter)


def attach_adapters(model: Llama, section: LoraSection) -> list[TrainedTensor]:
    """Attach, on the meta device, an adapter to every linear that the config names, and the rows of its tokens.

    Returns the trained tensors in the order that every rank, engine and file has them: layer by layer, in a
    layer as the model names its linears, A before B; then the rows of the embedding, and of a head of its own.

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
        attached += halves_of(name, adapter)
    return [*attached, *_attach_rows(model, section.token_ids())]


def unfreeze(model: Llama, names: Iterable[str]) -> list[TrainedTensor]:
    """Have these linears and norms of a model on meta trained; returns their weights in the order that the names have."""
    unfrozen = []
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, FrozenLinear | RMSNorm), name
        with torch.device("meta"):
            trained = module.unfreeze()
        unfrozen.append(TrainedTensor(f"{name}.weight", (trained,), "weight", None))
    return unfrozen


def halves_of(linear: str, adapter: LoraAdapter) -> list[TrainedTensor]:
    """A and B of the adapter on a linear of this full name."""
    return [
        TrainedTensor(f"{linear}.lora_A", (adapter,), "lora_A", _drawn(linear)),
        TrainedTensor(f"{linear}.lora_B", (adapter,), "lora_B", _zero),
    ]


def _drawn(linear: str) -> Initial:
    return lambda shape, seed, base: initial_a(linear, rank=shape[0], in_features=shape[1], seed=seed)


def _zero(shape: tuple[int, ...], seed: int, base: WeightIndex | None) -> Tensor:
    return torch.zeros(shape)


def _rows_of(tensor: str, ids: Sequence[int]) -> Initial:
    """These rows of a tensor of the base."""

    def read(shape: tuple[int, ...], seed: int, base: WeightIndex | None) -> Tensor:
        assert base is not None, f"the rows of {tensor} start as the base's, which wasn't given"
        return read_rows(base.tensors[tensor], ids).float()

    return read


def _attach_rows(model: Llama, ids: Sequence[int]) -> list[TrainedTensor]:
    """The trained rows of embedding and head; a tied head has the embedding's."""
    if not ids:
        return []
    with torch.device("meta"):
        of_embedding = TokenRows(ids, width=model.shape.hidden)
        of_head = TokenRows(ids, width=model.shape.hidden)
    model.model.adapter, model.lm_head.adapter = of_embedding, of_head
    if model.shape.tied:
        of_head.rows = of_embedding.rows
        return [TrainedTensor(EMBEDDING_ROWS, (of_embedding, of_head), "rows", _rows_of(EMBEDDING, ids))]
    return [
        TrainedTensor(EMBEDDING_ROWS, (of_embedding,), "rows", _rows_of(EMBEDDING, ids)),
        TrainedTensor(HEAD_ROWS, (of_head,), "rows", _rows_of(HEAD, ids)),
    ]


def layers_of(names: Iterable[str]) -> str:
    """The layers in the full names of tensors, as ``layers 0-1, 5``."""
    return f"layers {ranges(int(name.split('.')[2]) for name in names)}"
