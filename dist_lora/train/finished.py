"""Whether a run is finished, so that starting it again has nothing to do."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import yaml

from dist_lora.base.tokenizer_files import TEMPLATE_FILE, TOKENIZER_FILES
from dist_lora.config.changes import changes
from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.files import file_exists, is_locked
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.fit import with_settings_of
from dist_lora.lora.origin import CONFIG_FILE, WEIGHTS_FILE
from dist_lora.run_folder.attempt import SUMMARY_FILE, read_summary

# Settings (or sections) that change neither the adapter nor what is reported about it.
_WITHOUT_EFFECT = (
    "run",
    "runs_dir",
    "log",
    "checkpoint",
    "machine",
    "parallel",
    "data.cache_dir",
    "train.micro_batch",
    "train.activation_checkpointing",
    "model.attention",
)


def finished_line(folder: Path, config: Config) -> str:
    """What to tell a user who starts a finished run again; "" if it isn't finished, or the config asks for something else.

    Reads small files only: no data, no base, no checkpoint. Local: one rank calls it.
    """
    if config.checkpoint.resume != "auto" or is_locked(folder / "lock") or not _is_same(folder, config):
        return ""
    if _changed_since(folder, config):
        return ""  # content is compared as in any resume
    steps = read_summary(folder).get("steps")
    return describe_finished(folder, steps) if steps == config.train.steps or config.train.steps is None else ""


def describe_finished(folder: Path, num_steps: object) -> str:
    """The message about a run that has done all of its ``num_steps`` and has written its adapter; else ""."""
    adapter, summary = folder / "adapter", read_summary(folder)
    steps, early = summary.get("steps"), summary.get("ended_early")
    is_whole = all(file_exists(adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    if not isinstance(steps, int) or steps != num_steps or not is_whole:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / SUMMARY_FILE).stat().st_mtime))
    if isinstance(early, str):
        return (
            f"{folder}: finished already, on {when}: it {early}; adapter: {adapter}. Nothing is done. To train on, raise "
            "eval.patience (or set it to null); for another run, set run=NAME; to start over, checkpoint.resume=never"
        )
    return (
        f"{folder}: finished already, {steps:,} of {steps:,} steps, on {when}; adapter: {adapter}. Nothing is done. To train "
        "on, raise train.steps (or train.epochs); for another run, set run=NAME; to start over, checkpoint.resume=never"
    )


def _is_same(folder: Path, config: Config) -> bool:
    """Whether the run was made with this config, as far as that matters for its result."""
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        now = yaml.safe_load(dump_config(_with_adapter(config)))
        names = [change.name for change in changes(before, now)]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError):  # ours of an adapter are OSErrors too
        return False
    return all(name in _WITHOUT_EFFECT or name.startswith(tuple(f"{s}." for s in _WITHOUT_EFFECT)) for name in names)


def _with_adapter(config: Config) -> Config:
    """The config with what it leaves to the adapter of ``lora.start_from``, as the run's own has it."""
    if config.lora.start_from is None:
        return config
    return with_settings_of(config, open_adapter(config.lora.start_from))


def _changed_since(folder: Path, config: Config) -> bool:
    """Whether a local file of data, model or tokenizer, or of the adapter to start from, was written after the run had finished."""
    names = [*(one.path for one in config.data.train_sets()), *config.data.eval_files().values()]
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        finished_s = (folder / SUMMARY_FILE).stat().st_mtime
        paths = [Path(name).expanduser() for name in (*names, config.model.name)]
        paths += [config.lora.start_from] if config.lora.start_from is not None else []
        here = [path for path in paths if file_exists(path)]
        beside = ("config.json", CONFIG_FILE, *TOKENIZER_FILES, TEMPLATE_FILE)
        inside = [path / name for path in here if path.is_dir() for name in (*beside, *_weights_in(path))]
        return any(path.stat().st_mtime > finished_s for path in (*here, *inside) if file_exists(path))
    return False


def _weights_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors*")]
