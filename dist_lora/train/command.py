"""The work behind ``train`` and ``eval``, as each rank does it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lora.base.tokenizer_files import TEMPLATE_FILE
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.config.changes import flat
from dist_lora.config.schema import Config, MachineSection, OptimSection
from dist_lora.data.chat import hash_tokenizer, print_sample
from dist_lora.data.columns import sources_of
from dist_lora.data.duplicates import warn_of_duplicates
from dist_lora.data.loader import Loader
from dist_lora.data.mixture import Mixture
from dist_lora.data.model_limits import check_limits, warn_of_context
from dist_lora.data.token_cache import TokenRules, Which, prepare_tokens
from dist_lora.data.token_set import TokenSet, split_eval
from dist_lora.data.untrained import check_special_tokens
from dist_lora.errors import ConfigError, SaveError, StoppedOnRequest, TrainingError, UnwritablePath, cannot_write
from dist_lora.evaluation.predictions import Predictions
from dist_lora.files import file_exists, write_whole
from dist_lora.herd.shape import Shape
from dist_lora.herd.unfrozen import describe_unfrozen, trained_weights, unfrozen_weights
from dist_lora.layout.choices import DtypeName, lr_lines, with_lr
from dist_lora.layout.machine import is_called
from dist_lora.layout.setup import cut_of_step
from dist_lora.lora.learned import read_learned, sentences
from dist_lora.lora.origin import origin_of
from dist_lora.lora.patterns import adapters_of, with_linears
from dist_lora.lora.run_facts import RunFacts
from dist_lora.profile.recorder import Recorder
from dist_lora.run_folder.attempt import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TOOL_CALLS_FILE,
    Attempt,
    begin_attempt,
)
from dist_lora.run_folder.folder import open_run_folder, write_config
from dist_lora.run_folder.log_file import to_log_file
from dist_lora.run_folder.samples import SAMPLES_FILE
from dist_lora.text import count, gib, span
from dist_lora.train.advice import advice_lines
from dist_lora.train.build import (
    Base,
    ModelFiles,
    Trainee,
    build,
    check_adapter,
    describe_trained,
    load_adapter,
    open_base,
    with_ids,
)
from dist_lora.train.callbacks import Callbacks, StartedRun
from dist_lora.train.checkpoints import RunProgress
from dist_lora.train.data_facts import data_facts
from dist_lora.train.evaluating import Evaluation, HeldOutSets, evaluate_sets, warn_of_answers
from dist_lora.train.finished import describe_finished, finished_line
from dist_lora.train.guard import guard_rules, split_judged
from dist_lora.train.held_out import check_tool_calls, held_out_prints, loss_of
from dist_lora.train.judge import check_command
from dist_lora.train.loop import Run
from dist_lora.train.meter import Meter, peak_bytes, reset_peak
from dist_lora.train.own_code import check_own_code, own_code_facts, warn_of_other_code
from dist_lora.train.resume import (
    VerifiedCheckpoint,
    check_same_run,
    find_checkpoint,
    last_evaluated,
    stale_evaluations,
    warn_of_other_lr,
)
from dist_lora.train.signals import StopRequest
from dist_lora.train.trackers import check_trackers
from dist_lora.world.world import World, device_bytes

log = logging.getLogger("dist_lora")

PeakOf = Callable[[str, DtypeName], float | None]


def tokens_of(config: Config, base: ModelFiles, world: World) -> tuple[TokenSet, HeldOutSets]:
    """The training set and the held-out ones, tokenized (by all ranks) or read from the cache.

    Raises:
        ConfigError: a sample is longer than the model's context.
        DataError: see ``prepare_tokens`` and ``check_limits``.
    """
    if isinstance(config.data.eval, float) and config.data.format == "guard":
        whole = _prepare(config, base, world, "train", augments=False)
        forms = _prepare(config, base, world, "train") if config.data.guard_augment else whole
        train, held_out = split_judged(forms, whole, fraction=config.data.eval, seed=config.train.seed)
        return train, {"": held_out}
    if isinstance(config.data.eval, float):
        whole = _prepare(config, base, world, "train")
        train, held_out = split_eval(whole, fraction=config.data.eval, seed=config.train.seed)
        return train, {"": held_out}
    return _prepare(config, base, world, "train"), _sets_of_files(config, base, world)


def held_out_of(config: Config, base: Base, world: World) -> HeldOutSets:
    """The held-out sets alone; files of their own are read without the training set.

    Raises:
        ConfigError: ``data.eval`` is not set.
    """
    if config.data.eval is None:
        raise ConfigError("data.eval: not set; give a file, a hub id, or a fraction of data.train")
    return _sets_of_files(config, base, world) or tokens_of(config, base, world)[1]


def _sets_of_files(config: Config, base: ModelFiles, world: World) -> HeldOutSets:
    """The held-out sets that have sources of their own; their settings are ``data.eval`` or ``data.eval.NAME``."""
    return {name: _prepare(config, base, world, f"eval.{name}".rstrip(".")) for name in config.data.eval_files()}


def _prepare(config: Config, base: ModelFiles, world: World, which: Which, *, augments: bool = True) -> TokenSet:
    section = config.data
    names, readings = sources_of(section, which)
    token_set = prepare_tokens(
        names,
        which=which,
        rules=TokenRules(
            sequence_length=config.train.sequence_length,
            format=section.format,
            train_on=section.train_on,
            on_no_target=section.on_no_target,
            on_too_long=section.on_too_long,
            readings=readings,
            guard=guard_rules(config, base, augments=augments and which == "train"),
        ),
        tokenizer=base.tokenizer,
        tokenizer_hash=hash_tokenizer(base.folder, base.tokenizer),
        cache_dir=section.cache_dir,
        world=world,
        vocab=base.shape.vocab,
    )
    check_limits(token_set, which=which, context=base.shape.context, vocab=base.shape.vocab, world=world)
    return token_set


def loader_of(config: Config, tokens: TokenSet, world: World, kind: type[Loader] = Loader) -> Loader:
    """The order of the batches of a run."""
    section, sets = config.train, config.data.train_sets()
    weights = tuple(one.weight for one in sets if one.weight)
    mixture = Mixture(tuple(one.path for one in sets), weights, config.data.mix) if weights else None
    return kind(
        tokens,
        sequence_length=section.sequence_length,
        packing=section.packing,
        global_batch=section.global_batch,
        micro_batch=section.micro_batch,
        seed=section.seed,
        world_rank=world.world_rank,
        world_size=world.world_size,
        mixture=mixture,
    )


def num_steps_of(config: Config, loader: Loader) -> int:
    """Optimizer steps of the whole run: as configured, or as many as the epochs have."""
    if config.train.steps is not None:
        return config.train.steps
    epochs = config.train.epochs or 1.0
    whole = int(epochs)
    steps = sum(loader.steps_in_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        steps += math.ceil((epochs - whole) * loader.steps_in_epoch(whole))
    return steps


def train(
    config: Config,
    world: World,
    stop: StopRequest,
    *,
    peak_of: PeakOf,
    is_dry: bool = False,
    makes_profile: bool = False,
    callbacks: Sequence[Any] = (),
) -> None:
    """``dist-lora train``. All ranks call it.

    Args:
        callbacks: objects with hooks, besides those of ``train.callbacks``.
        peak_of: operations per second that a GPU of this name can reach in this dtype; None where that isn't known.
        makes_profile: of one step, see ``Recorder``.
    """
    started_s, began_s = time.monotonic(), time.time()
    if not is_dry and _is_finished(config, world):
        return
    _check_programs(config, world)
    check_own_code(config, world, callbacks=callbacks)
    base = open_base(config, world)
    warn_of_context(sequence_length=config.train.sequence_length, context=base.shape.context, world=world)
    named, config = config.lora.train_tokens, with_ids(config, base, world)
    if config.lora.start_from is not None:
        config = check_adapter(config.lora.start_from, config=config, base=base, world=world)
    settings = _named(config, named)
    config = world.agree_on("the config", functools.partial(_resolved, config, base.shape))
    folder = None if is_dry else open_run_folder(config, world)
    checkpoint = None if folder is None else find_checkpoint(config, folder, world)
    tokens, held_out = _checked_tokens(config, base, world, is_new=checkpoint is None)
    loader = loader_of(config, tokens, world)
    num_steps = num_steps_of(config, loader)
    if world.is_first:
        shares = shares_lines(config, loader, num_steps=num_steps)
        told = plan_lines(settings, base, tokens, held_out, shares, num_steps=num_steps, world=world)
        _tell([*told, *_advice_on(config, tokens, loader, num_steps=num_steps)], is_dry=is_dry)
        if is_dry:
            _print_sample(tokens, base)
    if is_dry:
        return
    assert folder is not None
    world.stacks = folder / "stacks"
    _check_resume(checkpoint, base, loader, num_steps=num_steps, world=world)
    prints = held_out_prints(config, held_out, world)
    if checkpoint is not None and _has_nothing_to_do(
        checkpoint, folder, config, prints, num_steps=num_steps, world=world
    ):
        return
    attempt = _prepare_folder(
        checkpoint, config, settings=settings, num_steps=num_steps, folder=folder, began_s=began_s, world=world
    )
    trainee = build(config, base, world, has_norms=True)
    _tell_of_loading(trainee, world)
    run = Run(config, trainee, loader=loader, held_out=held_out, num_steps=num_steps, folder=folder, world=world)
    run.checkpoints.data, run.checkpoints.held_out = _data_facts(config, tokens, held_out), prints
    if checkpoint is not None:
        run.resume(checkpoint)
    run.recorder = _recorder(run, folder, world) if makes_profile and world.is_first else None
    _start_callbacks(run, folder, world, callbacks)
    _train(run, folder, world, stop, peak_of)
    _check_base(trainee, world)
    summary = _finish(run, folder, world, attempt, seconds=time.monotonic() - started_s)
    _end_callbacks(run, summary, world, callbacks)


def _named(config: Config, tokens: list[str | int]) -> Config:
    """The config with the tokens as they were given, if they were."""
    if not tokens:
        return config
    return config.model_copy(update={"lora": config.lora.model_copy(update={"train_tokens": tokens})})


def _resolved(config: Config, shape: Shape) -> Config:
    """The config as everything that trains takes it: with each linear's rank and alpha, and a number for the learning rate."""
    return with_lr(with_linears(config, shape), shape)


def _checked_tokens(config: Config, base: Base, world: World, *, is_new: bool) -> tuple[TokenSet, HeldOutSets]:
    """``tokens_of``, with special tokens that the base knows, and a warning where held-out samples are trained on.

    Args:
        is_new: not resumed. That warning reads all of the training set, so a run makes it once.
    """
    tokens, held_out = tokens_of(config, base, world)
    check_tool_calls(held_out, config=config, base=base, world=world)
    check_special_tokens(
        tokens,
        tokenizer=base.tokenizer,
        index=base.on_disk.index,
        is_tied=base.shape.tied,
        on_untrained=config.data.untrained_tokens,
        trained=config.lora.token_ids(),
        world=world,
    )
    for name, of_set in held_out.items() if is_new else ():
        warn_of_duplicates(of_set, tokens, name=f"data.eval.{name}".rstrip("."), world=world)
    warn_of_answers(held_out, config=config, base=base, world=world)
    return tokens, held_out


def _tell(lines: Sequence[str], *, is_dry: bool) -> None:
    for line in lines:
        print(line, file=sys.stdout if is_dry else sys.stderr, flush=True)
        to_log_file(line)


def _data_facts(config: Config, tokens: TokenSet, held_out: HeldOutSets) -> RunFacts:
    section = config.data
    names = list(section.eval.values()) if isinstance(section.eval, dict) else section.eval
    trained = [one.path for one in section.train_sets()]
    return data_facts(trained, names, train_sets=[tokens], held_out_sets=[*held_out.values()])


def _is_finished(config: Config, world: World) -> bool:
    """Whether the run is finished, which is then reported. All ranks call it."""
    line = world.once("the run's folder", lambda: finished_line(config.runs_dir / config.run, config).encode()).decode()
    if line and world.is_first:
        log.info(line)
    return bool(line)


def _has_nothing_to_do(
    checkpoint: VerifiedCheckpoint,
    folder: Path,
    config: Config,
    prints: Mapping[str, str],
    *,
    num_steps: int,
    world: World,
) -> bool:
    """Whether the run turns out to be finished once its steps are counted, which is then reported. All ranks call it."""
    step, section = checkpoint.manifest.step, config.eval
    is_evaluated = config.data.eval is None and section.command is None
    is_evaluated = is_evaluated or last_evaluated(checkpoint) == step
    progress = RunProgress(step, stale_evaluations=stale_evaluations(checkpoint, config, prints))
    is_out_of_patience = progress.is_out_of_patience(section.patience)
    if not is_evaluated or (step != num_steps and not is_out_of_patience):
        return False
    line = world.once("the run's end", lambda: describe_finished(folder, num_steps).encode()).decode()
    if line and world.is_first:
        log.info(line)
    return bool(line)


def _check_resume(
    checkpoint: VerifiedCheckpoint | None, base: Base, loader: Loader, *, num_steps: int, world: World
) -> None:
    """Raise on all ranks if the checkpoint is not one of this run, or has done more steps than it has."""
    if checkpoint is not None:
        data = loader.fingerprint if world.is_first else ""
        check_same_run(checkpoint, base=base.identity, folder=base.folder, data=data, world=world)
        if checkpoint.manifest.step > num_steps:
            raise ConfigError(
                f"{checkpoint.path}: the run has done {count(checkpoint.manifest.step, 'step')} and train.steps is {num_steps}. "
                "Raise train.steps, or choose a new name: run=NAME"
            )


def _prepare_folder(
    checkpoint: VerifiedCheckpoint | None,
    config: Config,
    *,
    settings: Config,
    num_steps: int,
    folder: Path,
    began_s: float,
    world: World,
) -> Attempt | None:
    """Write ``settings``, as they were given, and the attempt to the run's folder; returns the attempt on the first rank."""

    def begin() -> Attempt:
        write_config(folder, settings)
        if checkpoint is not None:
            warn_of_other_lr(checkpoint, config, num_steps=num_steps)
            warn_of_other_code(checkpoint, config)
        is_restart = config.checkpoint.resume != "never"
        return begin_attempt(
            folder, num_steps=num_steps, is_new=checkpoint is None, keeps_trackers=is_restart, began_s=began_s
        )

    return world.on_first(
        "the run's config", begin, os_error=lambda error: cannot_write(f"{folder}: can't be written: {error}", error)
    )


def _check_programs(config: Config, world: World) -> None:
    # Only the first rank has trackers and a judge.
    world.on_first("log.trackers", lambda: check_trackers(config.log.trackers))
    world.on_first("eval.command", lambda: check_command(config))


def _advice_on(config: Config, tokens: TokenSet, loader: Loader, *, num_steps: int) -> Iterator[str]:
    batch = config.train.global_batch
    per_step = tokens.num_target_tokens / loader.steps_in_epoch(0)
    if not config.lora.has_adapters:
        return iter(())  # it is about LoRA
    return advice_lines(num_steps=num_steps, global_batch=batch, target_tokens_per_step=per_step)


def _tell_of_loading(trainee: Trainee, world: World) -> None:
    """Log how the trainee computes and what loading it took; peaks are the steps' from here on."""
    if world.is_first:
        log.info(trainee.precision.line())
        if world.device.type == "cuda":
            log.info(
                f"loading held at most {gib(peak_bytes(world.device))} on {world.device}; from here on peaks are the steps'"
            )
    reset_peak(world.device)


def _start_callbacks(run: Run, folder: Path, world: World, given: Sequence[Any]) -> None:
    """Make the callbacks on the first rank, if there are any, and tell them of the run. All ranks call it."""

    def start() -> None:
        run.callbacks = Callbacks.of(run.config, given, world)
        first_step = run.progress.step + 1
        run.callbacks.start(StartedRun(run.config, folder, first_step, run.num_steps), last_saved=run.saver.last)

    if run.config.train.callbacks or given:
        world.on_first("the callbacks", start)


def _end_callbacks(run: Run, summary: dict[str, Any] | None, world: World, given: Sequence[Any]) -> None:
    """Tell the callbacks, if there are any, of the end. All ranks call it; ``summary`` is the first's."""

    def end() -> None:
        assert run.callbacks is not None and summary is not None  # this is the first rank
        run.callbacks.end(summary)

    if run.config.train.callbacks or given:
        world.on_first("the callbacks", end)


def _train(run: Run, folder: Path, world: World, stop: StopRequest, peak_of: PeakOf) -> None:
    def open_meter() -> Meter:
        world.progress.now("opening the trackers", kind="unseen")
        if run.saver.last is None:  # a new run, whose base is loaded: a former one's records go as late as they can
            for name in (METRICS_FILE, EVALUATIONS_FILE, TOOL_CALLS_FILE, SAMPLES_FILE):
                (folder / name).unlink(missing_ok=True)
        meter = Meter(
            folder,
            trackers=run.config.log.trackers,
            options=run.config.log.tracker_options,
            settings=flat(run.config.model_dump(mode="json")),
            every=run.config.log.every,
            first_step=run.progress.step + 1,
            num_steps=run.num_steps,
            peak_flops_per_s=_peak_flops_per_s(run, world, peak_of),
            callbacks=run.callbacks,
        )
        world.closing.callback(meter.close)
        opened.callback(meter.leave_terminal)  # an error is printed below the bar
        return meter

    with contextlib.ExitStack() as opened:
        meter = world.on_first(
            "the meter",
            open_meter,
            os_error=lambda error: cannot_write(f"{folder}: can't be written: {error}", error),
        )
        with stop.deferred(folder if world.is_first else None):
            try:
                run.train(meter, stop)
            except StoppedOnRequest:
                run.tell_of_saves()
                raise
    world.progress.now("closing the trackers", kind="unseen")
    world.closing.close()


def _peak_flops_per_s(run: Run, world: World, peak_of: PeakOf) -> float | None:
    """Of this rank's GPU; and the log says how the steps' operations are counted."""
    peak = None
    if world.device.type == "cuda":
        dtype: DtypeName = "bf16" if run.trainee.precision.dtype == torch.bfloat16 else "fp32"
        peak = peak_of(torch.cuda.get_device_name(world.device), dtype)
    share = "" if peak is None else f", and their share of the GPU's {peak / 1e12:,.0f}"
    log.info(
        f"TFLOP/s of a rank{share}: 4 operations per frozen weight and token, 6 per trained one, 12 per pair of attended "
        "entries; recomputed ones aren't counted"
    )
    return peak


def _recorder(run: Run, folder: Path, world: World) -> Recorder:
    train, shape = run.config.train, run.trainee.base.shape
    return Recorder(
        folder,
        first_step=run.progress.step + 1,
        num_steps=run.num_steps,
        device=world.device,
        dtype=run.trainee.precision.dtype,
        matmul=(train.micro_batch * train.sequence_length, shape.hidden, shape.ffn),
        on_write=lambda: world.progress.now("writing the profile", kind="long"),
    )


def _check_base(trainee: Trainee, world: World) -> None:
    """Raise on all ranks if the frozen base has changed on any since it was loaded."""
    world.progress.now("checking the base", kind="long")
    world.agree_on("the frozen base", trainee.check_base)


def _finish(run: Run, folder: Path, world: World, attempt: Attempt | None, *, seconds: float) -> dict[str, Any] | None:
    """Write the adapter in PEFT's format and a summary, on the first rank, which returns it; the others wait outside collectives."""
    out = folder / "adapter"
    world.progress.now("writing the adapter", kind="long")
    world.share(f"finish/peak/{world.world_rank}", str(peak_bytes(world.device)).encode())

    def finish() -> dict[str, Any]:
        try:
            gather_adapter(run.checkpoints.of_adapter(run.progress), out=out, tokenizer=run.trainee.base.folder)
        except UnwritablePath as error:  # the run's folder was writable: another start may find it so again
            raise SaveError(str(error)) from error
        peaks = [peak_bytes(world.device)]
        peaks += [int(world.fetch(f"finish/peak/{rank}")) for rank in range(1, world.world_size)]
        assert attempt is not None  # this is the first rank
        summary = _summary(run, folder, out, seconds=attempt.former_seconds + seconds)
        summary["peak_bytes"] = attempt.peaks_with(peaks)
        write_whole(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        early = f", {summary['ended_early']}" if "ended_early" in summary else ""
        for sentence in _learned_lines(out):
            log.info(f"learned   {sentence}")
        log.info(f"done: {count(run.progress.step, 'step')} in {seconds:.0f} s{early}; adapter: {out}")
        return summary

    return world.on_first(
        "the adapter", finish, os_error=lambda e: SaveError(f"{folder}: the adapter can't be written: {e}")
    )


def _learned_lines(adapter: Path) -> list[str]:
    record = read_learned(adapter)
    return [] if record is None else [*sentences(record)]  # without LoRA there is none


def _summary(run: Run, folder: Path, out: Path, *, seconds: float) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    early = {} if run.progress.step >= run.num_steps else {"ended_early": _why_early(run)}
    return (
        describe_trained(run.trainee)
        | early
        | {
            "steps": run.num_steps,
            "loss_first": lines[0]["loss"] if lines else None,
            "loss_last": lines[-1]["loss"] if lines else None,
            "adapter_bytes": (out / "adapter_model.safetensors").stat().st_size,
            "seconds": round(seconds, 1),
        }
        | own_code_facts(run.config)
    )


def _why_early(run: Run) -> str:
    number = run.progress.stale_evaluations
    best = f" than at step {run.progress.best_step:,}" if run.progress.best_step is not None else ""
    return (
        f"ended at step {run.progress.step:,} of {run.num_steps:,}: {count(number, 'evaluation')} in a row had no lower loss"
        f"{best} (eval.patience)"
    )


def shares_lines(config: Config, loader: Loader, *, num_steps: int) -> list[str]:
    """A line for each set of a mixture, with its share; warns of those that a run repeats often."""
    if loader.mixed is None:
        return []
    num_sequences = num_steps * loader.global_batch
    for line in loader.mixed.repeated(num_sequences):
        log.warning(line)
    left_out = [path for path, share in config.data.shares().items() if not share]
    return [*loader.mixed.lines(num_sequences), *(f"mixture   nothing from {path}: weight 0" for path in left_out)]


def plan_lines(
    config: Config,
    base: Base,
    tokens: TokenSet,
    held_out: HeldOutSets,
    shares: Sequence[str],
    *,
    num_steps: int,
    world: World,
) -> list[str]:
    """A few lines about what a run is going to do: model, trained weights, data, steps."""
    shape, lora, train = base.shape, config.lora, config.train
    resolved = with_linears(config, shape)
    trained = trained_weights(resolved, shape)
    unfrozen = unfrozen_weights(config, shape)
    frozen = shape.num_parameters() - shape.unfrozen_weights(unfrozen)
    _, micro_batch, accumulation = cut_of_step(train, world.world_size)
    by_root = " / sqrt(rank)" if lora.scaling == "sqrt_rank" else ""
    linears = len(adapters_of(resolved.lora, num_layers=shape.num_layers))
    adapters = "no adapter"
    if linears:
        adapters = f"rank {span(lora.all_ranks())}, alpha {span(lora.all_alphas())}{by_root}, on {count(linears, 'linear layer')}"
    rows = f" and {count(shape.trained_rows(lora), 'row')} of {count(len(lora.train_tokens), 'token')}" * bool(
        lora.train_tokens
    )
    return [
        f"model     {base.identity.name}: {frozen:,} frozen weights, {count(shape.num_layers, 'layer')}",
        *([f"unfrozen  {describe_unfrozen(unfrozen)}"] if unfrozen else []),
        f"adapters  {adapters}{rows}: {trained:,} trained weights "
        f"({trained / frozen:.2%}), {trained * 4 / 2**20:,.1f} MiB in fp32",
        f"data      {count(len(tokens), 'sample')}, {count(tokens.num_tokens, 'token')}, {tokens.num_target_tokens:,} trained on"
        + _held_out_text(held_out),
        *shares,
        f"training  {count(num_steps, 'step')} of {count(train.global_batch, 'sequence')}"
        + (f" (packed to {train.sequence_length} tokens)" if train.packing else "")
        + f": {count(world.world_size, 'rank')} x micro_batch {micro_batch} x {count(accumulation, 'accumulation step')}",
        *lr_lines(config, shape),
        *machine_lines(config.machine, world),
    ]


def _held_out_text(sets: HeldOutSets) -> str:
    if not sets:
        return ""
    by_name = f" ({', '.join(f'{name} {len(tokens):,}' for name, tokens in sets.items())})" if "" not in sets else ""
    return f"; {sum(map(len, sets.values())):,} held out{by_name}"


def machine_lines(section: MachineSection, world: World) -> list[str]:
    """A line if this run's machine differs from the one that its config names; the run continues anyway."""
    device, size = "no GPU", 0
    if world.device.type == "cuda":
        device, size = torch.cuda.get_device_name(world.device), device_bytes(world)
    is_other = section.gpu is not None and not is_called(section.gpu, device, size)
    if not is_other and section.gpus_per_node in (None, world.local_size) and section.nodes in (None, world.num_nodes):
        return []
    named = f"{section.nodes or 1} x {section.gpus_per_node or 'any number of'} x {section.gpu or 'any GPU'}"
    here = f"{world.num_nodes} x {count(world.local_size, 'rank')}, {device if is_other else section.gpu or device}"
    return [
        f"machine   the config names {named} (nodes x GPUs x type), and this run has {here}: its plan doesn't apply here"
    ]


def _print_sample(tokens: TokenSet, base: Base) -> None:
    ids, is_target = tokens.document(0)
    title = "\nThe first sample; what is trained on is green, or between ⟦ and ⟧:\n"
    print_sample(ids.tolist(), is_target.tolist(), tokenizer=base.tokenizer, title=title)


def evaluate(
    config: Config, world: World, *, adapter: Path | None, predictions_file: Path | None = None
) -> dict[str, Any]:
    """``dist-lora eval``: the printed values, as a dict, the same on all ranks. All ranks call it.

    Args:
        predictions_file: a new file for each sample's generated answer, whether or not ``eval.exact_match`` is set.
    """
    started_s = time.monotonic()
    if predictions_file is not None:
        world.on_first("the predictions' file", Predictions(predictions_file).refuse_existing)
    check_own_code(config, world, is_training=False)
    base = open_base(config, world)
    config = with_ids(config, base, world)
    if adapter is not None:
        config = world.agree_on("lora", functools.partial(with_linears, config, base.shape))
        config = check_adapter(adapter, config=config, base=base, world=world)
        if world.is_first:
            _warn_of_origin(adapter, config, base)
    held_out = held_out_of(config, base, world)
    check_tool_calls(held_out, config=config, base=base, world=world)
    # Nothing is trained: neither does it start from an adapter, nor has optim.lr: auto to fit this one's alpha.
    unused = {"lora": config.lora.model_copy(update={"start_from": None}), "optim": OptimSection()}
    trainee = build(config.model_copy(update=unused), base, world)
    warn_of_answers(held_out, config=config, base=base, world=world)
    result: dict[str, Any] = {"model": base.identity.name}
    of_base = None
    if adapter is not None:
        of_base = _losses(config, trainee, held_out, world)  # B is zero: this is the base, exactly
        load_adapter(trainee.adapters, adapter, world=world)
    world.progress.now("evaluating")
    found = evaluate_sets(trainee, held_out, config=config, world=world, keeps_predictions=predictions_file is not None)
    if not math.isfinite(found.of_all.loss):
        raise TrainingError(
            f"the held-out loss is {found.of_all.loss}: a weight of {base.folder}{'' if adapter is None else f' or of {adapter}'} isn't "
            "a finite number, or is too large for model.dtype"
        )
    result |= found.to_json(of_base)
    if of_base is not None and found.of_all.loss == of_base.of_all.loss:
        log.warning(f"{adapter}: the loss equals the base's, bit for bit: this adapter changes nothing")
    if predictions_file is not None:
        Predictions(predictions_file, found.answers).write(world)
    return result | {"seconds": round(time.monotonic() - started_s, 1)}


def _warn_of_origin(adapter: Path, config: Config, base: Base) -> None:
    """Say where an adapter is evaluated otherwise than it was trained."""
    origin = origin_of(adapter)
    if origin.quant not in (None, config.model.quant):
        log.warning(
            f"{adapter} was trained on its base in {origin.quant}, and is evaluated on it in {config.model.quant}: "
            f"model.quant={origin.quant} is the model that was trained"
        )
    if origin.chat_template is not None and origin.chat_template != base.tokenizer.chat_template:
        own = f"data.chat_template={adapter}/{TEMPLATE_FILE} is its own"
        if not file_exists(adapter / TEMPLATE_FILE):
            own = "its own is chat_template in its tokenizer_config.json: save that to a file, and set data.chat_template to it"
        log.warning(f"{adapter} was trained with another chat template than this config's: {own}")
    rules = guard_rules(config, base, augments=False)
    asked = [(one.name, one.description) for one in rules.categories] if rules is not None else []
    if asked and origin.guard_categories and asked != [*origin.guard_categories]:
        log.warning(
            f"{adapter} was trained with the categories {', '.join(name for name, _ in origin.guard_categories)}, and is asked with "
            f"{', '.join(name for name, _ in asked)}: their order or descriptions differ if nothing else does (data.guard_categories)"
        )


def _losses(config: Config, trainee: Trainee, held_out: HeldOutSets, world: World) -> Evaluation:
    world.progress.now("evaluating the base")
    return Evaluation({name: loss_of(trainee, tokens, config=config, world=world) for name, tokens in held_out.items()})
