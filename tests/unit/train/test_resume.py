"""What a run may be given otherwise when it goes on, what it is told of it, and what is refused: one process, real runs."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dist_lora.base.tokenizer_files import hash_vocabulary
from dist_lora.chat.command import open_for_answers
from dist_lora.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from dist_lora.config.schema import Config
from dist_lora.errors import CheckpointError, ConfigError, SaveError, WeightsError
from dist_lora.evaluation.evaluate import HeldOut
from dist_lora.lora.merge import merge_adapter
from dist_lora.lora.origin import RunOrigin
from dist_lora.train.meter import Meter
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World
from tests.conftest import save_byte_tokenizer
from tests.ranks.runs import metrics, train_command, train_until_asked

NUM_STEPS = 4


def say(numbers: range) -> str:
    chats = [[("user", f"say {i}"), ("assistant", f"{i} {i}")] for i in numbers]
    return "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n" for chat in chats)


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    """The settings of a run that was stopped at step 2 of 4; all that it is made of lies in its folder."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_llama("llama31"), folder / "base")
    (folder / "train.jsonl").write_text(say(range(6)))
    settings = {
        "run": "it",
        "runs_dir": str(folder),
        "model": {"name": str(folder / "base"), "dtype": "fp32"},
        "lora": {"rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"steps": NUM_STEPS, "global_batch": 2, "sequence_length": 64},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "log": {"trackers": []},
    }
    assert train_command(World.alone(), settings, 2).startswith("interrupted by SIGUSR1 at step 2/4;")
    return settings


@pytest.fixture
def begun(stopped, tmp_path) -> dict[str, Any]:
    """A copy of the stopped run, its base and its data."""
    before = Path(stopped["runs_dir"])
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    return with_(
        stopped,
        runs_dir=str(tmp_path),
        model={"name": str(tmp_path / "base")},
        data={"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "cache")},
    )


def with_(settings: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        **settings,
        **{k: {**settings.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()},
    }


def go_on(settings: Mapping[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Train to the end; what was warned of meanwhile."""
    caplog.clear()
    train_command(World.alone(), settings)
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name == "dist_lora"]


def steps_of(settings: Mapping[str, Any]) -> list[int]:
    return [line["step"] for line in metrics(Path(settings["runs_dir"]) / "it")]


def test_base_and_data_that_lie_elsewhere_now_are_the_same_run(begun, caplog) -> None:
    assert go_on(begun, caplog) == []
    assert steps_of(begun) == [1, 2, 3, 4]


def test_more_steps_and_another_learning_rate_are_told_with_what_the_next_step_has(begun, caplog) -> None:
    settings = with_(begun, train={"steps": 6}, optim={"lr": 2e-2})
    told = go_on(settings, caplog)
    path = Path(begun["runs_dir"]) / "it" / "checkpoints" / "step-00000002"
    assert told[0] == f"resuming {path} with other settings: optim.lr: 0.01 -> 0.02; train.steps: 4 -> 6"
    before, now = (
        lr_at(3, section=Config.model_validate(s).optim, num_steps=n) for s, n in ((begun, 4), (settings, 6))
    )
    assert told[1:] == [f"the learning rate of step 3 is {now:.4g}, and would have been {before:.4g}"]
    lines = metrics(Path(begun["runs_dir"]) / "it")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[2]["lr"] == now


def test_another_engine_and_another_cut_of_the_batch_are_no_word_worth(begun, caplog) -> None:
    assert go_on(with_(begun, train={"micro_batch": 2}, checkpoint={"every": 1}), caplog) == []


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"lora": {"rank": 3}}, "lora.rank: the run has 2, the config says 3"),
        ({"model": {"quant": "nf4"}}, "model.quant: the run has 'none', the config says 'nf4'"),
        ({"train": {"global_batch": 3}}, "train.global_batch: the run has 2, the config says 3"),
        ({"train": {"seed": 1}}, "train.seed: the run has 0, the config says 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_make_it_another_run_is_refused_with_both_values_and_nothing_changes(begun, changed, told) -> None:
    run = Path(begun["runs_dir"]) / "it"
    before = {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.is_file() and path.name not in ("lock", "status", "log.txt")
    }
    with pytest.raises(ConfigError, match="step-00000002 is of a run with other settings:") as raised:
        train_command(World.alone(), with_(begun, **changed))
    assert f"\n  {told}\n" in str(raised.value) and "name another run" in str(raised.value)
    assert raised.value.exit_code == 2
    assert {
        p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name not in ("lock", "status", "log.txt")
    } == before


def test_data_that_was_edited_is_refused(begun) -> None:
    Path(begun["data"]["train"]).write_text(say(range(1, 7)))
    with pytest.raises(
        ConfigError, match=r"data.train: .*step-00000002 was trained on other samples: their fingerprint"
    ):
        train_command(World.alone(), begun)
    assert steps_of(begun) == [1, 2]


def test_other_weights_under_the_same_name_are_refused(begun) -> None:
    file = Path(begun["model"]["name"]) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model.name: .*step-00000002 was trained on another base: weights "):
        train_command(World.alone(), begun)


def test_another_tokenizer_is_refused_on_resume_and_warned_of_where_the_adapter_is_used(
    begun, caplog, tmp_path
) -> None:
    base, run = Path(begun["model"]["name"]), Path(begun["runs_dir"]) / "it"
    file = base / "tokenizer_config.json"
    as_it_was = json.loads(file.read_text())
    other = {**as_it_was, "eos_token": "<|end_of_text|>"}  # no id of the samples depends on it
    file.write_text(json.dumps(other))
    with pytest.raises(
        ConfigError, match=r"model.name: .*step-00000002 was trained with another tokenizer \(xxh3.*eos_token"
    ):
        train_command(World.alone(), begun)
    assert steps_of(begun) == [1, 2]
    # Written otherwise, and padded with another token: the same ids.
    file.write_text(json.dumps({**as_it_was, "pad_token": "<|eot_id|>"}, indent=7))
    assert go_on(begun, caplog) == []

    def warned() -> list[str]:
        return [r.getMessage() for r in caplog.records if "another tokenizer" in r.getMessage()]

    for text, num_warnings in ((as_it_was, 0), (other, 1)):
        file.write_text(json.dumps(text))
        caplog.clear()
        open_for_answers(run / "adapter", base=None, world=World.alone())
        assert len(warned()) == num_warnings
        merge_adapter(run / "adapter", base=base, out=tmp_path / f"merged-{num_warnings}")
        assert len(warned()) == 2 * num_warnings


def test_a_token_of_another_id_is_another_vocabulary(tmp_path) -> None:
    save_byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    run = RunOrigin(vocabulary=hash_vocabulary(tmp_path))
    assert run.other_vocabulary(tmp_path) == RunOrigin().other_vocabulary(tmp_path) == ""
    vocab = content["model"]["vocab"]
    for part in ({"model": content["model"] | {"vocab": vocab | {"a": vocab["b"], "b": vocab["a"]}}},
                 {"added_tokens": content["added_tokens"][:-1]}):  # fmt: skip
        file.write_text(json.dumps(content | part))
        assert "was trained" not in (other := run.other_vocabulary(tmp_path)) and str(tmp_path) in other
    file.write_text(json.dumps({"model": {}}))
    with pytest.raises(WeightsError, match=r"tokenizer\.json is damaged"):
        run.other_vocabulary(tmp_path)
    file.unlink()
    assert run.other_vocabulary(tmp_path) == ""


def test_fewer_steps_than_are_done_are_refused(begun) -> None:
    with pytest.raises(ConfigError, match=r"the run has done 2 steps and train\.steps is 1"):
        train_command(World.alone(), with_(begun, train={"steps": 1}))


def test_resume_never_begins_anew_whatever_has_changed(begun, caplog) -> None:
    told = go_on(with_(begun, lora={"rank": 3}, checkpoint={"resume": "never"}), caplog)
    assert [text.partition(" ")[0] for text in told if "starting over" in text] == ["checkpoint.resume:"]
    assert steps_of(begun) == [1, 2, 3, 4]


def test_a_checkpoint_of_another_run_may_be_named_and_its_folder_stays_as_it_is(begun, caplog) -> None:
    path = Path(begun["runs_dir"]) / "it" / "checkpoints" / "step-00000002"
    settings = with_(begun, run="next", checkpoint={"resume": str(path)})
    assert go_on(settings, caplog) == []
    assert [line["step"] for line in metrics(Path(begun["runs_dir"]) / "next")] == [3, 4]
    assert read_manifest(path).step == 2


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"progress": {"best_step": 1, "best_loss": "low"}}, "best_step 1 and best_loss 'low', expected numbers"),
        ({"base": {"name": "x", "colour": "red"}}, "the base in its manifest can't be read"),
    ],
    ids=("best", "base"),
)
def test_a_manifest_that_someone_signed_by_hand_is_told(begun, changed, told) -> None:
    path = Path(begun["runs_dir"]) / "it" / "checkpoints" / "step-00000002"
    manifest = read_manifest(path)
    (path / MANIFEST_FILE).unlink()
    write_manifest(path, dataclasses.replace(manifest, **changed))
    with pytest.raises(CheckpointError, match=re.escape(told)) as raised:
        train_command(World.alone(), begun)
    assert raised.value.exit_code == 4


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(begun, tmp_path, monkeypatch) -> None:
    """Held-out losses of 3, 1, 2, 4: the second is the best, and outlives two newer ones."""
    losses_of(monkeypatch, 3.0, 1.0, 2.0, 4.0)
    settings = with_(
        begun,
        run="best",
        data={"eval": begun["data"]["train"]},
        eval={"every": 1},
        checkpoint={"every": 1, "keep": 1, "keep_best": True},
    )
    train_until_asked(Config.model_validate(settings), World.alone())
    folder = Path(begun["runs_dir"]) / "best"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    progress = read_manifest(folder / "checkpoints" / "step-00000004").progress
    assert (progress["best_step"], progress["best_loss"]) == (2, 1.0)
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    best = load_file(folder / "checkpoints" / "step-00000002" / "rank-00000-of-00001.safetensors")
    key = next(k for k in best if k.startswith("adapter/model.layers.0.self_attn.q_proj.lora_B"))
    gathered = found["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert gathered.flatten().equal(best[key])


def losses_of(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Have the evaluations to come find these held-out losses."""
    told = iter(losses)
    monkeypatch.setattr("dist_lora.train.evaluating.loss_of", lambda *a, **k: HeldOut(next(told), 10))


def evaluated(begun: Mapping[str, Any], **checkpoint: Any) -> dict[str, Any]:
    """The settings of a run that evaluates each of its steps on a file of its own."""
    path = Path(begun["runs_dir"]) / "eval.jsonl"
    path.write_text(say(range(6, 9)))
    return with_(
        begun, run="it", data={"eval": str(path)}, eval={"every": 1}, checkpoint={"every": 1, "keep": 1, **checkpoint}
    )


def test_the_best_step_is_forgotten_where_its_checkpoint_was_not_kept(begun, caplog, monkeypatch) -> None:
    shutil.rmtree(Path(begun["runs_dir"]) / "it")
    losses_of(monkeypatch, 1.0, 2.0, 4.0, 3.0)
    settings = evaluated(begun)
    assert "at step 2/4" in train_command(World.alone(), settings, 2)
    told = go_on(with_(settings, checkpoint={"keep_best": True}), caplog)
    why = "the checkpoint of step 1, the best until step 2, wasn't kept"
    assert told == [f"{why}: the best step is looked for anew from here on"]
    folder = Path(begun["runs_dir"]) / "it"
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"] and (folder / "adapter" / "adapter_model.safetensors").exists()


def test_with_other_held_out_samples_the_best_step_is_looked_for_anew(begun, caplog, monkeypatch) -> None:
    shutil.rmtree(Path(begun["runs_dir"]) / "it")
    losses_of(monkeypatch, 1.0, 2.0, 4.0, 3.0)
    settings = with_(evaluated(begun, keep_best=True), eval={"patience": 2})
    assert "at step 2/4" in train_command(World.alone(), settings, 2)
    Path(settings["data"]["eval"]).write_text(say(range(7, 10)))
    assert go_on(settings, caplog) == [
        "data.eval has other samples than before: the best step is looked for anew from here on"
    ]
    assert steps_of(begun) == [1, 2, 3, 4], "two evaluations that aren't lower than another set's loss end nothing"


def test_an_evaluation_is_recorded_before_a_checkpoint_says_that_it_was_done(begun, monkeypatch) -> None:
    shutil.rmtree(Path(begun["runs_dir"]) / "it")
    losses_of(monkeypatch, 1.0, 0.5, 0.5, 0.25, 0.2)
    settings = evaluated(begun, keep_best=True)
    full = SaveError("no space")

    def fail_at_step_2(self: Meter, step: int, *args: Any, **settings: Any) -> None:
        if step == 2:
            raise full
        record(self, step, *args, **settings)

    record = Meter.evaluated
    monkeypatch.setattr(Meter, "evaluated", fail_at_step_2)
    with pytest.raises(SaveError, match="no space"):
        train_command(World.alone(), settings)
    monkeypatch.setattr(Meter, "evaluated", record)
    train_command(World.alone(), settings)
    lines = (Path(begun["runs_dir"]) / "it" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("wanted", ["never", "a path"])
def test_a_job_that_is_requeued_goes_on_though_its_command_starts_over(wanted, begun, caplog, monkeypatch) -> None:
    folder = Path(begun["runs_dir"]) / "it"
    path = str(folder / "checkpoints" / "step-00000002") if wanted == "a path" else wanted
    settings = with_(begun, train={"steps": 6}, checkpoint={"resume": path, "every": 1, "keep": 9})
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    told = train_command(World.alone(), settings, 4)
    saved = f"{folder}/checkpoints/step-00000004"
    assert f"saved {saved}. The same command without checkpoint.resume={path} resumes from there, and so does" in told
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    caplog.set_level("INFO", logger="dist_lora")
    go_on(settings, caplog)
    assert f"resumed {saved}: step " in caplog.text
    assert steps_of(begun) == [1, 2, 3, 4, 5, 6]
    # A user's own start means what it says.
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert f"saved {saved}" in train_command(World.alone(), settings, 4)


def test_a_job_that_is_requeued_before_it_has_saved_starts_over_as_it_is_told(begun, caplog, monkeypatch) -> None:
    def no_memory(*args: Any, **settings: Any) -> None:
        raise WeightsError("the base is damaged")

    settings = with_(begun, checkpoint={"resume": "never"})
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with monkeypatch.context() as patched, pytest.raises(WeightsError):
        patched.setattr("dist_lora.train.command.build", no_memory)
        train_command(World.alone(), settings)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    caplog.set_level("INFO", logger="dist_lora")
    go_on(settings, caplog)
    assert "resumed" not in caplog.text and steps_of(begun) == [1, 2, 3, 4]


def test_records_of_a_run_that_starts_over_stay_until_its_base_is_loaded(begun, monkeypatch) -> None:
    def no_memory(*args: Any, **settings: Any) -> None:
        raise WeightsError("the base is damaged")

    monkeypatch.setattr("dist_lora.train.command.build", no_memory)
    with pytest.raises(WeightsError):
        train_command(World.alone(), with_(begun, checkpoint={"resume": "never"}))
    assert steps_of(begun) == [1, 2]
    monkeypatch.undo()
    train_command(World.alone(), begun)
    assert steps_of(begun) == [1, 2, 3, 4]


def test_a_disk_without_locks_is_told_with_what_to_do(begun, monkeypatch) -> None:
    def without(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("dist_lora.run_folder.folder.lock", without)
    with pytest.raises(
        ConfigError, match=r"runs_dir: .*/it: its file system gives no locks \(Function not implemented\)"
    ):
        train_command(World.alone(), begun)
