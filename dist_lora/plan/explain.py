"""What LoRA does to a model: which matrices it adapts, what is trained, and what that saves.

Letters: d_in and d_out are a matrix's width and height, r is LoRA's rank, L a model's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_lora.config.schema import LINEARS, Config, LoraSection
from dist_lora.herd.models import KnownModel, known_model
from dist_lora.herd.unfrozen import describe_unfrozen, unfrozen_weights
from dist_lora.layout.choices import BYTES_PER_TRAINED_WEIGHT, ITEM_BYTES, choose_dtype, choose_lr
from dist_lora.layout.storage import FP32, base_parts
from dist_lora.plan.command import default_gpus_per_node
from dist_lora.plan.hardware import find_gpu
from dist_lora.plan.plan import Machines, make_plan
from dist_lora.text import GIB, count, figure, in_columns, span

# AdamW in 16 bits with fp32 master weights, as usual for full fine-tuning: the weight and its gradient (2 + 2), the master and
# two moments (4 + 4 + 4). With gradients in fp32 too it is 18. Source: ZeRO, arXiv 1910.02054, section 3.1.
BYTES_OF_FULL_TRAINING = 16


@dataclass(frozen=True)
class Way:
    """A way to fine-tune: the number of trained weights, and the bytes it needs besides activations.

    ``state_bytes``: all weights, with gradients and AdamW's state of the trained ones; ``saved_bytes``: the weights that
    differ from the base, as stored for inference.
    """

    name: str
    trained: int
    state_bytes: float
    saved_bytes: int


def ways_of(config: Config, model: KnownModel) -> list[Way]:
    """LoRA as in the config, compared with training all weights or only the last layers."""
    shape, total = model.shape, model.shape.num_parameters()
    adapters = shape.trained_weights(config.lora)
    frozen = total * _bytes_per_frozen_weight(config, model)
    layer = shape.weights_of_a_layer()
    ways = [Way("all weights", total, BYTES_OF_FULL_TRAINING * total, 2 * total)]
    for num_layers in sorted({min(4, shape.num_layers), 1}, reverse=True):
        trained = num_layers * layer
        name = f"the last {num_layers} layers" if num_layers > 1 else "the last layer"
        state = 2 * (total - trained) + BYTES_OF_FULL_TRAINING * trained
        ways.append(Way(name, trained, state, 2 * trained))
    quantized = "" if config.model.quant == "none" else f" on a base in {config.model.quant}"
    if adapters:
        ways.append(Way(f"LoRA{quantized}", adapters, frozen + BYTES_PER_TRAINED_WEIGHT * adapters, FP32 * adapters))
    unfrozen = shape.unfrozen_weights(unfrozen_weights(config, shape))
    if unfrozen:
        trained = adapters + unfrozen
        rest = frozen * (1 - unfrozen / total)
        name = "LoRA and the unfrozen" if adapters else "the unfrozen"
        ways.append(Way(name, trained, rest + BYTES_PER_TRAINED_WEIGHT * trained, FP32 * trained))
    return ways


def _bytes_per_frozen_weight(config: Config, model: KnownModel) -> float:
    item_bytes = ITEM_BYTES[choose_dtype(config.model.dtype, on_gpu=True)[0]]
    parts = base_parts(model.shape, quant=config.model.quant, item_bytes=item_bytes)
    return sum(part.num_bytes for part in parts) / model.shape.num_parameters()


def explain(config: Config) -> str:
    """About ten lines on what LoRA does to the config's model.

    Raises:
        ConfigError: no such model, its sizes are unknown without its weights, or it lacks a layer of ``lora.layers``.
    """
    model = known_model(config.model)
    return "\n".join([*_what_is_trained(config, model), *_costs(config, model), *_on_its_machine(config, model)])


def _on_its_machine(config: Config, model: KnownModel) -> Iterator[str]:
    """The memory needed per GPU, if the config names a machine."""
    if config.machine.gpu is None:
        return
    machines = Machines(
        config.machine.nodes or 1,
        config.machine.gpus_per_node or default_gpus_per_node(config),
        find_gpu(config.machine.gpu, given_by="machine.gpu"),
    )
    plan = make_plan(config, machines, shape=model.shape)
    result = plan.result if plan.fits else "doesn't fit; see `dist-lora plan` for what would"
    yield (
        f"On {machines} each GPU needs {plan.device_bytes / GIB:.1f} of {machines.gpu.memory_bytes / GIB:.1f} GiB: {result}."
    )


def _what_is_trained(config: Config, model: KnownModel) -> Iterator[str]:
    shape, lora = model.shape, config.lora
    layers = lora.layer_indices(shape.num_layers)
    of_all = "all" if len(layers) == shape.num_layers else f"{len(layers)} of"
    of_all = "the only layer" if shape.num_layers == 1 else f"{of_all} {shape.num_layers} layers"
    unfrozen = unfrozen_weights(config, shape)
    if unfrozen:
        num = shape.unfrozen_weights(unfrozen)
        yield (
            f"{model.title}: {describe_unfrozen(unfrozen)} are trained themselves, {num:,} weights: with fp32 copies, gradients and "
            f"moments {_size(BYTES_PER_TRAINED_WEIGHT * num)}, to store {_size(2 * num)} in 16 bits"
        )
    if not layers:
        return
    yield (
        f"{model.title}: in {of_all} W becomes W + (alpha / r) B A, with r = {span(lora.all_ranks())} and alpha / r = "
        f"{span(lora.all_scales())}"
    )
    linears = shape.linear_shapes()
    alike: dict[tuple[int, int, int], list[str]] = {}
    for name, r in _ranks_of(lora):
        alike.setdefault((*linears[name], r), []).append(name)
    rows = [
        ("matrices", "W (d_out, d_in)", "B (d_out, r)", "A (r, d_in)", "frozen d_out d_in", "trained r (d_out + d_in)")
    ]
    for (out, in_, r), names in alike.items():
        trained, frozen = r * (out + in_), out * in_
        sizes = f"({out}, {in_})", f"({out}, {r})", f"({r}, {in_})"
        rows.append((" ".join(names), *sizes, f"{frozen:,}", f"{trained:,}, {_ratio(trained, frozen)}"))
    yield from in_columns(rows, indent="  ")
    yield "An adapter takes as many multiplications per token as it has weights: O(r d), where its matrix takes O(d^2)."
    if lora.train_tokens:
        num_rows, matrices = shape.trained_rows(lora), "the embedding" if shape.tied else "embedding and head"
        yield (
            f"Of {count(len(lora.train_tokens), 'token')} the rows of {matrices} are trained too: {num_rows} x {shape.hidden:,} = "
            f"{num_rows * shape.hidden:,} weights."
        )
    trained = shape.trained_weights(lora)
    total = shape.num_parameters()
    yield (
        f"trained {trained:,}, frozen {total:,}: {trained / total:.3%}, {figure(trained / shape.weights_of_a_layer())} times "
        f"the weights of a layer; {2 * trained / 1e6:,.1f} MB in 16 bits"
    )
    if config.optim.lr == "auto":
        lr, why = choose_lr(hidden=shape.hidden, alphas=lora.all_alphas())
        yield f"optim.lr: auto is {lr:g}: {why}."
    if model.is_by_hand:
        source = (
            "as given"
            if shape.given_parameters is not None
            else "that of a Llama of these sizes (three matrices after attention)"
        )
        yield f"The frozen count is {source}; the trained count follows from the shapes of the adapted matrices."


def _ranks_of(lora: LoraSection) -> list[tuple[str, int]]:
    """Each adapted linear with each rank that it has in some layer."""
    if lora.modules is None:
        return [(name, lora.rank) for name in lora.target_names()]
    ranks = {(module.linear, module.rank) for module in lora.modules}
    return sorted(ranks, key=lambda pair: (LINEARS.index(pair[0]), pair[1]))


def _costs(config: Config, model: KnownModel) -> Iterator[str]:
    ways = ways_of(config, model)
    own = ways[-1]
    what = "LoRA" if own.name.startswith("LoRA") and config.train.unfreeze is None else "the last row"
    yield f"{'to train':24} {'trained':>17}  {'weights, gradients, AdamW':26} {'to store':>9} (x: times what {what} takes)"
    for way in ways:
        less = "" if way is own else f" ({way.state_bytes / own.state_bytes:.1f} x)"
        smaller = "" if way is own else f" ({way.saved_bytes / own.saved_bytes:,.1f} x)"
        yield f"{way.name:24} {way.trained:>17,}  {_size(way.state_bytes) + less:26} {_size(way.saved_bytes):>9}{smaller}"
    yield (
        "Bytes per trained weight: 2 in 16 bits, gradient 2, fp32 master copy 4, AdamW's moments 4 + 4; "
        "for adapters 4 + 4 + 4 + 4, all in fp32."
    )
    yield (
        f"Bytes per frozen weight: 2, under LoRA {_bytes_per_frozen_weight(config, model):.3g}. Activations come on top."
    )


def _ratio(part: int, whole: int) -> str:
    return f"{whole / part:,.0f} times fewer" if part < whole else f"{part / whole:,.2f} times as many"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e6:,.1f} MB"
