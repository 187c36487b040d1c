"""Whatever goes wrong in a run is told once, with the right exit code; all ranks end, and the same command goes on."""

from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_lora.checkpoint.read import verify
from dist_lora.data.loader import Loader
from tests.e2e.runs import ROOT, Done, command, fill_the_disk, losses, run, run_each_rank, run_under_torchrun

DEADLINE_S = 30.0  # from the fault to the end of all
BOOM = "the boom of a test"
RANK_1 = f"error: rank 1 of 2 on {socket.gethostname()}: "


def folder_of(config: Path, name: str) -> Path:
    return config.parent / "runs" / name


def checkpoints(folder: Path) -> list[str]:
    """Everything that lies among a run's checkpoints, hidden or not."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_ended_in_time(done: Done) -> None:
    struck = re.findall(r"struck ([0-9.]+)", done.stdout)
    assert len(struck) == 1, done.stdout
    assert done.ended - float(struck[0]) < DEADLINE_S


def assert_told_once(done: Done, code: int, *told: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert all(text in done.stderr for text in told), done.stderr


def tensors_of(folder: Path) -> Iterator[torch.Tensor]:
    for path in folder.rglob("*.safetensors"):
        yield from load_file(path).values()


# Numbers


def test_a_nan_in_the_loss_of_one_sample_stops_all_ranks_and_leaves_no_trace(config) -> None:
    arguments = ("train", config, "run=nan", "train.packing=false")
    codes, done = run_each_rank(*arguments, fault="nan_in_the_loss_of_one_sample_of_rank_1")
    assert codes == [1, 1], done.stderr
    folder = folder_of(config, "nan")
    [sample] = re.findall(r"poisoned (\d+)\n", done.stdout)
    last = folder / "checkpoints" / "step-00000004"
    assert_told_once(
        done, 1, f"{RANK_1}step 5: the loss of sample {sample} is not finite.", f"The last checkpoint is {last}."
    )
    assert "Traceback" not in done.stderr
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert all(math.isfinite(loss) for _, loss in losses(folder))
    assert checkpoints(folder) == ["step-00000002", "step-00000004"]
    verify(last)
    found = list(tensors_of(folder))
    assert found and all(tensor.isfinite().all() for tensor in found)


def test_infinity_in_one_element_of_one_gradient_stops_all_ranks(config) -> None:
    done = run("train", config, "run=inf", "--nproc", 2, fault="infinity_in_one_element_of_a_gradient")
    folder = folder_of(config, "inf")
    [samples] = re.findall(r"poisoned ([\d ]+)\n", done.stdout)
    assert_told_once(
        done,
        1,
        "error: step 3: the gradient is not finite (its norm is inf, the loss",
        f"of samples {samples.replace(' ', ', ')}",
        f"The last checkpoint is {folder / 'checkpoints' / 'step-00000002'}.",
    )
    assert "Traceback" not in done.stderr
    assert [step for step, _ in losses(folder)] == [1, 2]
    assert checkpoints(folder) == ["step-00000000", "step-00000002"]
    verify(folder / "checkpoints" / "step-00000002")
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder))


def test_adapters_behind_a_cut_graph_are_named_in_the_first_step(config, tiny_llama) -> None:
    deep = f"model.name={tiny_llama('llama31', num_layers=4)}"
    arguments = ("train", config, "run=cut", deep, "train.activation_checkpointing=true", "--nproc", 2)
    done = run(*arguments, fault="input_of_layer_2_detached")
    assert_told_once(done, 1, "step 1: 14 of 28 lora_B tensors got no gradient", "got no gradient, in layers 0-1: ",
                     "model.layers.0.self_attn.q_proj.lora_B")  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "layers.2" not in done.stderr and "layers.3" not in done.stderr
    assert checkpoints(folder_of(config, "cut")) == ["step-00000000"]


def test_every_b_has_a_gradient_after_the_first_step_and_every_a_after_the_second(config) -> None:
    arguments = ("train", config, "run=reached", "train.activation_checkpointing=true", "train.steps=2", "--nproc", 2)
    done = run(*arguments, fault="gradients_told")
    assert done.returncode == 0, done.stderr
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert told == [f"rank {rank} step {step} reached {a} 14" for rank in (0, 1) for step, a in ((1, 0), (2, 14))]


# Errors of one rank


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("boom_of_rank_1_in_step_3", "step 3, micro-batch 1 of 2"),
        pytest.param("boom_while_the_other_tokenizes", "tokenizing data.train", marks=pytest.mark.turn(of=2)),
        pytest.param("boom_while_the_other_loads", "loading the base", marks=pytest.mark.turn(of=2)),
        pytest.param("boom_while_the_other_evaluates", "step 2, evaluating", marks=pytest.mark.turn(of=2)),
        pytest.param("boom_while_the_other_saves", "saving the checkpoint of step 0", marks=pytest.mark.turn(of=2)),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_told_once_with_rank_host_and_phase(
    fault, phase, config, tmp_path
) -> None:
    cache = f"data.cache_dir={tmp_path}"
    arguments = ("train", config, f"run={fault}", cache, "data.eval=0.2", "eval.every=2")
    codes, done = run_each_rank(*arguments, fault=fault)
    assert codes == [1, 1], done.stderr
    told = f"{RANK_1[:-2]}, {phase}: ValueError: {BOOM}\nTraceback (most recent call last):\n"
    assert_told_once(done, 1, told)
    assert done.stderr.count(BOOM) == 1, done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert_ended_in_time(done)
    folder = folder_of(config, fault) / "checkpoints"
    assert not [path for path in folder.glob("step-*") if path.name not in ("step-00000000", "step-00000002")]


@pytest.mark.turn(of=3, among="faults")
def test_an_error_of_one_rank_under_torchrun_is_told_once(config) -> None:
    done = run_under_torchrun("train", config, "run=boom-torchrun", fault="boom_of_rank_1_in_step_3")
    assert done.returncode == 1
    # By us, and by torchrun, below the stack of its own.
    said = f"{RANK_1[:-2]}, step 3, micro-batch 1 of 2: ValueError: {BOOM}"
    assert done.stderr.count(said) == done.stderr.count(BOOM) == 2, done.stderr
    assert said in done.stderr.partition("Failures:")[2] + done.stderr.partition("Root Cause")[2], done.stderr


# Ranks that are gone


@pytest.mark.turn(of=3, among="faults")
def test_a_rank_killed_while_the_other_waits_for_what_it_writes_ends_both(config) -> None:
    fault = "kill_of_rank_1_while_the_other_waits_for_its_share"
    done = run("train", config, "run=kill-save", "--nproc", 2, fault=fault)
    assert_told_once(
        done,
        1,
        "error: rank 1 of 2 was killed by SIGKILL; the other ranks were terminated. ",
        " (oom_kill). The ranks held at most ",
        " GiB; the host has ",
    )
    assert_ended_in_time(done)
    folder = folder_of(config, "kill-save")
    assert [name for name in checkpoints(folder) if name.startswith("step-")] == ["step-00000000", "step-00000002"]
    verify(folder / "checkpoints" / "step-00000002")


# Requests to stop


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_twice_is_the_run_that_nothing_interrupted(config, whole) -> None:
    folder = folder_of(config, "asked")
    fault = "request_to_rank_1_in_step_3_and_to_the_launcher_in_step_6"

    def assert_stopped(done: Done, step: int, whom: str) -> None:
        saved = folder / "checkpoints" / f"step-{step:08d}"
        told = f"interrupted by {whom} at step {step}/8; saved {saved}. The same command resumes from there.\n"
        assert done.stderr.count(told) == 1 and done.stderr.count("interrupted") == 1, done.stderr
        assert "error" not in done.stderr
        verify(saved)
        assert losses(folder) == losses(whole)[:step]

    codes, done = run_each_rank("train", config, "run=asked", fault=fault)
    assert codes == [75, 75], done.stderr
    assert_stopped(done, 3, "SIGUSR1 on rank 1")
    done = run("train", config, "run=asked", "--nproc", 2, fault=fault)
    assert done.returncode == 75, done.stderr
    assert_stopped(done, 6, "SIGTERM on rank 0")
    done = run("train", config, "run=asked", "--nproc", 2, fault=fault)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.turn(of=3, among="faults")
def test_a_request_to_torchrun_is_obeyed_by_its_ranks_and_the_run_goes_on_under_ours(config, whole) -> None:
    done = run_under_torchrun("train", config, "run=asked-torchrun", fault="request_to_the_launcher_in_step_3")
    folder = folder_of(config, "asked-torchrun")
    saved = folder / "checkpoints" / "step-00000003"
    assert done.returncode == 1  # torchrun's own: it hands on no exit code of its ranks
    assert done.stderr.count("interrupted by SIGTERM on rank 0 at step 3/8; saved ") == 1, done.stderr
    verify(saved)
    done = run("train", config, "run=asked-torchrun", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.turn(of=3, among="faults")
def test_a_terminal_that_hangs_up_is_a_request_to_the_launcher_too(config) -> None:
    done = run("train", config, "run=hung-up", "--nproc", 2, fault="hangup_of_the_launcher_in_step_3")
    assert done.returncode == 75, done.stderr
    assert "interrupted by SIGHUP on rank 0 at step 3/8" in done.stderr
    assert (folder_of(config, "hung-up") / "checkpoints" / "step-00000003" / "manifest.json").exists()


@pytest.mark.turn(of=3, among="faults")
def test_a_request_to_one_rank_that_loads_ends_all_with_75(config, whole) -> None:
    fault = "request_to_rank_1_while_the_other_loads"
    codes, done = run_each_rank("train", config, "run=asked-early", fault=fault)
    assert codes == [75, 75], done.stderr
    told = "interrupted by SIGUSR1 outside of a training step: nothing is lost, and the same command resumes the run.\n"
    assert done.stderr.count(told) == done.stderr.count("interrupted") == 1, done.stderr
    assert "error" not in done.stderr
    assert_ended_in_time(done)


@pytest.mark.turn(of=3, among="faults")
def test_a_request_to_the_launcher_before_its_ranks_listen_ends_all_with_75(config) -> None:
    started = subprocess.Popen(
        command("train", config, "run=asked-at-once", "--nproc", 2), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while len(children.read_text().split()) < 2:
        assert started.poll() is None
    started.terminate()
    assert started.stderr is not None
    told = started.stderr.read()
    assert started.wait(DEADLINE_S) == 75, told
    assert told == "interrupted by SIGTERM: nothing is lost, and the same command resumes the run.\n"


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """The arguments of a run that evaluates after steps 4 and 8, and the folder of one that nothing interrupted."""
    cache = tmp_path_factory.mktemp("cache")
    arguments = ("train", config, f"data.cache_dir={cache}", "data.eval=0.5", "eval.every=4", "eval.batch=1",
                 "train.packing=false", "checkpoint.every=3", "checkpoint.keep_best=true", "--nproc", 2)  # fmt: skip
    done = run(*arguments, "run=evaluated")
    assert done.returncode == 0, done.stderr
    return arguments, folder_of(config, "evaluated")


@pytest.mark.turn(of=3, among="faults")
@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_is_stopped_in_an_evaluation_leaves_it_and_the_next_start_makes_up_for_it(
    step, config, evaluated
) -> None:
    arguments, whole = evaluated
    name, fault = f"left-{step}", f"term_of_rank_1_in_the_evaluation_of_step_{step}"
    done = run(*arguments, f"run={name}", fault=fault)
    folder = folder_of(config, name)
    assert done.returncode == 75, done.stderr
    assert (
        f"interrupted by SIGTERM on rank 1 at step {step}/8; saved" in done.stderr and f"step-{step:08d}" in done.stderr
    )
    evaluations = (whole / "evaluations.jsonl").read_text()
    left = folder / "evaluations.jsonl"
    assert (left.read_text() if left.exists() else "") == "".join(
        evaluations.splitlines(keepends=True)[: step // 4 - 1]
    )
    done = run(*arguments, f"run={name}")
    assert done.returncode == 0, done.stderr
    assert left.read_text() == evaluations and evaluations.count("\n") == 2
    assert [number for number, _ in losses(folder)] == list(range(1, 9))
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (folder / adapter).read_bytes() == (whole / adapter).read_bytes()


# Slowness, which is no fault


@pytest.mark.turn(of=4)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_phases_of_three_times_the_timeout_in_which_one_rank_gets_on_end_no_run(engine, config, tmp_path) -> None:
    arguments = ("train", config, f"run=slow-{engine}", f"data.cache_dir={tmp_path}", f"parallel.engine={engine}",
                 "data.eval=0.5", "train.packing=false", "checkpoint.every=1000", "eval.every=1000")  # fmt: skip
    timeout_s = 5
    done = run(*arguments, f"parallel.hang_timeout={timeout_s}", "--nproc", 2, fault="slow_phases", timeout_s=600)
    assert done.returncode == 0, done.stderr
    slept: Counter[str] = Counter()
    for phase, pause_s in re.findall(r"slept (\w+) ([0-9.]+)", done.stdout):
        assert float(pause_s) < timeout_s
        slept[phase] += float(pause_s)
    assert set(slept) == {"tokenizing", "loading", "evaluating", "saving", "gathering"}
    assert all(seconds >= 3 * timeout_s for seconds in slept.values()), slept
    assert [step for step, _ in losses(folder_of(config, f"slow-{engine}"))] == list(range(1, 9))


# Full disks


@pytest.mark.turn(of=4)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_up_in_a_save_ends_all_ranks_and_the_same_command_goes_on(
    rank, config, whole, small_disk, here
) -> None:
    arguments = ("train", config, "run=full", f"runs_dir={small_disk}")
    codes, done = run_each_rank(*arguments, fault=f"disk_full_for_rank_{rank}")
    assert codes == [1, 1], done.stderr
    folder = small_disk / "full"
    name = f".step-00000004.partial/rank-{rank:05d}-of-00002.safetensors"
    assert_told_once(
        done,
        1,
        RANK_1 if rank else "error: ",
        f"{folder}/checkpoints/{name}: No space left on device (ENOSPC) while saving the checkpoint of step 4",
        "0 bytes are free",
    )
    assert "Traceback" not in done.stderr
    assert_ended_in_time(done)
    assert checkpoints(folder) == ["step-00000000", "step-00000002"]
    verify(folder / "checkpoints" / "step-00000002")
    fill_the_disk(small_disk / "more")  # what the partial checkpoint took is free again
    still_full = here("train", config, "run=full", f"runs_dir={small_disk}")
    assert_told_once(still_full, 1, f"error: {folder}/config.yaml: can't be written: No space left on device")
    assert "Traceback" not in still_full.stderr
    (small_disk / "ballast").unlink()
    (small_disk / "more").unlink()
    done = run(*arguments, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "step-00000002: step 2 of 8" in done.stderr
    assert losses(folder) == losses(whole)


def test_a_disk_without_room_for_a_checkpoint_is_told_with_both_numbers(config, small_disk, here) -> None:
    (small_disk / "ballast").write_bytes(b"x" * (4 * 2**20 - 100_000))
    done = here("train", config, "run=full", f"runs_dir={small_disk}")
    assert_told_once(
        done, 3, f"{small_disk}/full/checkpoints: 3 checkpoints of ", "(2 to keep and one being written) need ",
        " free and 0 in older ones. Free disk space, set checkpoint.keep lower, or set runs_dir elsewhere.",
    )  # fmt: skip
    assert not (small_disk / "full" / "checkpoints").exists()
    assert losses(small_disk / "full") == []


@pytest.mark.parametrize("trackers", ["[]", "[tensorboard]"])
def test_a_disk_that_is_full_when_a_step_is_written_down_is_told(
    trackers, config, small_disk, here, monkeypatch
) -> None:
    batch = Loader.batch

    def fill(self, step):
        if step == 2:
            fill_the_disk(small_disk / "ballast")
        return batch(self, step)

    monkeypatch.setattr(Loader, "batch", fill)
    arguments = ("run=full", f"runs_dir={small_disk}", f"log.trackers={trackers}", "train.steps=200")
    done = here("train", config, *arguments, "checkpoint.every=1000")
    assert_told_once(
        done, 1, f"error: {small_disk}/full/metrics.jsonl: step ", "can't be written: No space left on device"
    )
    assert "Traceback" not in done.stderr
    dropped = re.findall(r"log.trackers: tensorboard failed at step \d+ and is dropped: \[Errno 28\]", done.stderr)
    assert len(dropped) == (trackers == "[tensorboard]"), done.stderr


# Damaged checkpoints


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A copy of the last checkpoint of the whole run, to be damaged."""
    return shutil.copytree(whole / "checkpoints" / "step-00000008", tmp_path / "step-00000008")


def without_a_moment(folder: Path) -> str:
    """Take one moment out of a shard; returns its key."""
    path = folder / "rank-00001-of-00002.safetensors"
    kept = load_file(path)
    key = next(key for key in kept if key.startswith("exp_avg_sq/"))
    del kept[key]
    save_file(kept, path)
    return key


@pytest.mark.slow
def test_resuming_a_damaged_checkpoint_by_name_is_refused(config, damaged, here) -> None:
    path = damaged / "rank-00000-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = here("train", config, "run=named", f"checkpoint.resume={damaged}")
    assert_told_once(done, 4, f"error: {damaged} is damaged: {path.name} has the checksum ")
    assert "loaded base" not in done.stderr


@pytest.mark.slow
def test_resuming_a_checkpoint_that_lacks_a_moment_names_it(config, damaged, here) -> None:
    key = without_a_moment(damaged)
    _, tensor, part = key.split("/")
    done = here("train", config, "run=lacking", f"checkpoint.resume={damaged}")
    assert_told_once(
        done,
        4,
        f"error: {damaged} is damaged: rank-00001-of-00002.safetensors has ",
        f"it lacks exp_avg_sq of {tensor} (elements {part})",
    )


@pytest.mark.slow
def test_a_run_whose_only_checkpoint_lacks_a_moment_names_it_on_two_ranks_once(config, damaged) -> None:
    folder = folder_of(config, "only")
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(damaged, folder / "checkpoints" / damaged.name)
    tensor = without_a_moment(folder / "checkpoints" / damaged.name).split("/")[1]
    done = run("train", config, "run=only", "--nproc", 2)
    assert_told_once(
        done, 4, f"error: no checkpoint of {folder / 'checkpoints'} is intact: ", f"it lacks exp_avg_sq of {tensor} ("
    )
    assert "Traceback" not in done.stderr
