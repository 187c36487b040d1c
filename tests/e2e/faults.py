"""Faults that tests let into the ranks of a run: ``run(..., fault="name")`` calls the function of that name.

Each rank calls it before anything else, in a real run that a real launcher has started (see
``inject/sitecustomize.py``). Steps are counted from 1. What a test has to know of the fault is printed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_lora.base.stream import SliceReader
from dist_lora.checkpoint import write as write_module
from dist_lora.data import token_cache
from dist_lora.data.loader import Loader
from dist_lora.doctor import command
from dist_lora.train import build, evaluating
from dist_lora.train import command as train_command
from dist_lora.train import step as step_module
from tests.e2e import points
from tests.e2e.runs import fill_the_disk

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
LONG_S = 300.0  # longer than any test waits: who sleeps so long must be ended
BOOM = "the boom of a test"
now = {"step": 0}


def wrap(module: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *arguments)`` in the place of a function."""
    original = getattr(module, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(module, name, wrapped)


def count_steps() -> None:
    """Keep ``now["step"]`` as the step that is computed."""

    def batch(original: Callable[..., Any], self: Loader, step: int) -> Any:
        now["step"] = step + 1
        return original(self, step)

    wrap(Loader, "batch", batch)


def in_the_model(change: Callable[[Any], None]) -> None:
    """Change the model that is trained once it is built and filled."""

    def built(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        trainee = original(*arguments, **named)
        change(trainee.model)
        return trainee

    wrap(train_command, "build", built)


def before(module: Any, name: str, action: Callable[[], None], *, at_call: int = 1) -> None:
    """Do something before the ``at_call``-th call of a function."""
    calls = 0

    def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            action()
        return original(*arguments, **named)

    wrap(module, name, around)


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do something before the first forward of a step."""
    count_steps()
    done = []

    def forward(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if now["step"] == step and not done:
            done.append(step)
            action()
        return original(*arguments, **named)

    wrap(build.Trainee, "run", forward)


def tell(*words: object) -> None:
    """Print a line, whole though another rank prints at the same time."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def strike(action: Callable[[], None]) -> None:
    """Do something that ends this rank, or lets it hang, and print when."""
    tell(f"struck {time.time()}")
    action()


def boom() -> None:
    raise ValueError(BOOM)


def hang() -> None:
    time.sleep(LONG_S)


def signal_myself(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


# The numbers


def nan_in_the_loss_of_one_sample_of_rank_1() -> None:
    count_steps()
    done: list[int] = []

    def forward(original: Callable[..., Any], self: build.Trainee, batch: Any) -> Any:
        loss = original(self, batch)
        if RANK == 1 and now["step"] == 5 and not done:
            done.extend(batch.sample_ids)
            tell("poisoned", *done)
            return loss * torch.nan
        return loss

    wrap(build.Trainee, "run", forward)


def infinity_in_one_element_of_a_gradient() -> None:
    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if RANK == 1 and now["step"] == 3:
            gradient = gradient.clone()
            gradient.view(-1)[5] = torch.inf
        return gradient

    def batch(original: Callable[..., Any], self: Loader, step: int) -> Any:
        made = original(self, step)
        if RANK == 1 and step == 2:
            tell("poisoned", *made.sample_ids)
        return made

    count_steps()
    wrap(Loader, "batch", batch)
    in_the_model(lambda model: model.get_parameter("model.layers.1.mlp.up_proj.adapter.lora_B").register_hook(poison))


def input_of_layer_2_detached() -> None:
    def detach(module: Any, arguments: Any) -> Any:
        return (arguments[0].detach(), *arguments[1:])

    in_the_model(lambda model: model.blocks()[2].register_forward_pre_hook(detach))


def gradients_told() -> None:
    """Print, for each rank and step, which adapter tensors' gradients have a norm above 0."""
    reached: set[str] = set()

    def note(name: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            if gradient.norm() > 0:
                reached.add(name)

        return hook

    def hooked(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(note(name))

    def step_done(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        halves = {half: sum(name.endswith(half) for name in reached) for half in ("lora_A", "lora_B")}
        tell(f"rank {RANK} step {now['step']} reached {halves['lora_A']} {halves['lora_B']}")
        reached.clear()
        return original(*arguments, **named)

    count_steps()
    in_the_model(hooked)
    wrap(step_module, "lr_at", step_done)


# A rank that raises while the other waits for it, or is busy for long


def boom_of_rank_1_in_step_3() -> None:
    if RANK == 1:
        at_step(3, lambda: strike(boom))


def _boom_of_rank_1_while_rank_0_is_busy(module: Any, name: str) -> None:
    before(module, name, (lambda: strike(boom)) if RANK == 1 else hang)


def boom_while_the_other_tokenizes() -> None:
    _boom_of_rank_1_while_rank_0_is_busy(token_cache, "encode_sample")


def boom_while_the_other_loads() -> None:
    _boom_of_rank_1_while_rank_0_is_busy(build, "fill_slots")


def boom_while_the_other_evaluates() -> None:
    _boom_of_rank_1_while_rank_0_is_busy(evaluating, "loss_of")


def boom_while_the_other_saves() -> None:
    _boom_of_rank_1_while_rank_0_is_busy(write_module, "_write_file")


def _term_of_rank_1_while_it_evaluates(step: int) -> None:
    """In the second micro-batch of its evaluation."""
    if RANK != 1:
        return
    count_steps()
    evaluated = []

    def run(original: Callable[..., Any], trainee: Any, *arguments: Any) -> Any:
        if not trainee.model.training and now["step"] == step:
            evaluated.append(step)
            if len(evaluated) == 2:
                signal_myself(signal.SIGTERM)
        return original(trainee, *arguments)

    wrap(build.Trainee, "run", run)


def term_of_rank_1_in_the_evaluation_of_step_4() -> None:
    _term_of_rank_1_while_it_evaluates(4)


def term_of_rank_1_in_the_evaluation_of_step_8() -> None:
    _term_of_rank_1_while_it_evaluates(8)


# Ranks that are killed, hang, lose each other


def kill_of_rank_1_while_the_other_waits_for_its_share() -> None:
    if RANK == 1:
        before(write_module, "_write_file", lambda: strike(lambda: signal_myself(signal.SIGKILL)), at_call=3)


def hang_of_rank_1_in_the_data_of_step_3() -> None:
    if RANK == 1:
        before(Loader, "batch", lambda: strike(hang), at_call=3)


def hang_of_rank_1_in_the_forward_of_step_3() -> None:
    if RANK == 1:
        at_step(3, lambda: strike(hang))


def hang_of_rank_1_within_a_forward() -> None:
    """After some layers: the other rank waits in the middle of the same micro-batch."""

    def stuck(module: Any, arguments: Any) -> None:
        if now["step"] == 3:
            strike(hang)

    if RANK == 1:
        count_steps()
        in_the_model(lambda model: model.blocks()[1].register_forward_pre_hook(stuck))


def hang_of_rank_1_in_the_save_of_step_4() -> None:
    def write(original: Callable[..., Any], path: Path, share: Any, step: int, **named: Any) -> Any:
        if step == 4:
            strike(hang)
        return original(path, share, step, **named)

    if RANK == 1:
        wrap(write_module, "_write_file", write)


def hang_of_rank_1_that_lets_nothing_else_run() -> None:
    """A call into C that keeps the interpreter's lock: no thread of Python gets to run."""
    if RANK == 1:
        at_step(3, lambda: strike(lambda: ctypes.PyDLL(None).sleep(int(LONG_S))))


def stop_of_rank_1() -> None:
    if RANK == 1:
        at_step(3, lambda: strike(lambda: signal_myself(signal.SIGSTOP)))


def kill_of_rank_1_in_step_3() -> None:
    if RANK == 1:
        at_step(3, lambda: strike(lambda: signal_myself(signal.SIGKILL)))


# A rank without memory


def memory_refused_to_rank_1_in_step_3() -> None:
    """The host refuses a tensor of 4 TB."""
    if RANK == 1:
        at_step(3, lambda: strike(lambda: torch.empty(10**12).fill_(1)))


def memory_filled_by_rank_1_in_step_3() -> None:
    """Far more than a control group of a few GiB allows."""
    if RANK == 1:
        at_step(3, lambda: strike(lambda: bytearray(b"x") * 2**34))


def memory_refused_to_python_while_loading() -> None:
    if RANK == 1:
        before(build, "fill_slots", lambda: strike(lambda: bytearray(2**46)))


# Requests to stop


def request_to_rank_1_in_step_3_and_to_the_launcher_in_step_6() -> None:
    """A run that goes on after the first request meets the second one."""
    if RANK == 1:
        at_step(3, lambda: signal_myself(signal.SIGUSR1))
        at_step(6, ask_the_launcher)


def request_to_the_launcher_in_step_3() -> None:
    if RANK == 1:
        at_step(3, ask_the_launcher)


def hangup_of_the_launcher_in_step_3() -> None:
    if RANK == 1:
        at_step(3, lambda: ask_the_launcher(signal.SIGHUP))


def ask_the_launcher(number: int = signal.SIGTERM) -> None:
    """Ask the process that started the ranks to stop, and go on once it has passed that on to this one."""
    passed_on = signal.getsignal(signal.SIGTERM).__self__  # type: ignore[union-attr]
    os.kill(os.getppid(), number)
    while not passed_on.reason(needed_s=0):
        time.sleep(0.01)


def request_to_rank_1_while_the_other_loads() -> None:
    before(build, "fill_slots", (lambda: strike(lambda: signal_myself(signal.SIGUSR1))) if RANK == 1 else hang)


# What is no fault


def bytes_of_the_network_told() -> None:
    """Each rank notes what its host had sent before each step, in a file of its own in the folder ``NOTED``."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    noted = Path(os.environ["NOTED"]) / f"rank-{RANK}"

    def batch(original: Callable[..., Any], self: Loader, step: int) -> Any:
        with noted.open("a") as file:
            file.write(f"{step} {counter.read_text().strip()} {time.time()}\n")
        return original(self, step)

    wrap(Loader, "batch", batch)


def slow_steps_of_rank_1() -> None:
    """Each micro-batch of rank 1 takes more than half of the timeout longer than the other's, each step more than all of it."""
    if RANK == 1:
        wrap(build.Trainee, "run", lambda original, *arguments: (time.sleep(3), original(*arguments))[1])


def slow_steps_until_slurm_starts_it_again() -> None:
    if "SLURM_RESTART_COUNT" not in os.environ:
        wrap(build.Trainee, "run", lambda original, *arguments: (time.sleep(0.1), original(*arguments))[1])


def slow_phases() -> None:
    """Tokenizing, loading, evaluating and the first save of rank 1, and the gathering of rank 0, take 15 s and more each.

    They get on meanwhile: a sample, a slice, a pass, a write or a file at a time. What was slept is printed.
    """

    def slowed(phase: str, pause_s: float) -> None:
        tell(f"slept {phase} {pause_s}")
        time.sleep(pause_s)

    def slow(
        module: Any, name: str, phase: str, pause_s: float, is_here: Callable[..., bool] = lambda *_: True
    ) -> None:
        def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            if is_here(*arguments):
                slowed(phase, pause_s)
            return original(*arguments, **named)

        wrap(module, name, around)

    first_saved: list[str] = []

    def is_first_save(descriptor: int, *_: Any) -> bool:
        found = points.PARTIAL.search(points.path_of(descriptor, {}))
        if found is not None:
            first_saved.append(found[0])
        return found is not None and found[0] == first_saved[0]

    def is_adapter(path: Any, *_: Any) -> bool:
        return points.GATHERED.search(points.path_of(path, {})) is not None

    if RANK == 1:
        slow(token_cache, "encode_sample", "tokenizing", 1.3)
        slow(SliceReader, "_read", "loading", 0.8)
        slow(build.Trainee, "run", "evaluating", 2.7, lambda trainee, *_: not trainee.model.training)
        slow(os, "write", "saving", 0.4, is_first_save)
    else:
        for name in ("mkdir", "fsync", "rename"):
            slow(os, name, "gathering", 2.15, is_adapter)


# A full disk


def disk_full_for_rank_0() -> None:
    _disk_full_in_step_4(rank=0)


def disk_full_for_rank_1() -> None:
    _disk_full_in_step_4(rank=1)


def _disk_full_in_step_4(*, rank: int) -> None:
    """The disk of the run fills up to its last byte after the other rank has written its share, before ``rank`` does."""

    def write(original: Callable[..., Any], path: Path, share: Any, step: int, **named: Any) -> Any:
        runs = path.parents[3]
        if step == 4 and rank == RANK:
            while not (runs / "other-is-done").exists():
                time.sleep(0.01)
            strike(lambda: fill_the_disk(runs / "ballast"))
        entry = original(path, share, step, **named)
        if step == 4:
            (runs / "other-is-done").touch()
        return entry

    wrap(write_module, "_write_file", write)


# Kills at a point that is told by the environment


def killed_at_a_point() -> None:
    points.arm()


# A disk that refuses


def fail(module: Any, name: str, error: int, is_here: Callable[[str], bool]) -> None:
    """Let a call to the system fail with ``error`` where the path of its first argument is meant, as the system does."""

    def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        path = points.path_of(arguments[0], named)
        if is_here(path):
            tell(f"struck {time.time()}")
            raise OSError(error, os.strerror(error), None if isinstance(arguments[0], int) else path)
        return original(*arguments, **named)

    wrap(module, name, around)


def fsync_fails_for_rank_0() -> None:
    if RANK == 0:
        fail(
            os, "fsync", errno.EIO, lambda path: path.endswith(".step-00000004.partial/rank-00000-of-00002.safetensors")
        )


def fsync_fails_for_rank_1() -> None:
    if RANK == 1:
        fail(
            os, "fsync", errno.EIO, lambda path: path.endswith(".step-00000004.partial/rank-00001-of-00002.safetensors")
        )


def fsync_of_the_folder_fails() -> None:
    """That of ``checkpoints``, once the checkpoint of step 4 has its name in it."""
    if RANK == 0:
        fail(
            os, "fsync", errno.EIO, lambda path: path.endswith("/checkpoints") and Path(path, "step-00000004").exists()
        )


def rename_fails() -> None:
    if RANK == 0:
        fail(os, "rename", errno.EIO, lambda path: path.endswith("/.step-00000004.partial"))


def write_fails_for_rank_1() -> None:
    if RANK == 1:
        fail(os, "write", errno.EIO, lambda path: "/.step-00000004.partial/" in path)


def fsync_of_the_adapter_fails() -> None:
    if RANK == 0:
        fail(os, "fsync", errno.EIO, lambda path: "/.adapter.partial" in path)


def _once_step_2_is_saved(action: Callable[[Path], object]) -> None:
    """Let the first rank do something to ``checkpoints`` in step 3, when no save is under way."""

    def strike_there() -> None:
        checkpoints = run_folder() / "checkpoints"
        while not (checkpoints / "step-00000002").exists() or any(checkpoints.glob(".*")):
            time.sleep(0.01)
        strike(lambda: action(checkpoints))

    if RANK == 0:
        at_step(3, strike_there)


def checkpoints_read_only_in_step_3() -> None:
    """``checkpoints`` is a file system of its own, on which nobody may write from now on."""
    _once_step_2_is_saved(lambda path: subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True))


def checkpoints_gone_in_step_3() -> None:
    _once_step_2_is_saved(lambda path: path.rename(path.with_name("elsewhere")))


def checkpoints_gone_in_the_save_of_step_4() -> None:
    def gone(original: Callable[..., Any], path: Path, share: Any, step: int, **named: Any) -> Any:
        if step == 4:
            strike(lambda: shutil.rmtree(path.parents[1]))
        return original(path, share, step, **named)

    if RANK == 1:
        wrap(write_module, "_write_file", gone)


def run_folder() -> Path:
    """The folder of this run, by the lock that its first rank holds."""
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    [lock] = {path for path in held if path.endswith("/lock")}
    return Path(lock).parent


def hang_in_links() -> None:
    """A rank that never begins with the measuring of the links."""
    wrap(command, "measure_links", lambda original, *arguments, **named: time.sleep(LONG_S))


def gone_in_links() -> None:
    """A rank that ends there without a word."""
    wrap(command, "measure_links", lambda original, *arguments, **named: os._exit(9))
