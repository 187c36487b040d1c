"""Settings of other trainers get an error that names ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lora.config.faults import setting_names
from dist_lora.config.load import load_config
from dist_lora.config.other_trainers import ABSENT, NOTES, RENAMED, advice_for
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError


@pytest.mark.parametrize("name", sorted(set(RENAMED.values())))
def test_every_name_we_send_a_user_to_exists(name: str) -> None:
    assert name in setting_names() or name in Config.model_fields


def test_no_name_is_both_renamed_and_absent_and_notes_belong_to_renamed_ones() -> None:
    assert not RENAMED.keys() & ABSENT.keys()
    assert NOTES.keys() <= RENAMED.keys()


def test_no_name_of_ours_is_called_another_trainers() -> None:
    ours = {*Config.model_fields, *(name.rpartition(".")[2] for name in setting_names())}
    assert ours & (RENAMED.keys() | ABSENT.keys()) <= {"resume"}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("learning_rate: 1", "learning_rate: no such setting: another trainer's name; here it is optim.lr"),
        ("lora: {lora_r: 1}", "lora.lora_r: no such setting: another trainer's name; here it is lora.rank"),
        ("lora_alpha: 1", "here it is lora.alpha"),
        ("lora: {target_modules: all-linear}", "here it is lora.targets"),
        ("lora_target: all", "here it is lora.targets"),
        ("model: {name: x/y, load_in_4bit: true}", "here it is model.quant"),
        ("train: {per_device_train_batch_size: 1}", "here it is train.micro_batch"),
        (
            "gradient_accumulation_steps: 4",
            "here it is train.global_batch (the number of accumulation steps is global_batch / (micro_batch x GPUs))",
        ),
        (
            "optim: {warmup_ratio: 0.1}",
            "here it is optim.warmup_steps (in steps: the ratio times the run's steps)",
        ),
        ("max_seq_len: 1", "here it is train.sequence_length"),
        ("cutoff_len: 1", "here it is train.sequence_length"),
        ("gradient-checkpointing: true", "here it is train.activation_checkpointing"),
        ("report_to: none", "here it is log.trackers (none is [])"),
        (
            "resume_from_checkpoint: true",
            "here it is checkpoint.resume (auto, never or a checkpoint's folder)",
        ),
        ("save_total_limit: 1", "here it is checkpoint.keep"),
        ("train_on_inputs: false", "here it is data.train_on (false is assistant, true is all)"),
        ("sample_packing: true", "here it is train.packing"),
        ("num_train_epochs: 3", "here it is train.epochs"),
        ("max_steps: 3", "here it is train.steps"),
        ("Max_Steps: 3", "here it is train.steps"),
        ("trust_remote_code: true", "another trainer's name; code from a model's folder is never run here"),
    ],
)
def test_another_trainers_name_says_ours_at_any_level(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    model = "" if written.startswith("model:") else "model: {name: 3.1-8b}\n"
    path.write_text(f"run: a\n{model}data: {{train: t.jsonl}}\n{written}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).endswith(said)


def test_a_name_nobody_has_gets_no_advice() -> None:
    assert advice_for("frobnicate") is None
