"""Builds everything that the training loop needs from a config."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.base.checksum import check_untouched, checksums
from dist_lora.base.flash import activate_flash
from dist_lora.base.hub import fetch_model
from dist_lora.base.index import WeightIndex, open_index
from dist_lora.base.kernels.support import why_not
from dist_lora.base.llama import Llama, build_on_meta
from dist_lora.base.norms import Squares, norm_of
from dist_lora.base.quant.formats import format_of
from dist_lora.base.quant.published import BaseOnDisk, open_base_on_disk
from dist_lora.base.rope import check_frequencies
from dist_lora.base.stored_shape import (
    dtype_remarks,
    has_own_head,
    refuse_unquantized,
    stored_base,
    stored_remarks,
    unquantized_line,
)
from dist_lora.base.stream import FillReport, fill_slots
from dist_lora.config.schema import Config
from dist_lora.data.chat import load_tokenizer
from dist_lora.data.loader import MicroBatch
from dist_lora.engines.adapters import Adapters
from dist_lora.engines.choose import make_engine
from dist_lora.engines.engine import Engine
from dist_lora.engines.precision import TORCH_TYPES, Precision
from dist_lora.errors import ConfigError, DistLoraError, WeightsError
from dist_lora.herd.config_keys import remarks_on
from dist_lora.herd.models import ResolvedModel, refuse_shape, resolve_model
from dist_lora.herd.shape import Shape, read_config
from dist_lora.herd.unfrozen import unfrozen_weights
from dist_lora.layout.choices import (
    AttentionName,
    Choices,
    check_section,
    choose_attention,
    choose_dtype,
)
from dist_lora.layout.memory import setup_of
from dist_lora.lora.adapter_reader import open_adapter, read_adapter
from dist_lora.lora.attach import TrainedTensor, attach_adapters, unfreeze
from dist_lora.lora.fit import check_fit, with_settings_of
from dist_lora.lora.origin import BaseIdentity, identify_base, origin_of
from dist_lora.lora.tokens import HEAD_ROWS, with_token_ids
from dist_lora.pace import pace
from dist_lora.text import size
from dist_lora.world.world import World, computes_bf16, device_bytes

log = logging.getLogger("dist_lora")


class ModelFiles(Protocol):
    """What of a base the tokens depend on."""

    @property
    def folder(self) -> Path:
        """Where its files are."""
        ...

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template of the run."""
        ...


@dataclass(frozen=True)
class Base:
    """The base on disk: none of its weights are read yet. ``settings`` are those of its config.json."""

    folder: Path
    settings: Mapping[str, Any]
    shape: Shape
    on_disk: BaseOnDisk
    tokenizer: Any
    identity: BaseIdentity


@dataclass(frozen=True)
class Trainee:
    """This rank's shard of a base, its adapters, and the engine that runs both."""

    base: Base
    model: Llama
    engine: Engine
    adapters: Adapters
    attention: AttentionName
    precision: Precision
    checksums: dict[str, int]  # of this rank's shard of the base, as it was loaded
    # Of the adapted weights, on the first rank of a run.
    weight_norms: Mapping[str, float] = field(default_factory=dict)

    def run(self, batch: MicroBatch) -> Tensor:
        """Sum of the cross entropies of a micro-batch's targets, an fp32 scalar with its autograd graph.

        A micro-batch that isn't on the device yet is copied there (see ``data.prefetch``).
        """
        batch = batch.to(self.engine.world.device)
        loss: Tensor = self.engine.forward_of(self.model)(
            batch.ids,
            positions=batch.positions,
            attention=Documents(batch.bounds, self.attention, batch.starts),
            rows=batch.target_index,
            labels=batch.labels,
        )
        return loss

    def check_base(self) -> None:
        """Check that this rank's shard of the base is unchanged since it was loaded, in value and dtype.

        Raises:
            WeightsError: it isn't; names the tensors.
        """
        self.precision.check(self.model, self.adapters)
        check_untouched(self.checksums, checksums(self.engine.frozen_shards(self.model)))


def open_base(config: Config, world: World, *, template: str | None = None, index: WeightIndex | None = None) -> Base:
    """Find the base and check everything about it that can be checked without reading weights. All ranks call it.

    Args:
        template: the text of a chat template that replaces the tokenizer's, as an adapter's run recorded it.
        index: the folder's, with bytes allowed, where the headers have been read already.

    Raises:
        ConfigError: an engine that can't run here; no such model, or only its sizes; a layer that the model lacks; a
            tokenizer without what the data needs.
        WeightsError: a file is missing or damaged.
    """
    world.progress.now("opening the base", kind="long")
    stage = f"opening {config.model.name}"

    def resolve() -> ResolvedModel:
        check_section(config.parallel, world_size=world.world_size, local_size=world.local_size)
        refuse_shape(config.model)
        is_on_gpu = world.device.type == "cuda"
        dtype, _ = choose_dtype(config.model.dtype, on_gpu=is_on_gpu, has_bf16=computes_bf16(world.device))
        choose_attention(config.model.attention, dtype=dtype, on_gpu=is_on_gpu)
        return resolve_model(config.model.name)

    def read_sizes() -> tuple[dict[str, Any], Shape]:
        # Before the weights: a model that isn't supported is no damaged one.
        settings = read_config(folder)
        shape = Shape.from_config(settings, where=str(folder / "config.json"))
        config.lora.layer_indices(shape.num_layers)
        return settings, shape

    def compare_head() -> bytes:
        return b"own" if shape.tied and has_own_head(WeightIndex.from_json(folder, headers)) else b""

    def open_files() -> tuple[Shape, BaseOnDisk, Any]:
        on_disk = open_base_on_disk(folder, quant=config.model.quant, index=WeightIndex.from_json(folder, headers))
        refuse_unquantized(settings, on_disk)
        stored, on_disk = stored_base(shape, on_disk, own_head=bool(own_head))
        on_disk.index.expect(stored.tensor_shapes())
        try:
            return stored, on_disk, load_tokenizer(folder, chat_template=config.data.chat_template, text=template)
        except DistLoraError:  # some are ValueErrors as well
            raise
        except ValueError as caught:
            raise WeightsError(f"{config.model.name}: can't be opened: {caught}") from caught

    def os_error(caught: OSError) -> WeightsError:
        return WeightsError(f"{config.model.name}: can't be opened: {caught}")

    resolved = world.agree_on(stage, resolve, os_error=os_error)
    folder = folder_of(resolved, world)
    settings, shape = world.agree_on(stage, read_sizes, os_error=os_error)
    # One rank per node reads the files' headers, and shares them with the others.
    headers = world.once_per_node(
        stage, lambda: (index or open_index(folder, allow_bytes=True)).to_json(), os_error=os_error
    )
    own_head = world.once_per_node(stage, compare_head, os_error=os_error)
    stored, on_disk, tokenizer = world.agree_on(stage, open_files, os_error=os_error)
    if world.is_first:
        for remark in (*remarks_on(settings), *stored_remarks(settings, shape, stored, on_disk)):
            log.warning(f"{folder / 'config.json'}: {remark}")
        if stored.unquantized:
            log.info(f"{folder}: {unquantized_line(stored)}")
    return Base(folder, settings, stored, on_disk, tokenizer, _identity(resolved, folder, world, os_error))


def with_ids(config: Config, base: Base, world: World) -> Config:
    """The config with ``lora.train_tokens`` as ids of the base's tokenizer. All ranks call it, before ``check_adapter``.

    Raises:
        ConfigError: see ``with_token_ids``.
    """
    section = world.agree_on(
        "lora.train_tokens",
        lambda: with_token_ids(config.lora, tokenizer=base.tokenizer, vocab=base.shape.vocab),
    )
    return config.model_copy(update={"lora": section})


def _identity(
    resolved: ResolvedModel, folder: Path, world: World, os_error: Callable[[OSError], DistLoraError]
) -> BaseIdentity:
    """What the adapter will record of its base: computed by one rank per node, since it reads a part of each tensor.

    Raises:
        ConfigError: a node has a different base than the first.
    """
    revision = folder.name if resolved.folder is None else None  # the hub's cache names a snapshot by its commit

    def identify() -> bytes:
        return json.dumps(dataclasses.asdict(identify_base(folder, name=resolved.hub_id, revision=revision))).encode()

    stage = "the base on every node"
    here = BaseIdentity(**json.loads(world.once_per_node(stage, identify, os_error=os_error)))
    first = BaseIdentity(**json.loads(world.once(stage, lambda: json.dumps(dataclasses.asdict(here)).encode())))

    def compare() -> None:
        differences = first.differences(here)
        if differences and world.local_rank == 0:
            raise ConfigError(
                f"model.name: {folder} on {socket.gethostname()} (rank {world.world_rank}) differs from rank 0's base: "
                f"{'; '.join(differences)}. Give every node the same files."
            )

    world.agree_on(stage, compare)
    return first


def folder_of(resolved: ResolvedModel, world: World) -> Path:
    """Where the model's files are: its own folder, or the hub's copy, fetched once per node. All ranks call it.

    A name may be a folder on one node and a hub id on another: both take the same steps together.
    """

    def find() -> bytes:
        if resolved.folder is not None:
            return os.fsencode(resolved.folder)
        assert resolved.hub_id is not None
        with world.progress.phase(f"fetching {resolved.hub_id}", kind="unseen"):
            return os.fsencode(fetch_model(resolved.hub_id))

    return Path(os.fsdecode(world.once_per_node("finding the base's folder", find)))


@dataclass(frozen=True)
class ShardedModel:
    """A sharded model, still without memory, with its adapters; ``description`` is a line about its sharding."""

    model: Llama
    tensors: list[TrainedTensor]
    engine: Engine
    precision: Precision
    choices: Choices
    description: str


def shard_model(
    config: Config,
    shape: Shape,
    world: World,
    *,
    name: str | None,
    memory_bytes: int | None = None,
    on_gpu: bool | None = None,
    has_bf16: bool | None = None,
) -> ShardedModel:
    """The model of a config on the meta device, with adapters, sharded by its engine. All ranks call it.

    Args:
        name: the model's, for errors.
        memory_bytes: of each rank's device; None queries it.
        on_gpu: whether the choices are those of a run on GPUs; None takes the world's device.
        has_bf16: whether those GPUs compute in bf16; None asks all ranks' devices.

    Raises:
        ConfigError: a GPU has no bf16, as set; the settings of ``parallel`` contradict each other, or the shapes can't be quantized.
    """
    choices = setup_of(
        config,
        shape,
        name=name,
        num_nodes=world.world_size // world.local_size,
        gpus_per_node=world.local_size,
        device_bytes=memory_bytes or world.min("layout/device_bytes", device_bytes(world)),
        on_gpu=world.device.type == "cuda" if on_gpu is None else on_gpu,
        has_bf16=bool(world.min("layout/has_bf16", int(computes_bf16(world.device)))) if has_bf16 is None else has_bf16,
    ).choices
    if world.is_first:
        for reason in choices.reasons:
            log.info(reason)
    dtype = TORCH_TYPES[choices.dtype]
    fmt = format_of(config.model.quant, dtype)
    model = build_on_meta(shape, dtype=dtype, fmt=fmt)
    tensors = [*attach_adapters(model, config.lora), *unfreeze(model, unfrozen_weights(config, shape))]
    for layer, block in enumerate(model.blocks()):
        block.recompute = layer in choices.recomputed
    if choices.fused_kernels:
        _fuse(model, dtype, world)
    world.progress.now("sharding the base", kind="unseen")  # may compile (DeepSpeed's kernels) and open a GPU
    engine = make_engine(choices.layout, world)
    precision = Precision(fmt, dtype, shape.unquantized if fmt.name != "none" else frozenset())
    return ShardedModel(model, tensors, engine, precision, choices, engine.shard(model))


def _fuse(model: Llama, dtype: torch.dtype, world: World) -> None:
    """Have the model use our kernels, or say why this GPU can't. Ranks needn't agree: the numbers are the same to rounding."""
    reason = why_not(world.device, dtype) if world.device.type == "cuda" else None  # a simulated GPU can
    if reason is None:
        model.fuse_elementwise()
    elif world.is_first:
        log.warning(f"kernels   plain instead of fused: {reason}. The run is the same, and slower")


def build(config: Config, base: Base, world: World, *, has_norms: bool = False) -> Trainee:
    """This rank's shard of the model, loaded, with fresh adapters (or those of ``lora.start_from``). All ranks call it.

    Args:
        has_norms: sum the norms of the adapted weights while they are read.

    Raises:
        ConfigError: the settings of ``parallel`` contradict each other, or the base's shapes can't be quantized.
        WeightsError: a file of the base is damaged.
    """
    sharded = shard_model(config, base.shape, world, name=base.identity.name)
    model, engine = sharded.model, sharded.engine
    if world.is_first:
        for remark in dtype_remarks(base.settings, base.on_disk, dtype=sharded.choices.dtype):
            log.info(f"{base.folder}: {remark}")
    if sharded.choices.attention == "varlen":
        kernels = activate_flash(torch.cuda.get_device_capability(world.device)[0])
        if world.is_first:
            log.info(kernels)
    engine.materialize(model)
    adapted = (
        {f"{name}.weight": None for name, linear in model.linears().items() if linear.adapter} if has_norms else {}
    )
    report = _load(base, model, engine, world, sharded.description, norms_of=adapted)
    weight_norms = _weight_norms(report, base, world)
    check_frequencies(model.inv_freq, base.shape)
    world.progress.now("sharding the adapters", kind="unseen")
    adapters = engine.adapters(sharded.tensors, has_two_rates=config.optim.lr_ratio != 1.0)
    world.agree_on("the first values", lambda: adapters.initialize(config.train.seed, base.on_disk.index))
    if config.lora.start_from is not None:
        load_adapter(adapters, config.lora.start_from, world=world)
    trainee = Trainee(
        base,
        model,
        engine,
        adapters,
        sharded.choices.attention,
        sharded.precision,
        checksums(engine.frozen_shards(model)),
        weight_norms,
    )
    trainee.precision.check(model, adapters)
    return trainee


def _load(
    base: Base, model: Llama, engine: Engine, world: World, description: str, *, norms_of: Collection[str]
) -> FillReport:
    world.progress.now("loading the base", kind="long")
    started_s = time.monotonic()
    slots = engine.slots(model)
    with pace("loading the base", unit=size, is_shown=world.is_first) as advance:
        report = world.agree_on(
            "loading the base",
            lambda: fill_slots(
                slots,
                index=base.on_disk.index,
                formats=model.formats(),
                quantized=base.on_disk.nf4,
                device=world.device,
                norms_of=norms_of,
                on_progress=advance,
            ),
            os_error=lambda error: WeightsError(f"{base.folder}: {error}"),
        )
    engine.exchange_rows(model)
    if world.is_first:
        kept = sum(tensor.nbytes for _, tensor in engine.frozen_shards(model))
        log.info(
            f"loaded base: {description}; this rank read {report.bytes_read / 2**20:,.0f} MiB and keeps "
            f"{kept / 2**20:,.0f} MiB, in {time.monotonic() - started_s:.1f} s"
        )
    return report


def _weight_norms(report: FillReport, base: Base, world: World) -> dict[str, float]:
    """The norms that all ranks have summed, by module, on the first; {} on the others. All ranks call it.

    One that isn't finite is left out: the first step stops such a run.
    """
    if not report.squares:  # the same on all ranks
        return {}
    own = [(squares.num_rows, squares.total) for squares in report.squares.values()]
    key = world.fresh_key("loading/squares")
    world.share(f"{key}/{world.world_rank}", json.dumps(own).encode())
    if not world.is_first:
        return {}
    others = (json.loads(world.fetch(f"{key}/{rank}")) for rank in range(1, world.world_size))
    by_weight = zip(*([Squares(*one) for one in of_rank] for of_rank in (own, *others)), strict=True)
    norms = {}
    for name, parts in zip(report.squares, by_weight, strict=True):
        norm = norm_of(parts, num_rows=base.on_disk.index.tensors[name].shape[0])
        if norm is not None:
            norms[name.removesuffix(".weight")] = norm
    return norms


def check_adapter(folder: Path, *, config: Config, base: Base, world: World) -> Config:
    """The config with the settings of ``lora`` that it leaves out as the adapter in ``folder`` has them.

    Checks that the adapter is intact and fits base and config. All ranks call it, before ``build``.

    Every rank checks the headers, the first one all bytes.

    One that was trained on other weights is accepted with a warning: a renamed or quantized copy of the base has other
    hashes too, and whoever names both may know better.

    Raises:
        AdapterError: it is damaged or incomplete.
        ConfigError: it isn't plain LoRA, has other widths or layers than the base, or a setting of ``lora`` contradicts it.
    """

    def check() -> Config:
        adapter = open_adapter(folder)
        check_fit(adapter, config=config, shape=base.shape)
        if world.is_first:
            adapter.verify()
            for pattern in adapter.config.unmatched_patterns(adapter.modules):
                log.warning(f"{folder}: {pattern}: matches none of its linears, and has no effect")
        differences = adapter.base.differences(base.identity)
        if differences and world.is_first:
            log.warning(
                f"{folder} was trained on {adapter.base.name or 'another model'}, and {base.folder} "
                f"({base.identity.name}) differs from it: {'; '.join(differences)}. Its answers may be meaningless here."
            )
        if adapter.tokens and not base.shape.tied and HEAD_ROWS not in adapter.rows and world.is_first:
            log.warning(
                f"{folder} has the rows of its trained tokens for the embedding alone: those of the head are the base's, and "
                "are trained too where it is trained on"
            )
        if world.is_first and (other := origin_of(folder).other_vocabulary(base.folder)):
            log.warning(
                f"{folder} was trained {other}. Its answers may be meaningless here; use its own base's tokenizer."
            )
        return with_settings_of(config, adapter)

    return world.agree_on(f"opening {folder}", check)


def load_adapter(adapters: Adapters, folder: Path, *, world: World) -> None:
    """Load the trained tensors from an adapter folder that ``check_adapter`` accepted. All ranks call it.

    Raises:
        AdapterError: a value is NaN or infinite, or the folder has changed since.
    """
    world.agree_on(f"loading {folder}", lambda: adapters.load(read_adapter(folder).tensors.items()))


def describe_trained(trainee: Trainee) -> dict[str, int]:
    """How many weights are trained and how many are frozen."""
    return {
        "trainable": trainee.adapters.num_elements,
        "frozen": trainee.base.shape.num_parameters() - trainee.adapters.num_unfrozen,
    }
