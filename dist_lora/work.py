"""What a command does and a call of the library does too: the same steps in the same order, for ``cli`` and ``api``.

Nothing heavy is imported at module level. How a rank joins the world, and what becomes of its errors, is the caller's
(``Enter``): a command reports and exits, and so does a library in a world of several ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dist_lora.errors import EXIT_FAILED, ConfigError, DistLoraError, RunInUse
from dist_lora.supervision.told import error_text

if TYPE_CHECKING:
    from dist_lora.config.schema import Config, Quant
    from dist_lora.lora.learned import Learned
    from dist_lora.lora.merge import MergeReport
    from dist_lora.world.world import World

log = logging.getLogger("dist_lora")

End = Callable[[BaseException | None], None]


class Enter(Protocol):
    """Joins this rank to the world of a config; ``end`` is called by the rank that reports an error, after the report."""

    def __call__(self, config: Config, *, end: End = ..., needs_all: bool = ...) -> AbstractContextManager[World]:
        """The world, for the work inside the ``with``."""


class EndedBefore(DistLoraError, RuntimeError):
    """torchrun has started its workers again, though the run has ended with a code that no restart changes."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def load(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The settings in a file, or in a mapping as a file's; torch's allocator is told of them if it isn't imported yet.

    Raises:
        ConfigError: see ``load_config``.
    """
    from dist_lora.config.load import load_config, load_settings
    from dist_lora.world.allocator import allocator_settings

    if isinstance(source, Path):
        loaded = load_config(source, overrides=overrides)
    else:
        loaded = load_settings(source, overrides=overrides)
    os.environ.update(allocator_settings(os.environ, is_offloaded=loaded.parallel.offload != "none"))
    return loaded


def train(
    config: Config, *, enter: Enter, is_dry: bool = False, makes_profile: bool = False, callbacks: Sequence[Any] = ()
) -> None:
    """A run from its start or its newest checkpoint to its end, with a status in its folder. All ranks call it.

    Raises:
        EndedBefore: see there.
        whatever ``enter`` raises; see ``train.command.train``.
    """
    from dist_lora.run_folder.log_file import append_to_log
    from dist_lora.run_folder.status import StatusWriter, is_of_another
    from dist_lora.train.signals import StopRequest

    status = StatusWriter(config.runs_dir / config.run)
    before = None if is_dry else status.ended_before()
    if before is not None:
        raise EndedBefore(
            f"not restarted, since it ended with exit code {before.code}: {before.reason}",
            exit_code=EXIT_FAILED if before.code is None else before.code,
        )

    def end(error: BaseException | None) -> None:
        if not is_dry:
            if error is not None and not isinstance(error, RunInUse) and not is_of_another(status.folder):
                append_to_log(status.folder, error_text(error))
            status.end(error)

    # Entered before the imports below, which take long on some file systems.
    with StopRequest() as stop, enter(config, end=end, needs_all=not is_dry) as world:
        from dist_lora.plan.hardware import peak_flops_per_s
        from dist_lora.train.command import train as train_here

        train_here(
            config,
            world,
            stop,
            peak_of=peak_flops_per_s,
            is_dry=is_dry,
            makes_profile=makes_profile,
            callbacks=callbacks,
        )
        stop.close()
        if world.is_first:
            end(None)


def evaluate(
    config: Config,
    *,
    enter: Enter,
    adapter: Path | None,
    predictions: Path | None,
    show: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """The values of ``dist-lora eval``, the same on all ranks. All ranks call it; ``show`` gets them on the first."""
    if adapter is not None:
        from dist_lora.lora.adapter_folder import check_adapter_folder

        check_adapter_folder(adapter)
    with enter(config) as world:
        from dist_lora.train.command import evaluate as evaluate_here

        result = evaluate_here(config, world, adapter=adapter, predictions_file=predictions)
        if world.is_first:
            show(result)
    return result


def look_at_learned(adapter: Path, *, base: str | None, reads_base: bool = True) -> Learned:
    """What an adapter has learned: as recorded in its folder, or computed and recorded there.

    Args:
        base: the model to take W's norms from, whatever is recorded; None takes the adapter's own.
        reads_base: read a base for W's norms where they aren't recorded; without it they stay unknown.
    """
    from dist_lora.lora.adapter_reader import open_adapter
    from dist_lora.lora.find_base import find_base
    from dist_lora.lora.learned import learned_from, read_learned, write_learned
    from dist_lora.lora.spectrum import norms_on_disk, spectra_on_disk
    from dist_lora.pace import pace
    from dist_lora.text import size

    opened = open_adapter(adapter)
    if not opened.modules:
        raise ConfigError(
            f"{adapter}: it has no A and B, only whole weights or rows of tokens; expected LoRA's, whose changes are looked at"
        )
    recorded = None if base is not None or opened.checksum is None else read_learned(adapter)
    if recorded is not None and not (reads_base and any(one.weight_norm is None for one in recorded.linears)):
        return recorded
    opened.verify()
    values, norms = spectra_on_disk(opened), dict[str, float]()
    if reads_base:
        with pace("reading the base", unit=size) as advance:
            norms = norms_on_disk(opened, find_base(adapter, base), on_progress=advance)
    record = learned_from(values, norms, opened.modules.values())
    try:
        write_learned(adapter, record, weights=opened.checksum)
    except OSError as error:
        log.warning(f"{adapter}: can't be written: {error.strerror or error}. The next call computes it again")
    return record


def merge(
    adapter: Path,
    *,
    out: Path,
    base: str | None,
    force: bool,
    quant: Quant,
    dtype: Literal["bf16", "fp32"] | None,
) -> MergeReport:
    """Merge an adapter into its base; see ``merge_adapter``. Warns if the base is merged in another quantization than the run's."""
    from dist_lora.lora.adapter_folder import check_adapter_folder
    from dist_lora.lora.find_base import find_base
    from dist_lora.lora.merge import merge_adapter
    from dist_lora.lora.origin import origin_of
    from dist_lora.pace import pace
    from dist_lora.text import size

    check_adapter_folder(adapter)  # before a base is looked for, and perhaps downloaded
    trained_quant = origin_of(adapter).quant
    folder = find_base(adapter, base)
    with pace("merging", unit=size) as advance:
        report = merge_adapter(
            adapter, base=folder, out=out, force=force, dtype=dtype, quant=quant, on_progress=advance
        )
    if trained_quant not in (None, report.quant):
        log.warning(
            f"{adapter} was trained on its base in {trained_quant}, and is merged into it in {report.quant}: "
            f"--quant {trained_quant} gives exactly the model that was trained"
        )
    return report
