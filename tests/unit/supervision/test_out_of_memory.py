"""Out of memory is reported as such: what was requested and held, what helps first, and what the kernel counted."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_lora.config.schema import Config
from dist_lora.errors import EXIT_FAILED, OutOfMemory, PlanError
from dist_lora.supervision.out_of_memory import (
    Counters,
    describe_device,
    describe_kill,
    out_of_memory,
    read_counters,
    what_helps,
)
from dist_lora.world.world import World

GIB = 2**30


def config_of(**sections: dict[str, object]) -> Config:
    return Config.model_validate(
        {"run": "it", "model": {"name": "3.1-8b"}, "data": {"train": "a.jsonl"}}
        | {name: dict(values) for name, values in sections.items()}
        | {"model": {"name": "3.1-8b", **sections.get("model", {})}}
    )


def reported(
    error: BaseException, config: Config | None = None, phase: str = "step 3, micro-batch 1"
) -> OutOfMemory | None:
    world = World.alone()
    world.progress.now(phase)
    return out_of_memory(error, world=world, config=config or config_of())


def test_a_gpu_out_of_memory_is_reported_with_what_was_requested_and_the_cheapest_change() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB is free."
    )
    found = reported(error)
    assert found is not None and found.exit_code == EXIT_FAILED and isinstance(found, MemoryError)
    text = str(found)
    assert text.startswith("out of memory on the GPU: 1.96 GiB were requested; this process holds ")
    assert "What helps, the cheapest first: train.micro_batch=1 (is 2); " in text


def test_a_host_out_of_memory_is_reported_with_what_was_requested_and_what_is_held() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**14)
    found = reported(refused.value)
    assert found is not None
    assert str(found).startswith("out of memory on the host: 400000000000000 bytes were requested; this process holds ")
    assert " GiB of the host's " in str(found) and " GiB are available" in str(found)


def test_pinned_memory_that_the_host_refuses_is_the_hosts_though_cuda_says_it_in_a_gpus_words(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    refusals = []
    for ask in (
        lambda: refuse(3, pin_memory=True),
        lambda: SimpleNamespace(pin_memory=refuse).pin_memory(),
        lambda: refuse(3),
    ):
        with pytest.raises(RuntimeError) as refused:
            ask()
        # The innermost line of Python: torch's own allocation is in C++.
        refused.value.__traceback__ = refused.value.__traceback__.tb_next  # type: ignore[union-attr]
        last = refused.value.__traceback__
        assert last is not None and last.tb_next is not None
        last.tb_next = None
        refusals.append(str(reported(refused.value)).partition(":")[0])
    assert refusals == ["out of memory on the host", "out of memory on the host", "out of memory on the GPU"]


def test_pieces_of_a_gpus_memory_are_named_where_they_are_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    stats = {"allocated_bytes.all.current": 60 * GIB, "reserved_bytes.all.current": 78 * GIB, "num_alloc_retries": 3}
    whole = describe_device(stats, free_bytes=GIB, total_bytes=80 * GIB, name="cuda:0")
    assert whole == (
        "this rank's tensors take 60.00 GiB of 80.00 GiB on cuda:0 (78.00 GiB are reserved for them, 1.00 GiB are free)"
    )
    stats["inactive_split_bytes.all.current"] = 17 * GIB
    assert describe_device(stats, free_bytes=GIB, total_bytes=80 * GIB, name="cuda:0") == (
        f"{whole}; 17.00 GiB of what is reserved are free in pieces between tensors, after 3 retries: "
        "PYTORCH_ALLOC_CONF=expandable_segments:True, the default, may join them"
    )
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_cached_size_mb:1")
    assert describe_device(stats, free_bytes=GIB, total_bytes=80 * GIB, name="cuda:0").endswith("after 3 retries")


def test_every_kind_of_refusal_is_recognised_and_other_errors_are_not() -> None:
    with pytest.raises(MemoryError) as refused:
        np.empty(2**50)
    assert "8.00 PiB were requested" in str(reported(refused.value))
    assert reported(MemoryError()) is not None
    assert reported(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None
    assert reported(RuntimeError("CUDA error: out of memory")) is not None
    assert reported(RuntimeError("shape mismatch")) is None
    assert reported(OSError(errno.ENOSPC, "No space left on device")) is None
    assert reported(PlanError("3 GiB needed")) is None  # ours already, though a MemoryError too


def test_what_helps_comes_in_the_order_of_its_price_and_leaves_out_what_is_done() -> None:
    fresh = config_of(train={"micro_batch": 4, "activation_checkpointing": False})
    step = "step 3, micro-batch 1"
    assert what_helps(fresh, where="device", phase=step, is_on_gpu=True) == [
        "train.micro_batch=2 (is 4)",
        "train.activation_checkpointing=all (is none)",
        "train.sequence_length=1024 (is 2048)",
        "parallel.base_shard=node (is auto), if the base is whole on each GPU",
        "model.quant=nf4 (is none)",
        "parallel.offload=base (is none)",
        "more GPUs, so that each holds less",
    ]
    whole = config_of(parallel={"base_shard": "gpu"})
    assert what_helps(whole, where="device", phase="loading the base", is_on_gpu=True) == [
        "parallel.base_shard=node (is gpu)",
        "model.quant=nf4 (is none)",
        "parallel.offload=optimizer (is none)",
        "more GPUs, so that each holds less",
    ]
    done = config_of(
        model={"quant": "nf4"},
        train={"micro_batch": 1, "activation_checkpointing": "all"},
        parallel={"offload": "all", "engine": "fsdp2"},
    )
    assert what_helps(done, where="device", phase=step, is_on_gpu=True) == [
        "train.sequence_length=1024 (is 2048)",
        "more GPUs, so that each holds less",
    ]
    assert what_helps(done, where="host", phase=step, is_on_gpu=True)[1].startswith("parallel.offload=none (is all")
    # Before the first step no pass has taken anything.
    assert what_helps(fresh, where="host", phase="loading the base", is_on_gpu=False) == [
        "model.quant=nf4 (is none)",
        "more nodes, so that each holds less",
    ]
    # What auto keeps on a GPU, by its plan, may be too much for this one.
    auto = config_of(train={"micro_batch": 1})
    assert (
        what_helps(auto, where="device", phase=step, is_on_gpu=True)[0]
        == "train.activation_checkpointing=all (is auto)"
    )
    asked = config_of(eval={"batch": 32}, train={"micro_batch": 1})
    assert what_helps(asked, where="device", phase="step 3, evaluating", is_on_gpu=True)[0] == "eval.batch=16"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOST = {"proc/vmstat": "nr_free_pages 3\noom_kill 7\n", "proc/meminfo": "MemTotal:       16777216 kB\n"}


def test_counters_are_read_from_control_groups_of_version_2_with_the_tightest_limit_above(tmp_path) -> None:
    job = "sys/fs/cgroup/system.slice/job_1"
    root = write(tmp_path, HOST | {
        "proc/self/cgroup": "0::/system.slice/job_1/task_0\n",
        f"{job}/task_0/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
        f"{job}/task_0/memory.max": "max\n",
        f"{job}/memory.events": "oom_kill 5\n",
        f"{job}/memory.max": f"{3 * GIB}\n",
        "sys/fs/cgroup/system.slice/memory.max": f"{9 * GIB}\n",
    })  # fmt: skip
    assert read_counters(root) == Counters(2, 3 * GIB, 7, 16 * GIB)


def test_counters_are_read_from_control_groups_of_version_1(tmp_path) -> None:
    root = write(tmp_path, HOST | {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job\n1:cpu:/\n0::/elsewhere\n",
        "sys/fs/cgroup/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 40\n",
    })  # fmt: skip
    assert read_counters(root) == Counters(1, 2 * GIB, 7, 16 * GIB)


def test_a_container_that_sees_its_own_group_as_the_top_is_read_too(tmp_path) -> None:
    root = write(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 4\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
    })  # fmt: skip
    assert read_counters(root) == Counters(4, GIB, None, None)
    assert read_counters(tmp_path / "nothing") == Counters()


def test_a_kill_that_the_kernel_counted_is_reported_as_a_fact() -> None:
    before = Counters(group_kills=2, limit_bytes=3 * GIB, host_kills=7, total_bytes=16 * GIB)
    peaks = [GIB, 5 * GIB // 2]
    held = "The ranks held at most 1.00 GiB, 2.50 GiB; the host has 16.00 GiB, this cgroup is limited to 3.00 GiB."
    after = Counters(3, 3 * GIB, 8, 16 * GIB)
    assert describe_kill(before, after, peaks) == (
        f"Memory ran out: the kernel killed 1 process in this cgroup for it during the run (oom_kill). {held}"
    )
    after = Counters(2, 3 * GIB, 9, 16 * GIB)
    assert describe_kill(before, after, peaks) == (
        f"Memory ran out: the kernel killed 2 processes on this host for it during the run (oom_kill). {held}"
    )


def test_a_kill_that_was_not_counted_is_reported_as_possible_only() -> None:
    counted = Counters(2, None, 7, 16 * GIB)
    assert describe_kill(counted, counted, [GIB]) == (
        "The kernel kills a process like this when the host's memory runs out, but it counted no such kill during the run "
        "(oom_kill). The ranks held at most 1.00 GiB; the host has 16.00 GiB."
    )
    assert "but whether it did isn't known here. The ranks held at most 0.00 GiB; the host's size is unknown." in (
        describe_kill(Counters(), Counters(), [0])
    )


PARENT = """
import subprocess, sys
from dist_lora.supervision.out_of_memory import Peaks
fill = "import os, sys; x = bytearray(int(sys.argv[1])); print(flush=True); sys.stdin.read(); os.abort()"
children = [
    subprocess.Popen([sys.executable, "-c", fill, str(mib * 2**20)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for mib in (100, 400)
]
peaks = Peaks([child.pid for child in children])
for i, child in enumerate(children):
    child.stdout.readline()
    if i == 0:
        peaks.look()
    child.communicate()
    peaks.ended([i])
print(*peaks.num_bytes)
"""


def test_the_most_that_a_process_held_is_known_though_nobody_looked_before_its_end() -> None:
    # In a small process: on Linux a child inherits the peak of the one that starts it.
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    first, second = (int(num_bytes) / 2**20 for num_bytes in done.stdout.split())
    assert 100 < first < 150 and 400 < second < 450
