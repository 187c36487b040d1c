"""A Llama's sizes: read from its config.json, with what follows from them.

Source: the config.json of the hub's meta-llama, and transformers' ``LlamaConfig``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_lora.config.schema import LoraSection
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.config_keys import unsupported_keys
from dist_lora.herd.foreign import differences_from_llama
from dist_lora.herd.rope import CONTEXT, SCALING, RopeScaling, rope_of, rope_type, scaling_of, unsupported_rope
from dist_lora.herd.skipped import skipped_linears


@dataclass(frozen=True)
class Shape:
    """All sizes of a Llama, and what follows from them.

    ``context`` is in tokens; ``tied``: the head shares the embedding's matrix (no ``lm_head.weight`` on disk).
    ``given_parameters`` is the number of parameters given by hand, for a model that has the sizes of a Llama but isn't one.
    ``unquantized``: linears, by full name, that stay unquantized whatever ``model.quant`` is, since whoever published the
    model in 4 bits left them so.
    """

    hidden: int
    ffn: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    context: int
    norm_eps: float
    tied: bool
    given_parameters: int | None = None
    unquantized: frozenset[str] = frozenset()

    @staticmethod
    def from_config(config: Mapping[str, Any], *, where: str) -> Shape:
        """The shape in a model's config.json, under Hugging Face's names.

        Both spellings of RoPE are read, as transformers does (``herd.rope``). Missing entries have transformers' defaults.

        Args:
            where: the file, for errors.

        Raises:
            ConfigError: it isn't a Llama, or has unsupported parts; all of them are named.
            WeightsError: a size is missing, isn't a number, or contradicts the others.
        """
        unsupported = _unsupported_parts(config)
        if unsupported:
            raise ConfigError(f"{where}: not a Llama that can be trained here:" + _listed(unsupported))
        damage = _damaged_sizes(config)
        if damage:
            raise WeightsError(f"{where} is damaged:" + _listed(damage) + "\n  Fetch that file again.")
        heads = config["num_attention_heads"]
        rope = rope_of(config)
        shape = Shape(
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=scaling_of(rope),
            context=config.get("max_position_embeddings") or CONTEXT,
            norm_eps=float(config.get("rms_norm_eps", _NORM_EPS)),
            tied=config.get("tie_word_embeddings", False),
        )
        return replace(shape, unquantized=skipped_linears(config, shape.linear_names()))

    def linear_names(self) -> Iterator[str]:
        """Full name of every linear, first layer first."""
        for layer in range(self.num_layers):
            for linear in self.linear_shapes():
                yield module_path(linear, layer=layer)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linears of a layer, in canonical order."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    def weights_of_linears(self) -> int:
        """Weights of the seven linears of a layer; with ``given_parameters`` those of the whole layer."""
        if self.given_parameters is not None:
            return self.weights_of_a_layer()
        return sum(out * in_ for out, in_ in self.linear_shapes().values())

    def weights_of_embedding_and_head(self) -> int:
        """Weights of the embedding and the head; a tied head counts once."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def weights_of_a_layer(self) -> int:
        """Weights of one layer; with ``given_parameters`` its part of all but the embedding and the head."""
        if self.given_parameters is not None:
            return (self.given_parameters - self.weights_of_embedding_and_head()) // self.num_layers
        return self.weights_of_linears() + 2 * self.hidden

    def num_parameters(self) -> int:
        """Parameters of the base; a tied head counts once."""
        if self.given_parameters is not None:
            return self.given_parameters
        return self.weights_of_embedding_and_head() + self.num_layers * self.weights_of_a_layer() + self.hidden

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a checkpoint, by name on disk, in the model's order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.num_layers):
            for linear, shape in self.linear_shapes().items():
                shapes[f"{module_path(linear, layer=layer)}.weight"] = shape
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (self.hidden,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def trained_weights(self, section: LoraSection) -> int:
        """Weights of all adapters that a config attaches, and of the rows of its tokens.

        Raises:
            ConfigError: ``lora.layers`` or ``lora.modules`` names a layer that the model doesn't have.
        """
        layers = section.layer_indices(self.num_layers)
        rows = self.trained_rows(section) * self.hidden
        if section.modules is None:
            return rows + self.adapter_parameters(section.target_names(), layers, section.rank)
        shapes = self.linear_shapes()
        return rows + sum(module.rank * sum(shapes[module.linear]) for module in section.modules)

    def unfrozen_weights(self, names: Iterable[str]) -> int:
        """Weights of these linears and norms: see ``herd.unfrozen``."""
        shapes = self.tensor_shapes()
        return sum(math.prod(shapes[f"{name}.weight"]) for name in names)

    def trained_rows(self, section: LoraSection) -> int:
        """Rows of the embedding, and of a head of its own, that are trained: one or two for each token."""
        return len(section.train_tokens) * (1 if self.tied else 2)

    def flops(
        self, *, tokens: float, rows: float, pairs: float, trained_weights: int, unfrozen_weights: int = 0
    ) -> float:
        """Floating-point operations that a forward and a backward with a frozen base need; recomputations aren't among them.

        4 per weight of a frozen matmul and token (2 forward, 2 for the input's gradient, none for its own), 6 per trained
        weight and token (of the base's own that are trained 2 more than of frozen ones), 12 per pair of head entries and attended pair of tokens. Source: PaLM, arXiv 2204.02311, appendix B,
        without the frozen weights' own gradients.

        Args:
            trained_weights: all that are trained, ``unfrozen_weights`` of the base among them.
            tokens: of all documents; ``rows``: those whose next token is predicted.
            pairs: a token and one that it attends to, itself among them.
        """
        in_layers = self.num_layers * self.weights_of_linears()
        entries = self.num_layers * self.num_heads * self.head_dim
        head = self.vocab * self.hidden
        trained = 6 * (trained_weights - unfrozen_weights) + 2 * unfrozen_weights
        return 4 * in_layers * tokens + trained * tokens + 12 * entries * pairs + 4 * head * rows

    def adapter_parameters(self, targets: Iterable[str], layers: Iterable[int], rank: int) -> int:
        """Trainable parameters: r (in + out) for each adapted linear of each adapted layer."""
        shapes = self.linear_shapes()
        return rank * sum(sum(shapes[target]) for target in targets) * len(tuple(layers))


def module_path(linear: str, *, layer: int) -> str:
    """Full name of a layer's linear: ``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{linear}"


# transformers' defaults for a Llama (4.x and 5.23 alike).
_NORM_EPS = 1e-6

_REQUIRED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# No Llama comes near; the lists of names made from larger sizes would fill the memory before any file is read.
_MAX_LAYERS = 1000
_MAX_SIZE = 2**31
_MAX_CONFIG_BYTES = 2**20


def _listed(faults: Iterable[str]) -> str:
    return "".join(f"\n  {fault}" for fault in faults)


def _unsupported_parts(config: Mapping[str, Any]) -> list[str]:
    """Why the model of this config can't be trained here."""
    faults = []
    if config.get("model_type") != "llama":
        faults.append(f"model_type: found {config.get('model_type')!r}, expected 'llama'")
    architectures = config.get("architectures")
    if architectures and not (isinstance(architectures, list) and "LlamaForCausalLM" in architectures):
        faults.append(f"architectures: found {architectures}, expected ['LlamaForCausalLM']")
    faults += differences_from_llama(config)
    faults += unsupported_keys(config)
    quantization = config.get("quantization_config")
    if quantization and not _is_nf4(quantization):
        faults.append(
            f"quantization_config: found weights quantized by {_quantizer(quantization)}, expected none, or bitsandbytes "
            "with load_in_4bit and bnb_4bit_quant_type 'nf4': use the unquantized model"
        )
    return faults + unsupported_rope(config)


def _is_nf4(quantization: Any) -> bool:
    """The only supported kind of quantized weights (dist_lora/base/quant/published.py)."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method", "bitsandbytes") == "bitsandbytes"
        and quantization.get("load_in_4bit") is True
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    )


def _quantizer(quantization: Any) -> str:
    if not isinstance(quantization, Mapping):
        return repr(quantization)
    method = quantization.get("quant_method")
    if method != "bitsandbytes":
        return str(method or dict(quantization))
    if quantization.get("load_in_4bit"):
        return f"bitsandbytes in 4 bits of type {quantization.get('bnb_4bit_quant_type', 'fp4')!r}"
    return "bitsandbytes in 8 bits" if quantization.get("load_in_8bit") else f"bitsandbytes with {dict(quantization)}"


def _damaged_sizes(config: Mapping[str, Any]) -> list[str]:
    """Sizes that are missing or invalid."""
    faults = []
    for name in (*_REQUIRED_SIZES, *_OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if value is None:
            faults.append(f"{name}: is missing, expected a whole number above 0")
        elif type(value) is not int or value < 1:
            faults.append(f"{name}: found {value!r}, expected a whole number above 0")
        elif value > (largest := _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE):
            faults.append(f"{name}: found {value}, expected at most {largest:,}")
    rope = rope_of(config)
    numbers: dict[str, Any] = {
        "rope_theta": rope["rope_theta"],
        "rms_norm_eps": config.get("rms_norm_eps", _NORM_EPS),
    }
    if rope_type(rope) == "llama3":
        numbers |= {f"rope {name}": rope.get(name) for name in SCALING}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < _MAX_SIZE:
            faults.append(f"{name}: found {value!r}, expected a number above 0")
    if type(config.get("tie_word_embeddings", False)) is not bool:
        faults.append(f"tie_word_embeddings: found {config['tie_word_embeddings']!r}, expected true or false")
    return faults or _contradictions(config)


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    """Sizes that are valid each, but contradict each other."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    faults = []
    if heads % kv_heads:
        faults.append(f"num_key_value_heads: found {kv_heads}, which doesn't divide the {heads} heads")
    if hidden % heads:  # transformers refuses it even where head_dim is given
        faults.append(f"num_attention_heads: found {heads}, which doesn't divide hidden_size {hidden}")
    elif head_dim % 2:
        faults.append(f"head_dim: found {head_dim}, expected an even number: RoPE rotates pairs")
    return faults


def read_shape(folder: Path) -> Shape:
    """The shape in a model folder's config.json.

    Raises:
        ConfigError: see ``read_config``; or its model can't be trained here.
        WeightsError: config.json is damaged.
    """
    return Shape.from_config(read_config(folder), where=str(folder / "config.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a model folder's config.json.

    Raises:
        ConfigError: the folder has no config.json, or also holds an adapter.
        WeightsError: config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(no_config(folder))
    refuse_adapter_inside(folder)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise WeightsError(f"{path} is damaged: longer than {_MAX_CONFIG_BYTES:,} bytes. Fetch that file again.")
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged: not JSON ({error}). Fetch that file again.") from None
    except OSError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} can't be read: {error.strerror or error}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged: expected settings in {{...}}. Fetch that file again.")
    return config


def refuse_adapter_inside(folder: Path) -> None:
    """Raise ``ConfigError`` where a model's folder also holds an adapter.

    transformers would load the base that the adapter names, and the adapter on it; the folder's own weights alone are
    another model.
    """
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"model.name: the folder {folder} holds both a model (config.json) and an adapter (adapter_config.json), and "
            "transformers would use them together. Move adapter_config.json and adapter_model.safetensors to a folder of "
            "their own. This folder is then the base alone; to start from the adapter set lora.start_from to the other "
            "folder, and to make one model of both: dist-lora merge"
        )


def no_config(folder: Path) -> str:
    """The message for a model folder without config.json."""
    advice = "expected config.json, *.safetensors and the tokenizer's files side by side"
    if (folder / "params.json").is_file():
        advice = "this is Meta's own format (params.json); download the model in Hugging Face's format"
    elif (folder / "adapter_config.json").is_file():
        advice = "this is an adapter: set model.name to its base and lora.start_from to the adapter"
    return f"model.name: the folder {folder} has no config.json: {advice}"
