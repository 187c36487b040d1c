"""The Llama-3 herd: each member's shape, parameters, special tokens, licence and purpose.

A member's facts serve planning and names; a folder's own config.json wins wherever there is one
(:meth:`Shape.from_config`).

Sources: Meta's model cards (github.com/meta-llama/llama-models, models/llama3*/MODEL_CARD.md), its list of
models (llama_models/sku_list.py) and tokenizer (llama_models/llama3/tokenizer.py), "The Llama 3 Herd of
Models" (arXiv 2407.21783, table 3), the config.json and generation_config.json of the hub's meta-llama.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from dist_lora.errors import ConfigError, WeightsError
from dist_lora.text import nearest_few


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and 3.2 stretch RoPE's wavelengths (``rope_type: llama3``); contexts in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Shape:
    """All sizes of a Llama, and what follows from them.

    ``context`` is in tokens; ``tied`` says that the head is the embedding (no ``lm_head.weight`` on disk).
    ``counted`` are the weights of a model that is a Llama in its sizes alone, where somebody counted them.
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
    counted: int | None = None

    @staticmethod
    def from_config(config: Mapping[str, Any], *, where: str) -> Shape:
        """The shape that a model's config.json states, in Hugging Face's names.

        Both spellings of RoPE are read: ``rope_theta`` with ``rope_scaling`` (transformers 4) and
        ``rope_parameters`` (transformers 5). What is absent has the value that transformers gives it.

        Args:
            where: the file, for errors.

        Raises:
            ConfigError: it is no Llama, or one with parts that are not trained here; all of them are named.
            WeightsError: a size is missing, no number, or doesn't fit the others.
        """
        foreign = _foreign_parts(config)
        if foreign:
            raise ConfigError(f"{where}: not a Llama that can be trained here:" + _listed(foreign))
        damage = _damaged_sizes(config)
        if damage:
            raise WeightsError(f"{where} is damaged:" + _listed(damage) + "\n  Fetch that file again.")
        heads = config["num_attention_heads"]
        rope = _rope_of(config)
        return Shape(
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            rope_theta=float(rope.get("rope_theta", _ROPE_THETA)),
            rope_scaling=_scaling_of(rope),
            context=config.get("max_position_embeddings") or _CONTEXT,
            norm_eps=float(config.get("rms_norm_eps", _NORM_EPS)),
            tied=config.get("tie_word_embeddings", False),
        )

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
        """Weights of the seven linears of a layer; where all were counted, those of the whole layer."""
        if self.counted is not None:
            return self.weights_of_a_layer()
        return sum(out * in_ for out, in_ in self.linear_shapes().values())

    def weights_of_the_ends(self) -> int:
        """Weights of the embedding and the head; a tied head counts once."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def weights_of_a_layer(self) -> int:
        """Weights of one layer; where all were counted, its part of those that are at no end."""
        if self.counted is not None:
            return (self.counted - self.weights_of_the_ends()) // self.num_layers
        return self.weights_of_linears() + 2 * self.hidden

    def num_parameters(self) -> int:
        """Parameters of the base; a tied head counts once."""
        if self.counted is not None:
            return self.counted
        return self.weights_of_the_ends() + self.num_layers * self.weights_of_a_layer() + self.hidden

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a checkpoint by its name on disk, in the model's order."""
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

    def adapter_parameters(self, targets: Iterable[str], layers: Iterable[int], rank: int) -> int:
        """Trained parameters: r (in + out) for each adapted linear of each adapted layer."""
        shapes = self.linear_shapes()
        return rank * sum(sum(shapes[target]) for target in targets) * len(tuple(layers))


def module_path(linear: str, *, layer: int) -> str:
    """Full name of a layer's linear: ``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{linear}"


# What transformers takes for a Llama when config.json is silent (4.x and 5.23 alike).
_ROPE_THETA = 10_000.0
_CONTEXT = 2048
_NORM_EPS = 1e-6

_REQUIRED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# No Llama comes near; what is made of them, name by name, would fill the memory before a file is looked at.
_MOST_LAYERS = 1000
_MOST = 2**31
_MAX_CONFIG_BYTES = 2**20
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _listed(faults: Iterable[str]) -> str:
    return "".join(f"\n  {fault}" for fault in faults)


def _rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE's settings in one mapping, whichever transformers wrote them."""
    newer = config.get("rope_parameters")
    if newer:
        return {"rope_theta": config.get("rope_theta", _ROPE_THETA), **newer}
    return {"rope_theta": config.get("rope_theta", _ROPE_THETA), **(config.get("rope_scaling") or {})}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43


def _scaling_of(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def _foreign_parts(config: Mapping[str, Any]) -> list[str]:
    """Why this config is of a model that we don't train."""
    faults = []
    if config.get("model_type") != "llama":
        faults.append(f"model_type: found {config.get('model_type')!r}, expected 'llama'")
    architectures = config.get("architectures")
    if architectures and not (isinstance(architectures, list) and "LlamaForCausalLM" in architectures):
        faults.append(f"architectures: found {architectures}, expected ['LlamaForCausalLM']")
    if config.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act: found {config['hidden_act']!r}, expected 'silu'")
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            faults.append(f"{bias}: found true, expected false: the herd's linears have no bias")
    quantization = config.get("quantization_config")
    if quantization and not _is_nf4(quantization):
        faults.append(
            f"quantization_config: found weights quantized by {_quantizer(quantization)}, expected none, or bitsandbytes "
            "with load_in_4bit and bnb_4bit_quant_type 'nf4': take the model's unquantized folder"
        )
    faults += _foreign_rope(config)
    return faults


def _is_nf4(quantization: Any) -> bool:
    """The one kind of quantized weights that is read (dist_lora/base/quant/published.py)."""
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


def _foreign_rope(config: Mapping[str, Any]) -> list[str]:
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    if not isinstance(config.get(name) or {}, Mapping):
        return [f"{name}: found {config[name]!r}, expected settings with rope_type"]
    rope = _rope_of(config)
    faults = []
    if _rope_type(rope) not in ("default", "llama3"):
        faults.append(f"{name}.rope_type: found {_rope_type(rope)!r}, expected 'default' or 'llama3'")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        faults.append(f"partial_rotary_factor: found {partial}, expected 1.0")
    return faults


def _damaged_sizes(config: Mapping[str, Any]) -> list[str]:
    """What is missing in the config or can't be."""
    faults = []
    for name in (*_REQUIRED_SIZES, *_OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if value is None:
            faults.append(f"{name}: is missing, expected a whole number above 0")
        elif type(value) is not int or value < 1:
            faults.append(f"{name}: found {value!r}, expected a whole number above 0")
        elif value > (most := _MOST_LAYERS if name == "num_hidden_layers" else _MOST):
            faults.append(f"{name}: found {value}, expected at most {most:,}")
    rope = _rope_of(config)
    numbers: dict[str, Any] = {
        "rope_theta": rope["rope_theta"],
        "rms_norm_eps": config.get("rms_norm_eps", _NORM_EPS),
    }
    if _rope_type(rope) == "llama3":
        numbers |= {f"rope {name}": rope.get(name) for name in _SCALING}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < _MOST:
            faults.append(f"{name}: found {value!r}, expected a number above 0")
    if type(config.get("tie_word_embeddings", False)) is not bool:
        faults.append(f"tie_word_embeddings: found {config['tie_word_embeddings']!r}, expected true or false")
    return faults or _misfits(config)


def _misfits(config: Mapping[str, Any]) -> list[str]:
    """Sizes that are right alone and wrong together."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    faults = []
    if heads % kv_heads:
        faults.append(f"num_key_value_heads: found {kv_heads}, which doesn't divide the {heads} heads")
    if not config.get("head_dim") and hidden % heads:
        faults.append(f"num_attention_heads: found {heads}, which doesn't divide hidden_size {hidden}")
    elif head_dim % 2:
        faults.append(f"head_dim: found {head_dim}, expected an even number: RoPE turns pairs")
    return faults


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the herd's control tokens; None where the member's tokenizer has none of that name.

    ``stop`` are the ids that end an answer, as generation_config.json lists them.
    """

    begin_of_text: int
    end_of_text: int
    start_header: int
    end_header: int
    end_of_turn: int
    end_of_message: int | None
    pad: int | None
    stop: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """A published model of the herd.

    ``languages`` are those that its model card supports officially; ``tool_use``: trained to call tools.
    """

    name: str
    hub_id: str
    title: str
    shape: Shape
    instruct: bool
    guard: bool
    tokens: SpecialTokens
    licence: str
    released: date
    languages: tuple[str, ...]
    tool_use: bool

    @property
    def is_finetuned(self) -> bool:
        """Trained to answer (Instruct) or to judge (Guard), not only to continue text."""
        return self.instruct or self.guard

    @property
    def is_multilingual(self) -> bool:
        """Officially supports more than English."""
        return len(self.languages) > 1

    @property
    def has_long_context(self) -> bool:
        """Reads more than the 8,192 tokens of Llama 3."""
        return self.shape.context > 8192

    @property
    def purpose(self) -> str:
        """What it is for, in one line."""
        if self.guard:
            return "judges whether a prompt or an answer is safe, and names the hazard"
        kind = "answers, in chats" if self.instruct else "continues text; a base for fine-tuning"
        extras = {
            "multilingual": self.is_multilingual,
            "long context": self.has_long_context,
            "tool use": self.tool_use,
        }
        said = [extra for extra, has in extras.items() if has]
        return kind + (f" ({', '.join(said)})" if said else "")


_SIZES = {
    # name: hidden, ffn, layers, heads, head_dim, tied. All members have 8 kv heads (405B: Meta's newer
    # release, on the hub since August 2024; the first one had 16).
    "1b": (2048, 8192, 16, 32, 64, True),
    "8b": (4096, 14336, 32, 32, 128, False),
    "70b": (8192, 28672, 80, 64, 128, False),
    "405b": (16384, 53248, 126, 128, 128, False),
}


def _shape(size: str, *, rope_factor: float | None) -> Shape:
    hidden, ffn, num_layers, num_heads, head_dim, tied = _SIZES[size]
    scaling = None if rope_factor is None else RopeScaling(rope_factor, 1.0, 4.0, 8192)
    return Shape(
        hidden=hidden,
        ffn=ffn,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab=128_256,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        context=8192 if scaling is None else 131_072,
        norm_eps=1e-5,
        tied=tied,
    )


_ENGLISH = ("English",)
_EIGHT = ("English", "German", "French", "Italian", "Portuguese", "Hindi", "Spanish", "Thai")


@dataclass(frozen=True)
class _Release:
    """What the members of one release share."""

    licence: str
    released: date
    languages: tuple[str, ...]
    rope_factor: float | None

    @property
    def has_3_1_tokens(self) -> bool:
        """<|eom_id|> and <|finetune_right_pad_id|> came with 3.1; before, their ids were reserved."""
        return self.rope_factor is not None


_RELEASES = {
    "3": _Release("Meta Llama 3 Community License", date(2024, 4, 18), _ENGLISH, None),
    "3.1": _Release("Llama 3.1 Community License", date(2024, 7, 23), _EIGHT, 8.0),
    "3.2": _Release("Llama 3.2 Community License", date(2024, 9, 25), _EIGHT, 32.0),
}


def _member(name: str, hub_name: str, *, release: str, size: str, kind: str) -> Member:
    facts = _RELEASES[release]
    newer = facts.has_3_1_tokens
    stop = (128_001,) if kind == "base" else (128_001, 128_008, 128_009) if newer else (128_001, 128_009)
    return Member(
        name=name,
        hub_id=f"meta-llama/{hub_name}",
        title=hub_name.removeprefix("Meta-").replace("-", " "),
        # Guard 3 8B is a tuned 3.1 8B and takes its RoPE; llama_models' list calls it unscaled.
        shape=_shape(size, rope_factor=facts.rope_factor),
        instruct=kind == "instruct",
        guard=kind == "guard",
        tokens=SpecialTokens(
            begin_of_text=128_000,
            end_of_text=128_001,
            start_header=128_006,
            end_header=128_007,
            end_of_turn=128_009,
            end_of_message=128_008 if newer else None,
            pad=128_004 if newer else None,
            stop=stop,
        ),
        licence=facts.licence,
        released=facts.released,
        languages=facts.languages,
        tool_use=kind == "instruct" and newer,
    )


def _all_members() -> dict[str, Member]:
    members = []
    for release, sizes in {"3": ("8b", "70b"), "3.1": ("8b", "70b", "405b"), "3.2": ("1b",)}.items():
        for size in sizes:
            hub_name = f"{'Meta-' if release == '3' else ''}Llama-{release}-{size.upper()}"
            members.append(_member(f"{release}-{size}", hub_name, release=release, size=size, kind="base"))
            members.append(
                _member(
                    f"{release}-{size}-instruct",
                    f"{hub_name}-Instruct",
                    release=release,
                    size=size,
                    kind="instruct",
                )
            )
    members.append(_member("guard-3-8b", "Llama-Guard-3-8B", release="3.1", size="8b", kind="guard"))
    members.append(_member("guard-3-1b", "Llama-Guard-3-1B", release="3.2", size="1b", kind="guard"))
    return {member.name: member for member in members}


MEMBERS: dict[str, Member] = _all_members()
"""Every member by its name in ``model.name``."""


def read_shape(folder: Path) -> Shape:
    """The shape that a model folder's config.json states.

    Raises:
        ConfigError: the folder has no config.json, or it is of a model that is not trained here.
        WeightsError: config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(_no_config(folder))
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
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged: expected settings in {{...}}. Fetch that file again.")
    return Shape.from_config(config, where=str(path))


def _no_config(folder: Path) -> str:
    advice = "expected config.json, *.safetensors and the tokenizer's files side by side"
    if (folder / "params.json").is_file():
        advice = "this is Meta's own format (params.json); fetch the model in Hugging Face's"
    elif (folder / "adapter_config.json").is_file():
        advice = "this is an adapter: give its base here, and the adapter in lora.start_from"
    return f"model.name: the folder {folder} has no config.json: {advice}"


@dataclass(frozen=True)
class ResolvedModel:
    """What ``model.name`` means: a folder or a model on the hub, with the member if it is one."""

    name: str
    folder: Path | None
    hub_id: str | None
    member: Member | None


def resolve_model(name: str) -> ResolvedModel:
    """A member's name (in any case), an existing folder, or a hub id (``org/name``), in this order.

    Nothing is fetched, and that a hub id exists is not checked. ``./`` before a folder's name keeps it from
    being taken for a member.

    Raises:
        ConfigError: it is none of the three (with the nearest members), or a folder without config.json.
    """
    member = MEMBERS.get(name.lower())
    if member is not None:
        return ResolvedModel(name=member.name, folder=None, hub_id=member.hub_id, member=member)
    folder = _folder_called(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ConfigError(_no_config(folder))
        return ResolvedModel(name=name, folder=folder, hub_id=None, member=None)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        known = {_plain_hub_id(member.hub_id): member for member in MEMBERS.values()}
        return ResolvedModel(name=name, folder=None, hub_id=name, member=known.get(_plain_hub_id(name)))
    raise ConfigError(
        f"model.name: found {name!r}, expected a herd member, an existing folder or a hub id (org/name); "
        f"{_nearest_members(name)}"
    )


def _folder_called(name: str) -> Path | None:
    """The folder of that name; None also where no folder can be called so."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL; a home of nobody
        return None


def _plain_hub_id(hub_id: str) -> str:
    """Meta renamed Meta-Llama-3.1-8B to Llama-3.1-8B on the hub; both lead there."""
    return hub_id.lower().replace("/meta-llama-", "/llama-")


def _nearest_members(name: str) -> str:
    plain = re.sub(r"[\s_]+", "-", name.lower()).removeprefix("meta-").removeprefix("llama").lstrip("-")
    return nearest_few(plain, MEMBERS, otherwise=f"members: {', '.join(MEMBERS)}")
