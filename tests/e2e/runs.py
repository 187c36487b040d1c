"""Starting the commands as a user types them, and reading what they left behind."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import yaml

from tests import ROOT
from tests.e2e.starter import AT_START, FOR_ZERO3, IMPORTED, Starter

INJECT = Path(__file__).parent / "inject"


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    ended: float = 0.0  # seconds since 1970


def command(*arguments: object) -> list[str]:
    """``dist-lora ARGUMENTS`` for a process of its own."""
    return [sys.executable, "-m", "dist_lora", *map(str, arguments)]


def environment(fault: str | None = None) -> dict[str, str]:
    """This process's environment; with ``fault`` the ranks started in it begin with that function of ``faults.py``."""
    added = {"PYTHONPATH": os.pathsep.join([str(INJECT), str(ROOT)]), "DIST_LORA_FAULT": fault} if fault else {}
    return {**os.environ, **added}


def run(
    *arguments: object,
    fault: str | None = None,
    timeout_s: float = 300,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    is_executed: bool = False,
) -> Done:
    """Run ``dist-lora ARGUMENTS`` in processes of its own to its end.

    They are forked from one that has the imports behind it (see ``starter.py``), but for those with an environment,
    ``env``, in the place of this one's, and those of which ``is_executed`` says so: these begin as a user's do.
    """
    if env is None and not is_executed:
        return run_processes([(arguments, {})], fault=fault, timeout_s=timeout_s, input=input)[1]
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(fault) if env is None else env,
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, ended=time.time())


def run_each_rank(*arguments: object, fault: str | None = None, timeout_s: float = 120) -> tuple[list[int], Done]:
    """Run ``dist-lora ARGUMENTS`` as two ranks that nobody sees through: each has to end by itself.

    Returns the exit codes, and all that was printed with the largest of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DIST_LORA_RENDEZVOUS": f"{folder}/rendezvous"}
        ranks = [(arguments, launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        return run_processes(ranks, fault=fault, timeout_s=timeout_s)


def run_processes(
    processes: Sequence[tuple[Sequence[object], Mapping[str, str]]],
    *,
    fault: str | None = None,
    timeout_s: float = 120,
    input: str | None = None,
) -> tuple[list[int], Done]:
    """Run ``dist-lora`` once for each of these arguments and added environments, at once, to the end of all.

    Returns the exit codes, and all that was printed with the largest of them.
    """
    started = [Process(*arguments, fault=fault, added=added, input=input) for arguments, added in processes]
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as ends:
        for process in started:
            ends.callback(process.close)
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
        ended = time.time()
        out, err = ("".join(getattr(process, name)() for process in started) for name in ("stdout", "stderr"))
        assert None not in codes, f"no end within {timeout_s} s:\n{out}{err}"
    return [code for code in codes if code is not None], Done(max(codes), out, err, ended)


class Process:
    """``dist-lora ARGUMENTS`` under way: a fork, unless its environment differs in what an import may look at."""

    def __init__(
        self,
        *arguments: object,
        fault: str | None = None,
        added: Mapping[str, str] = MappingProxyType({}),
        input: str | None = None,
    ) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(3)]  # noqa: SIM115  # not pipes, which can be full
        stdin, stdout, stderr = self._files
        stdin.write(input or "")
        stdin.seek(0)
        is_forking = may_fork({**os.environ, **added})
        starter = starter_of(is_forking, is_forking and "parallel.engine=zero3" in arguments)
        env = environment(fault) | dict(added)
        self._start = starter.start(*arguments, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        self.pid, self.ranks, self.wait = self._start.pid, self._start.ranks, self._start.wait

    def stdout(self) -> str:
        """What it has printed until now."""
        return self._text(1)

    def stderr(self) -> str:
        """What it has told until now."""
        return self._text(2)

    def _text(self, number: int) -> str:
        return Path(f"/proc/self/fd/{self._files[number].fileno()}").read_text()

    def close(self) -> None:
        """End whatever is left of it."""
        self._start.close()
        for file in self._files:
            file.close()


# What is looked at when a command begins, whatever was imported before; and what torch 2.13 sets at its import.
LOOKED_AT_LATE = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|(DIST_LORA|PYTEST)_\w+"
    r"|PYTORCH_NVML_BASED_CUDA_CHECK|TORCHINDUCTOR_CACHE_DIR"
)


def may_fork(env: Mapping[str, str]) -> bool:
    """Whether a process that has imported all in the environment of this process's start can begin in this one."""
    differing = {name for name in env.keys() | AT_START.keys() if env.get(name) != AT_START.get(name)}
    return all(LOOKED_AT_LATE.fullmatch(name) for name in differing)


@functools.cache
def starter_of(is_forking: bool, has_deepspeed: bool) -> Starter:
    """A process that starts commands, for all tests of this run."""
    if has_deepspeed:
        starter = Starter(FOR_ZERO3, grown_from=starter_of(True, False))
    else:
        starter = Starter(IMPORTED if is_forking else ())
    atexit.register(starter.close)
    return starter


def run_under_torchrun(*arguments: object, fault: str | None = None, timeout_s: float = 300) -> Done:
    """Run ``dist-lora ARGUMENTS`` as two ranks that torchrun starts and sees through."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dist_lora",
         *map(str, arguments)],
        cwd=ROOT, env=environment(fault), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr, ended=time.time())


def free_port() -> int:
    """One that nobody listens on, of those that no connection of another test takes by chance (from 32768)."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def write_config(path: Path, **settings: object) -> Path:
    """A config file with these settings."""
    path.write_text(yaml.safe_dump(settings))
    return path


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats_config(
    folder: Path,
    model: Path,
    *,
    sequence_length: int = 64,
    lora: Mapping[str, Any] = MappingProxyType({}),
    optim: Mapping[str, Any] = MappingProxyType({}),
    unfreeze: Mapping[str, Any] | None = None,
    **data: Any,
) -> Path:
    """A config, in ``folder``, that trains ``model`` on 24 chats, or on other ``data``; its run is called whole."""
    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 5 + 1)}]}
        for i in range(24)
    ]
    train = write_lines(folder / "train.jsonl", chats)
    return write_config(
        folder / "config.yaml",
        run="whole",
        runs_dir=str(folder / "runs"),
        model={"name": str(model)},
        lora={"rank": 4, **lora},
        data={"train": str(train), "cache_dir": str(folder / "cache"), **data},
        train={"steps": 8, "global_batch": 4, "micro_batch": 1, "sequence_length": sequence_length}
        | ({} if unfreeze is None else {"unfreeze": dict(unfreeze)}),
        optim={"lr": 1e-2, "warmup_steps": 2, **optim},
        checkpoint={"every": 2},
        log={"trackers": []},
    )


def mixture_config(folder: Path, model: Path) -> Path:
    """As ``chats_config``, on a mixture by target tokens of the chats, renamed columns and token ids, each used up several times.

    Ranks differ by linear, alpha is divided by their roots, and B has a rate of its own.
    """
    questions = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}."} for i in range(9)]
    ids = [[1 + (7 * i + k) % 50 for k in range(3 + 5 * i % 17)] for i in range(6)]
    masked = [{"input_ids": one, "loss_mask": [0, *[1] * (len(one) - 1)]} for one in ids]
    columns = {"prompt": "question", "completion": "answer"}
    sets = [
        {"path": str(folder / "train.jsonl"), "weight": 0.5},
        {"path": str(write_lines(folder / "questions.jsonl", questions)), "columns": columns, "weight": 0.3},
        {"path": str(write_lines(folder / "ids.jsonl", masked)), "format": "tokens", "weight": 0.2},
    ]
    lora = {"scaling": "sqrt_rank", "ranks": {"down_proj": 6, "q_proj": 2}, "alphas": {"up_proj": 12.0}}
    return chats_config(folder, model, train=sets, mix="target_tokens", lora=lora, optim={"lr_ratio": 4.0})


def tokens_config(folder: Path, model: Path) -> Path:
    """As ``chats_config``, with the rows of some tokens trained too."""
    return chats_config(folder, model, lora={"layers": [1], "train_tokens": ["<|eot_id|>", 49, 258, 300]})


def unfrozen_config(folder: Path, model: Path) -> Path:
    """As ``chats_config``, with norms and some linears trained themselves beside the adapters."""
    return chats_config(folder, model, unfreeze={"norms": True, "patterns": [r"layers\.1\.mlp\..*", "v_proj"]})


def guard_config(folder: Path, model: Path) -> Path:
    """As ``chats_config``, on a Guard's samples in all their forms."""
    verdicts = [{"verdict": "safe"}, {"verdict": "unsafe", "violated": ["Queues"]}]
    samples = [{"prompt": f"q {i} " * (i % 4 + 1), **verdicts[i % 2]} for i in range(24)]
    train = write_lines(folder / "verdicts.jsonl", samples)
    names = ["Queues", "Zebras"]
    return chats_config(folder, model, sequence_length=700, train=str(train), format="guard", guard_categories=names)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def check_learned(folder: Path) -> None:
    """What a run has recorded of its adapter is what the dense dW and transformers' weights say."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = yaml.safe_load((folder / "config.yaml").read_text())["model"]["name"]
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    recorded = json.loads((folder / "adapter" / "learned.json").read_text())["linears"]
    assert len(recorded) == len(tensors) // 2
    for module, found in recorded.items():
        first, second = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        values = torch.linalg.svdvals(settings["lora_alpha"] / settings["r"] * second @ first)[: settings["r"]]
        assert found["weight_norm"] == pytest.approx(float(weights[f"{module}.weight"].double().norm()), rel=1e-6)
        assert found["singular_values"] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-6 * float(values[0]))


def fill_the_disk(ballast: Path) -> None:
    """Write a file that takes the last byte of its file system."""
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
