"""A table of one step, from the trace that torch's profiler has made of it.

Time on a CPU is each call's own: its duration without that of the calls within it. Time on a GPU is that of the kernels,
each with the call that has launched it. A call belongs to the innermost mark (``parts.py``) around it; one of the backward to
the mark around the call of the forward that it is the backward of, which the profiler's sequence numbers tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from dist_lora.profile.parts import LAYER, PARTS, PREFIX, STEP, Part

Phase = Literal["forward", "recomputation", "backward"]

_BACKWARD = "autograd::engine::evaluate_function: "
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# What is communication wherever it runs: the ranges of FSDP2 and of torch.distributed, and NCCL's kernels.
_COMMUNICATION = ("FSDP::", "c10d::", "nccl", "gloo:", "record_param_comms")
# Nothing is moved by these, whatever they are given.
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "t", "transpose", "as_strided", "detach", "slice", "select", "expand", "unsqueeze", "squeeze",
        "empty", "empty_like", "empty_strided", "alias", "unflatten", "flatten", "narrow", "split", "split_with_sizes",
        "_reshape_alias", "resolve_conj", "resolve_neg", "permute", "unbind", "chunk", "view_as", "_unsafe_view", "numpy_T",
        "result_type", "item", "_local_scalar_dense",
    )
)  # fmt: skip
# The place of a product's two factors among a call's arguments, of which the last may be memory for the result.
_FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
_ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4,
               "signed char": 1, "unsigned char": 1, "bool": 1}  # fmt: skip


@dataclass
class Row:
    """One part: microseconds by phase, and the work that its calls tell."""

    micros: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))
    flops: float = 0.0  # of matrix products
    num_bytes: float = 0.0  # inputs and outputs of all calls that move any

    @property
    def total(self) -> float:
        """Microseconds of all phases."""
        return sum(self.micros.values())


@dataclass(frozen=True)
class Table:
    """Where the time of a step went: its length in microseconds and its parts, all of ``PARTS``."""

    step_micros: float
    rows: Mapping[Part, Row]
    on_gpu: bool

    def lines(self, *, flops_per_s: float, bytes_per_s: float) -> list[str]:
        """As text.

        Args:
            flops_per_s: operations per second of a large matrix product on this device, measured.
            bytes_per_s: bytes per second that a large copy reads and writes there, measured.
        """
        head = f"{'part':16}{'forward':>10}{'recomputed':>12}{'backward':>10}{'ms':>10}{'share':>8}{'TFLOP/s':>9}{'GB/s':>8}{'of limit':>10}"
        lines = [head]
        for part, row in self.rows.items():
            if not row.total:
                continue
            seconds = row.total / 1e6
            needed = max(row.flops / flops_per_s, row.num_bytes / bytes_per_s)
            known = bool(row.flops or row.num_bytes) and part not in ("host", "communication")
            lines.append(
                f"{part:16}"
                + f"{row.micros['forward'] / 1e3:10.1f}{row.micros['recomputation'] / 1e3:12.1f}{row.micros['backward'] / 1e3:10.1f}"
                + f"{row.total / 1e3:10.1f}{row.total / self.step_micros:8.1%}"
                + (f"{row.flops / seconds / 1e12:9.3f}" if row.flops else f"{'':9}")
                + (f"{row.num_bytes / seconds / 1e9:8.1f}" if known else f"{'':8}")
                + (f"{needed / seconds:10.0%}" if known else "")
            )
        lines.append(f"{'the whole step':48}{self.step_micros / 1e3:10.1f}")
        return [line.rstrip() for line in lines]


@dataclass
class _Call:
    """A range of the trace on one thread."""

    name: str
    start: float
    duration: float
    args: Mapping[str, Any]
    category: str
    thread: object
    parent: _Call | None = None
    own: float = 0.0  # microseconds that no range within it has

    def up(self) -> Iterable[_Call]:
        """It and all that is around it, innermost first."""
        call: _Call | None = self
        while call is not None:
            yield call
            call = call.parent


def table_of(events: Sequence[Mapping[str, Any]]) -> Table:
    """The table of the step in a trace in Chrome's format (``traceEvents``).

    Raises:
        ValueError: there is no step in it.
    """
    calls = _nested(events)
    step = next((call for call in calls if call.name == STEP and call.category == "user_annotation"), None)
    if step is None:
        raise ValueError("the trace has no training step")
    end = step.start + step.duration
    within = [call for call in calls if step.start <= call.start < end]
    parts = _Parts(within)
    rows: dict[Part, Row] = {part: Row() for part in PARTS}
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in _ON_GPU and step.start <= e["ts"]]
    for call in within:
        if (work := _work_of(call)) is not None:
            row = rows[parts.of(call)]
            row.flops, row.num_bytes = row.flops + work[0], row.num_bytes + work[1]
    if kernels:
        length = max(step.duration, max(e["ts"] + e["dur"] for e in kernels) - step.start)
        _add_kernels(rows, kernels, within, parts, length=length)
        return Table(length, rows, on_gpu=True)
    for call in within:
        if call.thread == step.thread:
            rows[parts.of(call)].micros[parts.phase_of(call)] += call.own
    return Table(step.duration, rows, on_gpu=False)


def _nested(events: Iterable[Mapping[str, Any]]) -> list[_Call]:
    """The calls and marks of the host, each with the one around it and its own time, by their start."""
    calls = [
        _Call(e["name"], e["ts"], e["dur"], e.get("args", {}), e["cat"], (e["pid"], e["tid"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation", *_LAUNCHES)
    ]
    calls.sort(key=lambda call: (call.start, -call.duration))
    open_by_thread: dict[object, list[_Call]] = defaultdict(list)
    for call in calls:
        around = open_by_thread[call.thread]
        while around and around[-1].start + around[-1].duration <= call.start:
            around.pop()
        call.own = call.duration
        if around:
            call.parent = around[-1]
            around[-1].own -= call.duration
        around.append(call)
    return calls


class _Parts:
    """To which part and phase each call belongs."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        # By its sequence number; the first call that has it is the forward's, also where that is a recomputation's.
        self._of_forward: dict[int, _Call] = {}
        for call in calls:
            if "Sequence number" in call.args:
                self._of_forward.setdefault(call.args["Sequence number"], call)

    def of(self, call: _Call) -> Part:
        """The part that a call belongs to."""
        for up in call.up():
            if up.name.startswith(PREFIX):
                return cast(Part, up.name.removeprefix(PREFIX))
            if up.name.startswith(_COMMUNICATION):
                return "communication"
            if up.name == LAYER:
                break  # a recomputation is no part of what asked for it
            if up.name.startswith(_BACKWARD):
                forward = self._of_forward.get(up.args.get("Sequence number", -1))
                if forward is not None and not forward.name.startswith(_BACKWARD):
                    return self.of(forward)
        return "elementwise" if call.category == "cpu_op" or call.category in _LAUNCHES else "host"

    def phase_of(self, call: _Call) -> Phase:
        """Forward, or backward; in the backward a layer's forward is a recomputation."""
        is_layer = False
        for up in call.up():
            is_layer = is_layer or up.name == LAYER
            if up.name.startswith(_BACKWARD):
                return "recomputation" if is_layer else "backward"
        return "forward"


def _work_of(call: _Call) -> tuple[float, float] | None:
    """Operations and bytes of a call that has none within it that tells its own; None where it moves nothing."""
    dims, types = call.args.get("Input Dims"), call.args.get("Input type")
    if call.category != "cpu_op" or not dims or not call.name.startswith("aten::") or call.name in _VIEWS:
        return None
    sizes = [
        _numel(d) * _ITEM_BYTES.get(t, 0) for d, t in zip(dims, types or [], strict=False) if d and t in _ITEM_BYTES
    ]
    if (first := _FACTORS.get(call.name)) is not None:
        a, b = dims[first : first + 2]
        flops, item = 2.0 * _numel(a) * b[-1], _ITEM_BYTES.get((types or ["float"])[0], 4)
        added = _numel(dims[0]) if first else 0
        return flops, float(item * (added + _numel(a) + _numel(b) + _numel(a) // a[-1] * b[-1]))
    if call.own < 0.5 * call.duration or not sizes:
        return None  # what it does is done by the calls within it
    return 0.0, float(sum(sizes) + max(sizes))


def _numel(dims: Sequence[Any]) -> int:
    count = 1
    for dim in dims:
        count *= dim if isinstance(dim, int) else 1
    return count


def _add_kernels(
    rows: Mapping[Part, Row],
    kernels: Sequence[Mapping[str, Any]],
    calls: Sequence[_Call],
    parts: _Parts,
    *,
    length: float,
) -> None:
    """Add the GPU's time: of communication what no other kernel hides, and as ``host`` the time in which none ran."""
    by_id = {
        call.args["External id"]: call for call in calls if call.category == "cpu_op" and "External id" in call.args
    }
    by_launch = {call.args["correlation"]: call for call in calls if "correlation" in call.args}
    busy: list[tuple[float, float]] = []
    sent: list[tuple[float, float]] = []
    for event in kernels:
        args = event.get("args", {})
        call = by_launch.get(args.get("correlation")) or by_id.get(args.get("External id"))
        span = (event["ts"], event["ts"] + event["dur"])
        is_sent = event["name"].startswith("nccl") or (call is not None and parts.of(call) == "communication")
        (sent if is_sent else busy).append(span)
        if not is_sent:
            part: Part = parts.of(call) if call is not None else "elementwise"
            rows["elementwise" if part == "host" else part].micros[
                parts.phase_of(call) if call is not None else "forward"
            ] += event["dur"]
    computing, working = _union(busy), _union(busy + sent)
    rows["communication"].micros["forward"] += working - computing
    rows["host"].micros["forward"] += max(0.0, length - working)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """The time that any of these covers."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            covered += end - max(start, until)
            until = end
    return covered
