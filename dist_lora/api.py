"""The library: what the commands do, as functions. Importing it imports no torch; see docs/library.md.

A script that trains is started as the command is: alone, or by torchrun, deepspeed, accelerate or srun, which make each
process a rank. All ranks call ``train`` and ``evaluate``, with the same arguments; what works on files (``generate``, ``gather``,
``merge``, ``plan``) is for one of them: ``if is_first(): ...``.

Errors are those of ``dist_lora.errors``, raised to the caller in a single process. In a world of several ranks an error is
printed once and ends every process with the command's exit code: what a failed rank has left to the others can't be undone.
A request to stop (a signal, a file STOP) ends a process with ``SystemExit``: 75, once all is saved.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dist_lora import work
from dist_lora.config.schema import Config, Quant
from dist_lora.errors import StoppedOnRequest
from dist_lora.supervision.told import report_error
from dist_lora.train.callbacks import Callback, StartedRun

if TYPE_CHECKING:
    from dist_lora.lora.merge import MergeReport
    from dist_lora.world.world import World

__all__ = [
    "Callback",
    "Config",
    "StartedRun",
    "TrainedRun",
    "evaluate",
    "gather",
    "generate",
    "is_first",
    "load",
    "merge",
    "plan",
    "train",
]

_logger = logging.getLogger("dist_lora")
# The store of a world that rank 0 hosts must outlive it: another rank may join the next one before rank 0 does.
_former_worlds: list[World] = []


def load(source: Path | str | Mapping[str, Any], *overrides: str) -> Config:
    """The settings of a run, with defaults: from a YAML file, or from a mapping with what such a file would have.

    Args:
        overrides: ``section.setting=value``, as on the command line.

    Raises:
        ConfigError: all faults, with the nearest names.
    """
    return work.load(Path(source) if isinstance(source, str) else source, overrides)


def is_first() -> bool:
    """Whether this process is rank 0 of its launcher's, or has no launcher.

    Raises:
        ConfigError: the launcher's variables contradict each other.
    """
    from dist_lora.world.launcher import launched_rank

    launched = launched_rank(os.environ)
    return launched is None or launched.world_rank == 0


@dataclass(frozen=True)
class TrainedRun:
    """A run that is done: its folder, with the adapter in PEFT's format, and what summary.json says of it."""

    folder: Path
    adapter: Path
    summary: Mapping[str, Any]


def train(config: Config, *, callbacks: Sequence[object] = ()) -> TrainedRun:
    """``dist-lora train`` to its end: from the newest checkpoint, if the run has one. All ranks call it, in their main thread.

    Without a launcher it is one process, on one GPU: it never starts others.

    Args:
        callbacks: objects with hooks (``Callback``), besides those that ``train.callbacks`` names.

    Raises:
        DistLoraError, in a single process; see the module.
        SystemExit: it was stopped on request (75), or failed in a world of several ranks.
    """
    from dist_lora.run_folder.attempt import read_summary
    from dist_lora.run_folder.folder import close_run_folder

    try:
        work.train(config, enter=_joined, callbacks=callbacks)
    finally:
        close_run_folder()
    folder = config.runs_dir / config.run
    return TrainedRun(folder, folder / "adapter", read_summary(folder))


def evaluate(config: Config, *, adapter: Path | None = None, predictions: Path | None = None) -> dict[str, Any]:
    """``dist-lora eval``: held-out loss, perplexity, exact match and metrics by name, the same on all ranks, which all call it.

    Args:
        adapter: its folder; None evaluates the base.
        predictions: a new file for each sample's generated answer.

    Raises:
        DistLoraError, SystemExit: see ``train``.
    """
    return work.evaluate(config, enter=_joined, adapter=adapter, predictions=predictions)


def generate(
    adapter: Path,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    *,
    base: str | None = None,
    system: str | None = None,
    plain: bool = False,
    max_new_tokens: int = 256,
) -> list[str]:
    """The greedy answer to each prompt, in their order, by an adapter and its base, which is whole in this process.

    Args:
        prompts: texts, or chats as lists of messages with role and content.
        base: a member's name, a folder or a hub id; None is the one that the adapter names.
        system: a system message before each text.
        plain: continue texts as they are, without a chat template.

    Raises:
        ConfigError, DataError: prompts that can't be asked.
        AdapterError, WeightsError: the adapter or its base is damaged, or they don't belong together.
    """
    from dist_lora.chat.command import answers_to
    from dist_lora.chat.prompts import given_prompts
    from dist_lora.lora.adapter_folder import check_adapter_folder

    asked = given_prompts(prompts)
    check_adapter_folder(adapter)
    if not asked:
        return []
    return answers_to(asked, adapter, base=base, system=system, is_plain=plain, max_new_tokens=max_new_tokens)


def gather(checkpoint: Path, *, out: Path) -> Path:
    """``dist-lora gather``: a checkpoint's shards (or those of a run's newest) as a new adapter folder, which is returned.

    Raises:
        CheckpointError, ConfigError, SaveError: it is damaged; ``out`` exists and is more than an adapter, which is replaced;
            ``out`` can't be written.
    """
    from dist_lora.checkpoint.gather import gather_adapter
    from dist_lora.lora.adapter_folder import check_out

    check_out(out)
    return gather_adapter(checkpoint, out=out)


def merge(
    adapter: Path,
    *,
    out: Path,
    base: str | None = None,
    force: bool = False,
    quant: Quant = "none",
    dtype: Literal["bf16", "fp32"] | None = None,
) -> MergeReport:
    """``dist-lora merge``: a new model folder with the adapter in its weights. The arguments are the command's options.

    Raises:
        ConfigError, AdapterError, WeightsError, SaveError: see ``lora.merge.merge_adapter``.
    """
    return work.merge(adapter, out=out, base=base, force=force, quant=quant, dtype=dtype)


def plan(
    config: Config,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str | None = None,
    gpu_gib: float | None = None,
    host_gib: float | None = None,
) -> dict[str, Any]:
    """``dist-lora plan --json`` as data, in bytes and seconds; ``fits`` says whether the run does. Needs no torch.

    Raises:
        ConfigError: settings contradict each other, the model or the machines.
    """
    from dist_lora.lora.planned import with_adapter
    from dist_lora.plan.command import MachineRequest
    from dist_lora.plan.plan import make_plan

    known = with_adapter(config)
    request = MachineRequest.of(
        known,
        None if nodes is None else [nodes],
        gpus_per_node,
        None if gpu is None else [gpu],
        gpu_gib,
        host_gib,
        None,
    )
    return make_plan(known, request.single()).to_json()


@contextmanager
def _joined(config: Config, *, end: work.End = lambda error: None, needs_all: bool = True) -> Iterator[World]:
    """The world of this rank, for a library: no other process is started, and a single one raises its errors."""
    from dist_lora.world.launcher import launched_rank

    launched = launched_rank(os.environ)
    is_alone = launched is None or launched.world_size == 1

    def report(error: BaseException, who: str = "") -> None:
        if not is_alone or isinstance(error, StoppedOnRequest) or not isinstance(error, Exception):
            report_error(error, who)
        end(error)

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # see ``cli.main``
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)  # for the run's log; nothing is printed without a handler
    before = _logger.level
    if launched is not None and launched.world_rank > 0:
        _logger.setLevel(logging.ERROR)  # the first rank reports on behalf of all
    from dist_lora.supervision.run_rank import joined

    try:
        with joined(launched, config, report=report, raises_alone=True) as world:
            _former_worlds.append(world)
            yield world
    finally:
        _logger.setLevel(before)
        gc.collect()  # a model whose parts refer to each other would lie beside that of the next call
