"""Every setting of a run: its name, type, bounds, default and a one-line description.

This is the only place where a setting is declared. The messages about wrong settings (``config.faults``) and the JSON schema
for editors are generated from it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    model_validator,
)

from dist_lora.config.guard import Augmentation, Category, GuardVersion, fault_of, tidy_name
from dist_lora.errors import ConfigError
from dist_lora.text import count, nearest, ranges

LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[LinearName, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The seven linears of a Llama layer, in the canonical order."""
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
"""The norms of a Llama: two of a layer, and the last one."""

MODULE_NAME = r"^model\.layers\.(0|[1-9][0-9]{0,2})\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$"

# What other trainers adapt or train besides the linears.
_NOT_ADAPTED = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Expected:
    """Marks a type with its description for error messages, where the type alone says too little."""

    words: str


class SettingFaults(ValueError):
    """Conflicts between settings of a section.

    Each is a pair: the settings involved, the one at fault first, and the message.
    """

    def __init__(self, faults: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(message for _, message in faults))
        self.faults = faults


def _check_run(run: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", run) or run.strip(".") == "":
        raise ValueError(
            f"{run!r} is not a valid run name: letters, digits, '.', '_' and '-' only "
            "(its parent folder is set by runs_dir)"
        )
    return run


def _check_target(target: Any) -> Any:
    seven = " ".join(LINEARS)
    name = str(target).rpartition(".")[2]
    if name in _NOT_ADAPTED:
        raise ValueError(
            f"{target!r} stays frozen: only the seven linears of a layer are adapted ({seven}), "
            "never the embeddings or the head (where they are tied, both are one matrix, and an adapter on one "
            "would have to change the other); lora.train_tokens trains the rows of some tokens"
        )
    if target not in LINEARS:
        near = nearest(name, LINEARS)
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"{target!r} is not a linear of Llama ({seven}){hint}")
    return target


def _check_some(values: Any) -> Any:
    """Refuse an empty list, and one with duplicates."""
    if isinstance(values, list):
        if not values:
            raise ValueError("the list is empty, expected at least one")
        _refuse_twice(values)
    return values


def _refuse_twice(values: Any) -> Any:
    if isinstance(values, list):
        twice = [str(value) for value, count in Counter(map(str, values)).items() if count > 1]
        if twice:
            raise ValueError(f"{', '.join(twice)}: named more than once")
    return values


# Names of an evaluation's own values: of losses and answers, of a Guard's verdicts, and of tool calls.
_VALUES = (
    *("model", "loss", "base_loss", "perplexity", "target_tokens", "exact_match", "seconds"),
    *("unsafe", "safe", "precision", "recall", "f1", "false_positive_rate", "average_precision", "guard", "tool_calls"),
    *("tool_valid", "tool_right_name", "tool_right_arguments", "tool_missing", "tool_unwanted"),
)


def _check_metrics(paths: list[str]) -> list[str]:
    """Refuse metrics that would be reported under one name, or under that of a value of ours."""
    _refuse_twice(paths)
    names = Counter(path.rpartition(":")[2].rpartition(".")[2] for path in paths)
    twice = [name for name, count in names.items() if count > 1 or name in _VALUES]
    if twice:
        raise ValueError(f"{', '.join(twice)}: the name of another value of an evaluation; name the function otherwise")
    return paths


def _check_modules(modules: Any) -> Any:
    if modules is not None:
        _refuse_twice([module.name for module in modules])
    return modules


def _check_range(layers: str) -> str:
    first, last = (int(end) for end in layers.split("-"))
    if first > last:
        raise ValueError(f"{layers!r} runs backwards; write {last}-{first}")
    return layers


INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # not allowed in file names, and not encodable in UTF-8


def _layers_in_words(setting: str | int) -> str | int:
    """``true`` and ``false``, as other trainers have them, are all layers and none."""
    if isinstance(setting, bool):
        return "all" if setting else "none"
    return setting


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if INVALID_TEXT.search(text):
        raise ValueError("contains NUL or an unpaired surrogate")
    return text


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # of pathlib: there is no home, or no such user
        raise ValueError(f"is {path}: {error}") from None


def _expandable(path: Path) -> Path:
    """A path as it is written: each node may have a home of its own."""
    _expanded(path)
    return path


Text = Annotated[str, AfterValidator(_check_text)]
# A path is written as text; strict mode would require a Path object.
FilePath = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]
Quant = Literal["none", "nf4", "int8"]
QUANTIZED: tuple[Quant, ...] = tuple(quant for quant in get_args(Quant) if quant != "none")
# The trackers that accelerate knows by name.
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
# The options that a tracker may be given, where they are known here: not those that this program sets, like a run's id.
_TRACKER_OPTIONS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("comment", "flush_secs", "max_queue", "filename_suffix"),
    "wandb": ("project", "entity", "group", "tags", "name", "notes", "job_type", "mode", "dir", "save_code"),
    "mlflow": ("experiment_name", "run_name", "tags", "description"),
}


def _check_tracker_options(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Refuse options of no tracker, unknown ones, and values that have no place in a config."""
    for tracker, section in options.items():
        if tracker not in get_args(TrackerName):
            near = nearest(tracker, get_args(TrackerName))
            raise ValueError(f"{tracker!r} is not a tracker ({f'nearest: {near}' if near else 'see log.trackers'})")
        known = _TRACKER_OPTIONS.get(tracker)
        for name, value in section.items():
            if known is not None and name not in known:
                near = nearest(name, known)
                hint = f" (nearest: {near})" if near else ""
                raise ValueError(f"{tracker}.{name}: no such option{hint}; {tracker} takes {', '.join(known)}")
            items = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
            if not all(isinstance(item, str | int | float | bool | None) for item in items):
                raise ValueError(f"{tracker}.{name}: expected a text, a number, true or false, or a list of them")
            if name == "tags" and not isinstance(value, dict if tracker == "mlflow" else list):
                what = "named values, like {team: nlp}" if tracker == "mlflow" else "a list, like [nlp, test]"
                raise ValueError(f"{tracker}.tags: found {value!r}, expected {what}")
    return options


LayerRange = Annotated[
    str,
    Field(pattern=r"^[0-9]+-[0-9]+$"),
    AfterValidator(_check_range),
    Expected("a range of layers like 8-15"),
]
LayerIndex = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]


def _check_set_names(sets: Any) -> Any:
    """Refuse no held-out set at all, and names that would not be a part of a metric's name."""
    if isinstance(sets, dict):
        if not sets:
            raise ValueError("has no set, expected at least one, like {gsm8k: FILE}")
        for name in sets:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise ValueError(f"{name!r} is not a valid name of a set: letters, digits, '.', '_' and '-' only")
    return sets


def _check_answer(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression of Python: {error}") from None
    return pattern


def _check_command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text!r} can't be split into words as a shell would: {error}") from None
    if not words:
        raise ValueError("is empty")
    return text


Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """What all sections share: frozen, strict types, an unknown name is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, defer_build=True
    )


class ShapeSection(Section):
    """The sizes of a Llama given by hand, under config.json's names, to plan without any weights."""

    hidden_size: int = Field(ge=1, description="Width d of the model.")
    intermediate_size: int = Field(ge=1, description="Width of the feed-forward part.")
    num_hidden_layers: int = Field(ge=1, description="Number of layers.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(
        default=None, ge=1, description="Key and value heads; null is num_attention_heads."
    )
    head_dim: int | None = Field(default=None, ge=1, description="Width of a head; null is hidden_size / heads.")
    vocab_size: int = Field(ge=1, description="Size of the vocabulary.")
    max_position_embeddings: int | None = Field(default=None, ge=1, description="Longest context, in tokens.")
    tie_word_embeddings: bool = Field(
        default=False, description="The head shares the embedding's matrix, which counts once."
    )
    num_parameters: int | None = Field(
        default=None, ge=1, description="Parameters of the whole model, if it isn't a Llama; null counts a Llama's."
    )


class ModelSection(Section):
    """The frozen base model."""

    name: Text = Field(description="A herd member (3.1-8b-instruct), a model folder, or a hub id (org/name).")
    shape: ShapeSection | None = Field(
        default=None,
        description="Sizes given by hand, for plan and explain: the name is then only a label. Such a model can't be trained.",
    )
    quant: Quant = Field(
        default="none",
        description="How the linear layers are stored: none is not quantized (see dtype), nf4 takes 4.5 bits per weight, int8 8 bits.",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="dtype of the base and of its computations: auto is bf16 on GPUs and fp32 on CPUs."
    )
    attention: Literal["auto", "sdpa", "varlen", "eager"] = Field(
        default="auto", description="Attention kernel: auto takes the fastest one that works on this machine."
    )


class ModuleAdapter(Section):
    """The adapter on one linear."""

    name: Annotated[str, Field(pattern=MODULE_NAME)] = Field(
        description="Full name of the linear, like model.layers.0.self_attn.q_proj."
    )
    rank: int = Field(ge=1, description="Rank r of this adapter.")
    alpha: float = Field(gt=0, description="This adapter's output is scaled by alpha / rank.")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    @property
    def layer(self) -> int:
        """The layer of its linear."""
        return int(self.name.split(".")[2])

    @property
    def linear(self) -> LinearName:
        """The last part of its linear's name."""
        return next(name for name in LINEARS if name == self.name.rpartition(".")[2])


class LoraSection(Section):
    """The adapters that are trained on the frozen base."""

    rank: int = Field(default=16, ge=1, description="Rank r of the adapters: A is (r, in), B is (out, r).")
    alpha: float = Field(
        default=32.0, gt=0, description="The adapters' output is scaled by alpha / rank (see scaling)."
    )
    scaling: Literal["rank", "sqrt_rank"] = Field(
        default="rank", description="What alpha is divided by: the rank, or its square root (rsLoRA)."
    )
    ranks: dict[Text, Annotated[int, Field(ge=1)]] | None = Field(
        default=None,
        description="Ranks of some linears by a regular expression for the end of their names, as PEFT's rank_pattern: "
        "{down_proj: 32, 'layers.0.*': 8}; the first that matches counts.",
    )
    alphas: dict[Text, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="Alphas of some linears, as lora.ranks has ranks."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability of the adapters' inputs.")
    targets: Annotated[
        Literal["all"] | list[Annotated[LinearName, BeforeValidator(_check_target)]],
        AfterValidator(_check_some),
    ] = Field(default="all", description="Linears that get an adapter: all seven, or a list like [q_proj, v_proj].")
    layers: Annotated[Literal["all"] | LayerRange | list[LayerIndex], AfterValidator(_check_some)] = Field(
        default="all",
        description="Layers that get adapters: all, a list like [0, 1], or a range like 8-15 (both ends included).",
    )
    modules: Annotated[
        list[ModuleAdapter] | None,
        AfterValidator(_check_modules),
        Expected("a list of linears like {name: model.layers.0.self_attn.q_proj, rank: 8, alpha: 16}, or null"),
    ] = Field(
        default=None,
        description="Each adapted linear by its full name, with its own rank and alpha, instead of the settings above, where they "
        "differ by layer; an empty list is no adapter at all, as lora: null.",
    )
    train_tokens: Annotated[
        list[Text | TokenId],
        AfterValidator(_refuse_twice),
        Expected('a list of tokens, by name or id, like ["<|my|>", 128011]'),
    ] = Field(
        default=[],
        description="Tokens whose rows of the embedding, and of a head of its own, are trained beside the adapters: names or ids, "
        'like ["<|my|>", 128011].',
    )
    start_from: FilePath | None = Field(
        default=None,
        description="Folder of an adapter to start from (its weights only, not a resume); settings left out here are taken from it.",
    )

    @property
    def has_adapters(self) -> bool:
        """Whether any linear has an adapter: not where ``lora`` is null."""
        return self.modules != []

    @property
    def has_patterns(self) -> bool:
        """Whether each linear's rank and alpha are still to be resolved: see ``lora.patterns.with_patterns``."""
        return self.scaling != "rank" or bool(self.ranks or self.alphas)

    def token_ids(self) -> tuple[int, ...]:
        """``train_tokens`` once they are ids, ascending: see ``lora.tokens.with_token_ids``."""
        ids = tuple(token for token in self.train_tokens if isinstance(token, int))
        assert ids == tuple(sorted(ids)) and len(ids) == len(self.train_tokens), self.train_tokens
        return ids

    @model_validator(mode="after")
    def _check_conflicts(self) -> LoraSection:
        faults: list[tuple[tuple[str, ...], str]] = []
        for other, what in (
            ("start_from", "the adapter has its ranks and scales"),
            ("modules", "names each linear's rank and alpha"),
        ):
            if getattr(self, other) is not None:
                faults += [
                    ((name, other), f"lora.{other} is set, and {what}: leave lora.{name} out")
                    for name in ("scaling", "ranks", "alphas")
                    if getattr(self, name) not in (None, "rank")
                ]
        if self.modules is None:
            if faults:
                raise SettingFaults(faults)
            return self
        linears = {module.linear for module in self.modules}
        if self.targets != "all" and linears != {*self.targets}:
            named = ", ".join(name for name in LINEARS if name in linears)
            faults.append(
                (("targets", "modules"), f"lora.modules names {named}: leave lora.targets out, or name the same")
            )
        layers = sorted({module.layer for module in self.modules})
        if self.layers != "all":
            chosen = _layers_named(self.layers)
            if len(chosen) != len(layers) or [*chosen] != layers:
                message = f"lora.modules names layers {ranges(layers)}: leave lora.layers out, or name the same"
                faults.append((("layers", "modules"), message))
        if faults:
            raise SettingFaults(faults)
        return self

    def target_names(self) -> tuple[LinearName, ...]:
        """The adapted linears in canonical order (q k v o gate up down), not in the file's order."""
        if self.modules is not None:
            named = {module.linear for module in self.modules}
            return tuple(name for name in LINEARS if name in named)
        return LINEARS if self.targets == "all" else tuple(name for name in LINEARS if name in self.targets)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The adapted layers of a model of ``num_layers``, ascending.

        Raises:
            ConfigError: ``lora.layers`` names a layer that the model doesn't have.
        """
        if self.modules is not None:
            adapted = sorted({module.layer for module in self.modules})
            if adapted and adapted[-1] >= num_layers:
                raise ConfigError(_no_such_layers(f"layer {adapted[-1]} in lora.modules", num_layers))
            return tuple(adapted)
        if self.layers == "all":
            return tuple(range(num_layers))
        named = _layers_named(self.layers)
        if named[-1] >= num_layers:
            outside = (
                self.layers if isinstance(self.layers, str) else ", ".join(str(n) for n in named if n >= num_layers)
            )
            raise ConfigError(_no_such_layers(outside, num_layers))
        return tuple(named)

    def all_ranks(self) -> tuple[int, ...]:
        """All ranks that an adapter may have, ascending."""
        if self.modules is not None:
            return tuple(sorted({module.rank for module in self.modules}))  # of none where there is no adapter
        return tuple(sorted({self.rank, *(self.ranks or {}).values()}))

    def all_alphas(self) -> tuple[float, ...]:
        """All alphas that an adapter may have, ascending, as they are set."""
        if self.modules is not None:
            return tuple(sorted({module.alpha for module in self.modules}))
        return tuple(sorted({self.alpha, *(self.alphas or {}).values()}))

    def all_scales(self) -> tuple[float, ...]:
        """All that B A is multiplied by, ascending; after ``lora.patterns.with_patterns``."""
        own = {self.alpha / self.rank} if self.modules is None else {module.scale for module in self.modules}
        return tuple(sorted(own))


def _layers_named(layers: str | list[int]) -> Sequence[int]:
    """The layers of a range or a list, ascending; no list of a range, which may be of any length."""
    if isinstance(layers, list):
        return sorted(layers)
    first, last = (int(end) for end in layers.split("-"))
    return range(first, last + 1)


def _no_such_layers(found: str, num_layers: int) -> str:
    return f"lora.layers: found {found}, expected 0-{num_layers - 1} (the model has {count(num_layers, 'layer')})"


_PYTHON_PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
OwnPath = Annotated[str, Field(pattern=_PYTHON_PATH)]
"""The Python path of a user's own function or class (``own_code.py``)."""


class GuardCategory(Section):
    """A kind of content that a Guard is to find unsafe."""

    name: Text = Field(description="Its name, one line, as prompts have it after the code: S1: NAME.")
    description: str = Field(default="", description="What belongs to it, under its name in every prompt.")


def _check_categories(categories: Any) -> Any:
    """A Guard's categories with tidy names; a name alone is a category without a description."""
    if categories is None:
        return None
    listed = [GuardCategory(name=found) if isinstance(found, str) else found for found in categories]
    tidy = [GuardCategory(name=tidy_name(found.name), description=found.description.strip()) for found in listed]
    fault = fault_of([Category(found.name, found.description) for found in tidy])
    if fault:
        raise ValueError(fault)
    return tidy


OWN_TEMPLATES = ("llama3", "llama3.1", "llama3.2", "chatml")
"""What ``data.chat_template`` may name: templates of our own (see ``data.template.BUNDLED``)."""

FormatName = Literal["auto", "messages", "alpaca", "prompt-completion", "text", "tokens", "guard"]


class TrainSet(Section):
    """One of several training sets, with what is set for it alone."""

    path: Text = Field(description="A file, a folder of save_to_disk, or a hub id.")
    weight: float | None = Field(
        default=None,
        ge=0,
        description="Its share of the samples (see data.mix), relative to the other sets' weights; 0 leaves it out.",
    )
    format: FormatName | None = Field(default=None, description="Format of its samples; null is data.format.")
    columns: dict[Text, Text] | None = Field(
        default=None, description="Names of its columns; null is data.columns, {} none."
    )


def _check_set(value: Any) -> Any:
    """Refuse a mapping that is no training set, with all of its faults in one sentence each."""
    if not isinstance(value, dict):
        return value
    faults = []
    for key in value:
        if key not in TrainSet.model_fields:
            near = nearest(str(key), TrainSet.model_fields)
            faults.append(
                f"{key}: no such setting of a set ({f'nearest: {near}' if near else 'path, weight, format, columns'})"
            )
    path, weight, fmt = value.get("path"), value.get("weight"), value.get("format")
    if not isinstance(path, str) or not path.strip() or INVALID_TEXT.search(path):
        faults.append(f"path is {path!r}; expected a file, a folder or a hub id")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight < math.inf):
        faults.append(f"weight is {weight!r}; expected a number of at least 0, like 0.7")
    if fmt == "guard":
        faults.append("format is guard, which holds for all sets: set data.format: guard")
    elif fmt is not None and fmt not in get_args(FormatName):
        faults.append(f"format is {fmt!r}; expected one of {', '.join(get_args(FormatName))}")
    if value.get("columns") != {} and (problem := _fault_of_columns(value.get("columns"))):
        faults.append(problem)
    if faults:
        raise ValueError("; ".join(faults))
    return value


def _fault_of_columns(columns: Any) -> str:
    """What is wrong with a mapping of columns; "" if nothing is."""
    is_right = (
        isinstance(columns, dict)
        and columns
        and all(isinstance(name, str) and name.strip() for pair in columns.items() for name in pair)
    )
    if columns is None or is_right:
        return ""
    return f"columns is {columns!r}; expected our names with yours, like {{prompt: question, completion: answer}}"


def _check_columns(columns: Any) -> Any:
    if problem := _fault_of_columns(columns):
        raise ValueError(problem.removeprefix("columns is "))
    return columns


def _check_sets(train: Any) -> Any:
    """Refuse an empty list, a path that is named twice, and weights that make no shares."""
    if not isinstance(train, list):
        return train
    sets = [TrainSet(path=entry) if isinstance(entry, str) else entry for entry in train]
    _check_some([entry.path for entry in sets])
    without = [entry.path for entry in sets if entry.weight is None]
    if without and len(without) < len(sets):
        raise ValueError(
            f"{', '.join(without)}: without a weight, and other sets have one; give each a weight, or none"
        )
    if not without and not any(entry.weight for entry in sets):
        raise ValueError("all weights are 0, expected at least one above 0")
    return train


class DataSection(Section):
    """Training data and held-out data."""

    train: Annotated[
        Text | list[Annotated[Text | TrainSet, BeforeValidator(_check_set)]],
        AfterValidator(_check_sets),
        Expected("a path, a list of paths, or a list of sets like {path: a.jsonl, weight: 0.7, format: text}"),
    ] = Field(
        description="Training data: a file (jsonl, json, csv, parquet, arrow), a folder of save_to_disk, a hub id, or a list "
        "of them, or of sets like {path: a.jsonl, weight: 0.7, format: text, columns: {text: story}}."
    )
    mix: Literal["samples", "target_tokens"] = Field(
        default="samples",
        description="What the weights of data.train are shares of: the samples, or the tokens that are trained on.",
    )
    eval: Annotated[
        Text | Fraction | dict[str, Text] | None,
        AfterValidator(_check_set_names),
        Expected("a path, a fraction between 0 and 1, named sets like {gsm8k: FILE}, or null"),
    ] = Field(
        default=None,
        description="Held-out data: a file, a hub id, the fraction of train to hold out, like 0.05, or several sets by name.",
    )
    format: FormatName | Annotated[OwnPath, Expected("a function of your own, like my_pkg.my_mod:my_format")] = Field(
        default="auto",
        description="Format of the samples: auto detects it by their columns; guard is conversations with a verdict; or a function of your own, MODULE:FUNCTION.",
    )
    columns: Annotated[
        dict[Text, Text] | None,
        BeforeValidator(_check_columns),
        Expected("our names of columns with yours, like {prompt: question, completion: answer}, or null"),
    ] = Field(
        default=None,
        description="Names of the data's columns by those of the format, like {prompt: question, completion: answer}.",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="Tokens to train on: all assistant turns, only the last one, or everything.",
    )
    on_no_target: Literal["error", "drop"] = Field(
        default="error", description="What to do with a sample that has no tokens to train on."
    )
    on_too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="What to do with a sample longer than train.sequence_length."
    )
    chat_template: Text | None = Field(
        default=None,
        description="llama3, llama3.1, llama3.2, chatml, a Jinja file, or a template's text; null is the tokenizer's own.",
    )
    untrained_tokens: Literal["error", "allow"] = Field(
        default="error",
        description="What to do if the data contains special tokens that the base was never trained on.",
    )
    cache_dir: Annotated[Path, Field(strict=False), AfterValidator(_expandable)] | None = Field(
        default=None, description="Folder for the tokenized data; null is the user's cache."
    )
    guard_version: Literal["auto"] | GuardVersion = Field(
        default="auto",
        description="Format guard: the prompt of Llama Guard 3 8B or 1B; auto is 1b for a model of 1B's width, else 8b.",
    )
    guard_categories: Annotated[
        list[Text | GuardCategory] | None,
        AfterValidator(_check_categories),
        Expected("a list of categories like {name: Privacy, description: what belongs to it}, or null"),
    ] = Field(
        default=None,
        description="Format guard: categories of your own, names or {name, description}; null is Llama Guard 3's.",
    )
    guard_augment: Annotated[list[Augmentation], AfterValidator(_refuse_twice)] = Field(
        default=["shuffle", "drop"],
        description="Format guard, training only: shuffle the categories; repeat samples with some dropped; drop violated ones too.",
    )

    def categories(self) -> tuple[Category, ...] | None:
        """A Guard's categories of one's own; None for Llama Guard 3's."""
        if self.guard_categories is None:
            return None
        listed = [(one, "") if isinstance(one, str) else (one.name, one.description) for one in self.guard_categories]
        return tuple(Category(name, description) for name, description in listed)

    @model_validator(mode="after")
    def _check_guard(self) -> DataSection:
        faults: list[tuple[tuple[str, ...], str]] = []
        if self.format == "guard" and self.train_on == "all":
            faults.append(
                (("train_on", "format"), "found all, and format guard trains on the verdict alone: leave train_on out")
            )
        if self.format == "guard" and self.chat_template is not None:
            faults.append(
                (("chat_template", "format"), "format guard writes Llama Guard's own prompt: leave chat_template out")
            )
        for name in ("guard_version", "guard_categories", "guard_augment"):
            if self.format != "guard" and getattr(self, name) != type(self).model_fields[name].default:
                faults.append(((name, "format"), "is for format guard only; set data.format: guard, or leave it out"))
        if faults:
            raise SettingFaults(faults)
        return self

    def eval_files(self) -> dict[str, str]:
        """The held-out sets that are read from a source of their own, by name; a single one's name is empty."""
        if isinstance(self.eval, dict):
            return self.eval
        return {"": self.eval} if isinstance(self.eval, str) else {}

    @model_validator(mode="after")
    def _check_mix(self) -> DataSection:
        if self.mix != "samples" and not any(entry.weight for entry in self.train_sets()):
            message = "has no effect, since no set of data.train has a weight; give each one, or remove it"
            raise SettingFaults([(("mix", "train"), message)])
        return self

    def shares(self) -> dict[str, float]:
        """The share of each set of ``train``, by its path, 0 to 1; none if the sets have no weights."""
        sets = [entry for entry in self.train if isinstance(entry, TrainSet)] if isinstance(self.train, list) else []
        total = sum(entry.weight or 0.0 for entry in sets)
        return {entry.path: (entry.weight or 0.0) / total for entry in sets} if total else {}

    def train_sets(self) -> tuple[TrainSet, ...]:
        """The sets of ``train``, each with the format and the columns that apply to it; none of weight 0."""
        entries = self.train if isinstance(self.train, list) else [self.train]
        sets = [TrainSet(path=entry) if isinstance(entry, str) else entry for entry in entries]
        return tuple(
            entry.model_copy(
                update={
                    "format": entry.format or self.format,
                    "columns": self.columns if entry.columns is None else entry.columns,
                }
            )
            for entry in sets
            if entry.weight != 0
        )


class UnfreezeSection(Section):
    """Weights of the base that are trained themselves, in fp32."""

    last_layers: int = Field(default=0, ge=0, description="All linears and norms of so many layers, the last ones.")
    norms: bool = Field(default=False, description="The norms of all layers, and the last one.")
    patterns: Annotated[list[Text], AfterValidator(_refuse_twice)] = Field(
        default=[],
        description="Linears and norms by regular expressions for the end of their names: [down_proj, 'layers.3[01].*norm'].",
    )


class TrainSection(Section):
    """Length of the run and sizes of its batches."""

    steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps to train; give steps or epochs (neither: one epoch)."
    )
    epochs: float | None = Field(default=None, gt=0, description="Passes over the data; give steps or epochs.")
    global_batch: int = Field(
        default=16,
        ge=1,
        description="Sequences per step, over all GPUs; the number of accumulation steps follows from it.",
    )
    micro_batch: int = Field(default=2, ge=1, description="Sequences per GPU in one forward and backward pass.")
    sequence_length: int = Field(default=2048, ge=2, description="Maximum length of a sequence, in tokens.")
    packing: bool = Field(
        default=True, description="Pack several samples into each sequence; they don't attend to each other."
    )
    activation_checkpointing: Annotated[
        Literal["auto", "none", "all"] | bool | Annotated[int, Field(ge=0)], AfterValidator(_layers_in_words)
    ] = Field(
        default="auto",
        description="Layers that recompute their activations in the backward pass: less memory, more time. auto takes as few as fit.",
    )
    fused_kernels: Literal["auto", "none"] = Field(
        default="auto",
        description="On GPUs, compute norms, RoPE, SwiGLU and the loss by our Triton kernels, in few passes over memory; none takes torch's.",
    )
    unfreeze: UnfreezeSection | None = Field(
        default=None,
        description="Weights of the base that are trained beside the adapters, or (lora: null) instead: partial freezing.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapters, dropout and the order of the samples.")
    callbacks: Annotated[
        list[OwnPath],
        AfterValidator(_refuse_twice),
        Expected("a list of classes of your own, like [my_pkg.my_mod:MyCallback]"),
    ] = Field(default=[], description="Classes of your own, MODULE:CLASS, whose hooks the first rank calls.")
    deterministic: bool = Field(
        default=False,
        description="On GPUs, use kernels that give the same bytes each time, as CPUs do anyway: slower, mostly in attention.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_by_default(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("steps") is None and settings.get("epochs") is None:
            return {**settings, "epochs": 1.0}
        return settings

    @model_validator(mode="after")
    def _check_conflicts(self) -> TrainSection:
        faults: list[tuple[tuple[str, ...], str]] = []
        if self.steps is not None and self.epochs is not None:
            faults.append(
                (
                    ("epochs", "steps"),
                    f"found epochs {self.epochs:g} and steps {self.steps}, expected one of the two; "
                    "remove one (or set it to null)",
                )
            )
        if self.unfreeze is not None and self.unfreeze == UnfreezeSection():
            faults.append((("unfreeze",), "unfreezes nothing; set last_layers, norms or patterns, or leave it out"))
        if self.micro_batch > self.global_batch:
            faults.append(
                (
                    ("micro_batch", "global_batch"),
                    f"found {self.micro_batch} sequences per micro-batch, more than the {self.global_batch} of a step "
                    f"(train.global_batch); set train.micro_batch to {self.global_batch} or less",
                )
            )
        if faults:
            raise SettingFaults(faults)
        return self


class OptimSection(Section):
    """AdamW and its learning rate."""

    lr: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default=2e-4, description="Peak learning rate; auto takes Tinker's for a Llama of this width (lora.alpha: 32)."
    )
    lr_ratio: float = Field(
        default=1.0,
        gt=0,
        description="Learning rate of the B matrices over that of the A matrices, which is lr (LoRA+).",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate decays after the warm-up."
    )
    warmup_steps: int = Field(default=10, ge=0, description="Steps in which the learning rate rises from 0 to lr.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on the adapters.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are clipped to this global norm; null disables clipping."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay rate of the gradient's mean.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay rate of the squared gradient's mean.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon, which keeps the division finite.")

    @property
    def peak_lr(self) -> float:
        """``lr`` as a number: ``layout.choices.with_lr`` has resolved ``auto`` before anything is trained."""
        assert self.lr != "auto", "optim.lr: auto was not resolved"
        return self.lr


class ParallelSection(Section):
    """How the run is distributed over GPUs."""

    engine: Literal["auto", "fsdp2", "zero3", "none"] = Field(
        default="auto", description="What shards the model: auto is none on one GPU and fsdp2 on more."
    )
    base_shard: Literal["auto", "gpu", "node", "world"] = Field(
        default="auto",
        description="Keep the whole base on each GPU (gpu), shard it over the GPUs of each node (node: replicated on every "
        "node), or over all GPUs (world); auto keeps it whole where it fits, so that only the adapters' gradients are sent.",
    )
    adapters: Literal["auto", "replicate", "shard"] = Field(
        default="auto",
        description="Replicate the adapters on every GPU, or shard them over the GPUs of each node; auto decides by size.",
    )
    offload: Literal["none", "base", "optimizer", "all"] = Field(
        default="none",
        description="What is offloaded to host memory: the base (its layers, in one process), AdamW's state, or both.",
    )
    join_timeout: float = Field(
        default=300.0, gt=0, description="Seconds within which all processes of the run must have joined."
    )
    hang_timeout: float = Field(default=600.0, gt=0, description="Seconds without progress after which the run ends.")
    node_size: int | None = Field(
        default=None, ge=1, description="GPUs per node; null asks the launcher (torchrun, Slurm, deepspeed)."
    )


class MachineSection(Section):
    """The machines the run is meant for: used by plan, slurm, explain and doctor; train runs wherever it is started."""

    gpu: str | None = Field(default=None, description="Type of GPU: h100-80gb, rtx4090, or its name in nvidia-smi.")
    gpus_per_node: int | None = Field(default=None, ge=1, description="GPUs per node.")
    nodes: int | None = Field(default=None, ge=1, description="Number of nodes.")
    price_per_gpu_hour: float | None = Field(
        default=None,
        gt=0,
        description="Price of one GPU hour, in any currency; with it the plan estimates the cost of the run.",
    )


class CheckpointSection(Section):
    """What is saved to resume after an interruption."""

    every: int = Field(default=50, ge=1, description="Steps between two checkpoints.")
    keep: int = Field(default=2, ge=1, description="Newest checkpoints to keep; older ones are deleted.")
    keep_best: bool = Field(default=False, description="Keep the checkpoint with the lowest held-out loss too.")
    resume: Literal["auto", "never"] | FilePath = Field(
        default="auto",
        description="auto resumes from the run's newest complete checkpoint; never; or a checkpoint's folder.",
    )
    save_at_start: bool = Field(
        default=True, description="Save once before the first step, so that a full disk shows at once."
    )

    @field_serializer("resume")
    def _resume_as_text(self, resume: str | Path) -> str:
        # A folder named "auto" must not be read back as the keyword.
        return f"./{resume}" if isinstance(resume, Path) and str(resume) in ("auto", "never") else str(resume)


class LogSection(Section):
    """What is logged during the run."""

    trackers: Annotated[list[TrackerName], AfterValidator(_refuse_twice)] = Field(
        default=["tensorboard"],
        description="Experiment trackers, in addition to metrics.jsonl: tensorboard, wandb, mlflow, ...; [] for none.",
    )
    tracker_options: Annotated[
        dict[str, dict[str, Any]],
        AfterValidator(_check_tracker_options),
        Expected("options by tracker, like {wandb: {project: llama, entity: my-team, group: a, tags: [b]}}"),
    ] = Field(
        default_factory=dict,
        description="What trackers are started with, by their names: for wandb project, entity, group, tags, ...",
    )
    every: int = Field(default=1, ge=1, description="Steps between two log lines.")

    @model_validator(mode="after")
    def _check_used(self) -> LogSection:
        unused = [name for name in self.tracker_options if name not in self.trackers]
        if unused:
            listed = ", ".join([*self.trackers, *unused])
            raise SettingFaults(
                [
                    (
                        ("tracker_options", "trackers"),
                        f"has options of {', '.join(unused)}, which log.trackers doesn't name; set log.trackers to "
                        f"[{listed}], or remove them",
                    )
                ]
            )
        return self


class EvalSection(Section):
    """How the held-out data is evaluated."""

    every: int = Field(default=50, ge=1, description="Steps between two evaluations of data.eval.")
    at_start: bool = Field(default=False, description="Evaluate before the first step too.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="End the run after this many evaluations in a row without a lower held-out loss; null trains all steps.",
    )
    best_set: Text | None = Field(
        default=None,
        description="The set of data.eval whose loss decides what is best; null is the loss over all sets' target tokens.",
    )
    exact_match: bool = Field(default=False, description="Also generate answers and count exact matches.")
    tool_calls: bool = Field(
        default=False,
        description="Also generate answers and count their tool calls: valid, right name, right arguments.",
    )
    answer: Annotated[Text, AfterValidator(_check_answer)] | None = Field(
        default=None,
        description="Regular expression whose last match is the answer to compare in a text: its first group, or all of it.",
    )
    metrics: Annotated[
        list[OwnPath],
        AfterValidator(_check_metrics),
        Expected("a list of functions of your own, like [my_pkg.my_mod:my_metric]"),
    ] = Field(
        default=[],
        description="Functions of your own, MODULE:FUNCTION, that judge generated answers; their means are reported.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Maximum length of a generated answer, in tokens.")
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Sequences per GPU in one evaluation batch; null is train.micro_batch, and 32 for generated answers.",
    )
    command: Annotated[Text, AfterValidator(_check_command)] | None = Field(
        default=None,
        description="Program to run at each evaluation on the gathered adapter; it prints numbers as JSON (docs/evaluate.md).",
    )
    command_timeout: float = Field(default=3600.0, gt=0, description="Seconds after which eval.command is killed.")

    @model_validator(mode="after")
    def _check_used(self) -> EvalSection:
        if self.answer is not None and not self.exact_match:
            fault = "has no effect without eval.exact_match: set eval.exact_match to true, or remove it"
            raise SettingFaults([(("answer", "exact_match"), fault)])
        return self


def _no_adapters(lora: Any) -> Any:
    """``lora: null`` is a section of no adapter."""
    return {"modules": []} if lora is None else lora


class Config(Section):
    """The settings of a run; run, model.name and data.train are required, the rest has defaults."""

    run: Annotated[str, AfterValidator(_check_run)] = Field(
        description="Name of the run and of its folder; a run of the same name resumes."
    )
    runs_dir: FilePath = Field(default=Path("runs"), description="Parent folder of all run folders.")
    model: ModelSection = Field(description="The frozen base model.")
    lora: Annotated[LoraSection, BeforeValidator(_no_adapters)] = Field(
        default_factory=LoraSection, description="The adapters that are trained; null for none (see train.unfreeze)."
    )
    data: DataSection = Field(description="Training data and held-out data.")
    train: TrainSection = Field(default_factory=TrainSection, description="Length of the run and sizes of its batches.")
    optim: OptimSection = Field(default_factory=OptimSection, description="AdamW and its learning rate.")
    parallel: ParallelSection = Field(
        default_factory=ParallelSection, description="How the run is distributed over GPUs."
    )
    machine: MachineSection = Field(
        default_factory=MachineSection, description="The machines the run is meant for; train doesn't need them."
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection,
        description="What is saved to resume after an interruption.",
    )
    log: LogSection = Field(default_factory=LogSection, description="What is logged during the run.")
    eval: EvalSection = Field(default_factory=EvalSection, description="How the held-out data is evaluated.")

    @model_validator(mode="after")
    def _check_conflicts(self) -> Config:
        faults: list[tuple[tuple[str, ...], str]] = []
        sets = list(self.data.eval) if isinstance(self.data.eval, dict) else []
        if self.eval.patience is not None and self.data.eval is None:
            faults.append(
                (("eval.patience",), "counts evaluations of data.eval, which isn't set: set it, or remove this")
            )
        if self.eval.best_set is not None and self.eval.best_set not in sets:
            named = f"data.eval has {', '.join(sets)}" if sets else "data.eval has no named sets"
            faults.append((("eval.best_set",), f"found {self.eval.best_set!r}, and {named}"))
        is_none = not self.lora.has_adapters and not self.lora.train_tokens and not self.lora.start_from
        if is_none and self.train.unfreeze is None:
            faults.append(
                (
                    ("lora", "train.unfreeze"),
                    "there is no adapter (lora is null), and train.unfreeze unfreezes nothing: nothing is trained",
                )
            )
        if faults:
            raise SettingFaults(faults)
        return self
