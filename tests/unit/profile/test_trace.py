"""The table of a step: by hand from traces written by hand, and from a recorded step whose parts are known."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dist_lora.profile import parts
from dist_lora.profile.recorder import FOLDER, Recorder
from dist_lora.profile.trace import Table, table_of


def event(name: str, start: float, duration: float, *, category: str = "cpu_op", thread: int = 1, **args: Any) -> dict:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": thread,
        "ts": start,
        "dur": duration,
        "args": args,
    }


def note(name: str, start: float, duration: float) -> dict:
    return event(name, start, duration, category="user_annotation")


def step(*events: dict, length: float = 100.0) -> list[dict]:
    return [note(parts.STEP, 0, length), *events]


def shares(table: Table) -> dict[str, dict[str, float]]:
    """Microseconds by part and phase, where there are any."""
    return {part: micros for part, row in table.rows.items() if (micros := {k: v for k, v in row.micros.items() if v})}


def test_each_call_has_its_own_time_and_the_part_of_the_innermost_mark() -> None:
    table = table_of(
        step(
            note("part: LoRA", 10, 30),
            event("aten::linear", 12, 20),
            event("aten::mm", 15, 10),
            note("part: dequantizing", 33, 5),
            event("aten::mul", 34, 3),
            event("aten::add", 50, 7),
        )
    )
    # LoRA: 30 but the 5 of the mark within it; elementwise: what no mark is around; host: all the rest of the step.
    assert shares(table) == {
        "LoRA": {"forward": 25.0},
        "dequantizing": {"forward": 5.0},
        "elementwise": {"forward": 7.0},
        "host": {"forward": 63.0},
    }
    assert table.step_micros == 100 and not table.on_gpu


def test_a_backward_has_the_part_of_its_forward_and_what_it_recomputes_its_own() -> None:
    backward = "autograd::engine::evaluate_function: "
    table = table_of(
        step(
            note(parts.LAYER, 0, 20),
            note("part: frozen matmuls", 0, 10),
            event("aten::linear", 0, 10, **{"Sequence number": 7}),
            event("aten::silu", 10, 10, **{"Sequence number": 8}),
            event(backward + "SiluBackward0", 20, 30, **{"Sequence number": 8}),
            note(parts.LAYER, 21, 15),  # asked for by silu's backward
            event("aten::mm", 21, 15, **{"Sequence number": 9}),
            note("part: attention", 36, 4),
            event(backward + "LinearBackward0", 50, 10, **{"Sequence number": 7}),
            event(backward + "torch::autograd::AccumulateGrad", 60, 2),
            length=62,
        )
    )
    assert shares(table) == {
        "frozen matmuls": {"forward": 10.0, "backward": 10.0},
        "elementwise": {"forward": 10.0, "recomputation": 15.0, "backward": 13.0},
        "attention": {"backward": 4.0},
    }


def test_products_count_two_operations_a_pair_and_all_calls_their_inputs_and_outputs() -> None:
    types = {"Input type": ["float", "float"]}
    table = table_of(
        step(
            note("part: frozen matmuls", 0, 10),
            event("aten::matmul", 0, 10, **types, **{"Input Dims": [[4, 8], [8, 16]]}),
            event("aten::mm", 1, 9, **types, **{"Input Dims": [[4, 8], [8, 16]]}),
            event("aten::add", 20, 5, **{"Input type": ["c10::BFloat16", "Scalar"], "Input Dims": [[4, 8], []]}),
            event("aten::view", 30, 5, **types, **{"Input Dims": [[4, 8], []]}),
        )
    )
    product = table.rows["frozen matmuls"]
    assert product.flops == 2 * 4 * 8 * 16
    assert product.num_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert table.rows["elementwise"].num_bytes == 2 * 4 * 8 * 2


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("mm", [[4, 8], [8, 16]]),
        ("mm", [[4, 8], [8, 16], [4, 16]]),  # into memory that is given
        ("bmm", [[2, 4, 4], [2, 4, 16]]),
        ("addmm", [[4, 16], [4, 8], [8, 16], [], []]),
        ("addmm_", [[4, 16], [4, 8], [8, 16], [], []]),
        ("addmm", [[16], [4, 8], [8, 16], [], [], [4, 16]]),
    ],
)
def test_a_products_factors_are_found_among_its_arguments(name, shapes) -> None:
    types = ["float" if shape else "Scalar" for shape in shapes]
    call = event(f"aten::{name}", 0, 10, **{"Input type": types, "Input Dims": shapes})
    assert table_of(step(call)).rows["elementwise"].flops == 2 * 4 * 8 * 16


def test_on_a_gpu_kernels_count_and_what_hides_behind_them_does_not() -> None:
    def kernel(name: str, start: float, duration: float, number: int) -> dict:
        return event(name, start, duration, category="kernel", thread=7, correlation=number)

    def launch(start: float, number: int) -> dict:
        return event("cudaLaunchKernel", start, 1, category="cuda_runtime", correlation=number)

    table = table_of(
        step(
            note("part: attention", 0, 4),
            event("aten::sdpa", 1, 3),
            launch(2, 11),
            note("FSDP::all_gather (layers.1)", 5, 3),
            launch(6, 12),
            event("aten::mul", 9, 3),
            launch(10, 13),
            kernel("flash_fwd", 20, 30, 11),
            kernel("ncclDevKernel_AllGather", 40, 20, 12),  # 10 of it while the other runs
            kernel("mul_kernel", 70, 5, 13),
            length=90,
        )
    )
    assert table.on_gpu
    assert shares(table) == {
        "attention": {"forward": 30.0},
        "communication": {"forward": 10.0},
        "elementwise": {"forward": 5.0},
        "host": {"forward": 45.0},  # nothing runs in 0-20, 60-70 and 75-90
    }


def test_lines_name_rates_and_how_far_they_are_from_the_limit() -> None:
    table = table_of(
        step(
            note("part: frozen matmuls", 0, 50),
            event("aten::mm", 0, 50, **{"Input type": ["float"] * 2, "Input Dims": [[100, 100], [100, 100]]}),
        )
    )
    # 2e6 operations in 50 us are 0.04 TFLOP/s, and half of 0.08; 120,000 bytes are 2.4 GB/s, and less of theirs.
    line = next(line for line in table.lines(flops_per_s=0.08e12, bytes_per_s=100e9) if line.startswith("frozen"))
    assert line.split()[2:] == ["0.1", "0.0", "0.0", "0.1", "50.0%", "0.040", "2.4", "50%"]


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no training step"):
        table_of([event("aten::add", 0, 1)])


def test_a_mark_does_nothing_while_no_profile_is_made() -> None:
    assert parts.mark("LoRA") is parts.layer() is parts.step()


def test_the_third_step_is_recorded_with_its_parts_and_the_others_are_not(tmp_path: Path, caplog) -> None:
    weight, a = torch.randn(64, 64), torch.randn(64, 4, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with parts.layer():
            with parts.mark("frozen matmuls"):
                y = F.linear(x, weight)
            with parts.mark("LoRA"):
                y = y + (x @ a) @ a.t()
            return F.silu(y)

    recorder = Recorder(
        tmp_path, first_step=3, num_steps=9, device=torch.device("cpu"), dtype=torch.float32, matmul=(32, 64, 64)
    )
    with caplog.at_level(logging.INFO, logger="dist_lora"):
        for number in range(3, 8):
            with recorder.around(number):
                result = checkpoint(forward, torch.randn(32, 64, requires_grad=True), use_reentrant=False)
                result.sum().backward()
    traces = list((tmp_path / FOLDER).iterdir())
    assert [path.name for path in traces] == ["step-00000005.json.gz"]
    table = table_of(json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"])
    # Its parts are all of the step, and each of the marked ones was computed, recomputed and differentiated.
    assert sum(row.total for row in table.rows.values()) == pytest.approx(table.step_micros)
    for part in ("frozen matmuls", "LoRA", "elementwise"):
        assert set(shares(table)[part]) == {"forward", "recomputation", "backward"}, part
    # Twice forward and once backward, and of LoRA's two products the backward has two each.
    assert table.rows["frozen matmuls"].flops == 3 * 2 * 32 * 64 * 64
    assert table.rows["LoRA"].flops == (2 * 2 + 4) * 2 * 32 * 64 * 4
    assert [record.message.splitlines()[0] for record in caplog.records] == ["profile of step 5 on rank 0:"]


def test_a_run_shorter_than_the_warm_up_records_its_last_step(tmp_path: Path) -> None:
    recorder = Recorder(
        tmp_path, first_step=1, num_steps=2, device=torch.device("cpu"), dtype=torch.float32, matmul=(8, 8, 8)
    )
    for number in (1, 2):
        with recorder.around(number):
            torch.ones(2).add(1)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000002.json.gz"]
