"""Every setting of a run: its name, type, bounds, default and a one-line description.

This is the only place where a setting is declared. The messages about wrong settings (``config.faults``) and the JSON schema
for editors are generated from it.
"""

from __future__ import annotations

import re
from collections import Counter
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

from dist_lora.errors import ConfigError
from dist_lora.text import nearest

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
            "would have to change the other)"
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


def _check_range(layers: str) -> str:
    first, last = (int(end) for end in layers.split("-"))
    if first > last:
        raise ValueError(f"{layers!r} runs backwards; write {last}-{first}")
    return layers


INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # not allowed in file names, and not encodable in UTF-8


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if INVALID_TEXT.search(text):
        raise ValueError("contains NUL or an unpaired surrogate")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
# A path is written as text; strict mode would require a Path object.
FilePath = Annotated[Path, Field(strict=False)]
Quant = Literal["none", "nf4", "int8"]
QUANTIZED: tuple[Quant, ...] = tuple(quant for quant in get_args(Quant) if quant != "none")
# The trackers that accelerate knows by name.
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
LayerRange = Annotated[
    str,
    Field(pattern=r"^[0-9]+-[0-9]+$"),
    AfterValidator(_check_range),
    Expected("a range of layers like 8-15"),
]
LayerIndex = Annotated[int, Field(ge=0)]
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


class LoraSection(Section):
    """The adapters that are trained on the frozen base."""

    rank: int = Field(default=16, ge=1, description="Rank r of the adapters: A is (r, in), B is (out, r).")
    alpha: float = Field(default=32.0, gt=0, description="The adapters' output is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability of the adapters' inputs.")
    targets: Annotated[
        Literal["all"] | list[Annotated[LinearName, BeforeValidator(_check_target)]],
        AfterValidator(_check_some),
    ] = Field(default="all", description="Linears that get an adapter: all seven, or a list like [q_proj, v_proj].")
    layers: Annotated[Literal["all"] | LayerRange | list[LayerIndex], AfterValidator(_check_some)] = Field(
        default="all",
        description="Layers that get adapters: all, a list like [0, 1], or a range like 8-15 (both ends included).",
    )
    start_from: FilePath | None = Field(
        default=None,
        description="Folder of an adapter to start from (its weights only, not a resume).",
    )

    def target_names(self) -> tuple[LinearName, ...]:
        """The adapted linears in canonical order (q k v o gate up down), not in the file's order."""
        return LINEARS if self.targets == "all" else tuple(name for name in LINEARS if name in self.targets)

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The adapted layers of a model of ``num_layers``, ascending.

        Raises:
            ConfigError: ``lora.layers`` names a layer that the model doesn't have.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        if isinstance(self.layers, str):
            first, last = (int(end) for end in self.layers.split("-"))
            if last >= num_layers:
                raise ConfigError(_no_such_layers(self.layers, num_layers))
            return tuple(range(first, last + 1))
        outside = [index for index in self.layers if index >= num_layers]
        if outside:
            raise ConfigError(_no_such_layers(", ".join(map(str, outside)), num_layers))
        return tuple(sorted(self.layers))


def _no_such_layers(found: str, num_layers: int) -> str:
    return f"lora.layers: found {found}, expected 0-{num_layers - 1} (the model has {num_layers} layers)"


class DataSection(Section):
    """Training data and held-out data."""

    train: Annotated[Text | list[Text], AfterValidator(_check_some)] = Field(
        description="Training data: a file (jsonl, json, csv, parquet, arrow), a folder of save_to_disk, a hub id, or a list."
    )
    eval: Annotated[Text | Fraction | None, Expected("a path, a fraction between 0 and 1, or null")] = Field(
        default=None,
        description="Held-out data: a file, a hub id, or the fraction of train to hold out, like 0.05.",
    )
    format: Literal["auto", "messages", "alpaca", "prompt-completion", "text"] = Field(
        default="auto", description="Format of the samples: auto detects it by their columns."
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
        default=None, description="llama3, chatml, or a Jinja file; null is the tokenizer's own template."
    )
    untrained_tokens: Literal["error", "allow"] = Field(
        default="error",
        description="What to do if the data contains special tokens that the base was never trained on.",
    )
    cache_dir: FilePath | None = Field(
        default=None, description="Folder for the tokenized data; null is the user's cache."
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
    activation_checkpointing: Literal["auto"] | bool = Field(
        default="auto", description="Recompute activations in the backward pass: less memory, more time."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapters, dropout and the order of the samples.")

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

    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
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


class ParallelSection(Section):
    """How the run is distributed over GPUs."""

    engine: Literal["auto", "fsdp2", "zero3", "none"] = Field(
        default="auto", description="What shards the model: auto is none on one GPU and fsdp2 on more."
    )
    base_shard: Literal["auto", "node", "world"] = Field(
        default="auto",
        description="Shard the base over the GPUs of each node (replicated on every node), or over all GPUs.",
    )
    adapters: Literal["auto", "replicate", "shard"] = Field(
        default="auto",
        description="Replicate the adapters on every GPU, or shard them over the GPUs of each node; auto decides by size.",
    )
    offload: Literal["none", "base", "optimizer", "all"] = Field(
        default="none", description="What is offloaded to host memory: the base, AdamW's state, or both."
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

    gpu: str | None = Field(default=None, description="Type of GPU by name and memory, like h100-80gb or rtx4090-24gb.")
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
    every: int = Field(default=1, ge=1, description="Steps between two log lines.")


class EvalSection(Section):
    """How the held-out data is evaluated."""

    every: int = Field(default=50, ge=1, description="Steps between two evaluations of data.eval.")
    exact_match: bool = Field(default=False, description="Also generate answers and count exact matches.")
    max_new_tokens: int = Field(default=64, ge=1, description="Maximum length of a generated answer, in tokens.")
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Sequences per GPU in one evaluation batch; null is train.micro_batch, and 32 for generated answers.",
    )


class Config(Section):
    """The settings of a run; run, model.name and data.train are required, the rest has defaults."""

    run: Annotated[str, AfterValidator(_check_run)] = Field(
        description="Name of the run and of its folder; a run of the same name resumes."
    )
    runs_dir: FilePath = Field(default=Path("runs"), description="Parent folder of all run folders.")
    model: ModelSection = Field(description="The frozen base model.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapters that are trained.")
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
