"""Runs that are killed by SIGKILL at random instants and started again until they end, against one that nothing killed.

    python -m tests.e2e.kills --kills 200 --seed 7 [--engine fsdp2|zero3] [--data chats|mixture|guard|tokens] [--exec]

prints a short table. What is killed: one rank, all ranks, the launcher, or all of them. When: at any time of the run;
when something is seen in the run's folder, which is looked at every millisecond; or at a point within a rank (see
``points.py``). All is drawn from the seed. Afterwards a run must have the adapter's bytes, each step's loss, gradient
norm, rate and samples of the uninterrupted one, each step once, and nothing may lie about.

Processes are forked from one that has the imports behind it (see ``starter.py``), which is where a start's seconds
go; ``--exec`` starts them as a user does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_lora.checkpoint.read import verify
from tests.e2e.points import INSIDE, VICTIMS, Aim, Victim, came_by, doomed
from tests.e2e.runs import (
    chats_config,
    environment,
    guard_config,
    mixture_config,
    starter_of,
    tokens_config,
    unfrozen_config,
)
from tests.e2e.starter import Start

STEPS = 22
KEEP = 2
SETTINGS = (f"train.steps={STEPS}", "train.packing=false", "checkpoint.every=2", f"checkpoint.keep={KEEP}",
            "checkpoint.keep_best=true", "data.eval=0.25", "eval.every=3")  # fmt: skip
EXACT = ("step", "epoch", "loss", "grad_norm", "lr", "target_tokens", "tokens")
ADAPTER = Path("adapter", "adapter_model.safetensors")
ENDS_S = 60.0  # from the start of a run, or a kill, to the end of its last process
ONE_RANK = ("rename", "deletion", "gathering")  # what rank 0 alone does
CONFIGS = {
    "chats": chats_config,
    "mixture": mixture_config,
    "guard": guard_config,
    "tokens": tokens_config,
    "unfrozen": unfrozen_config,
}
LEFT = re.compile(r"\.partial|\.deleted|\.replaced|\.building|probe|^aside-")


@dataclass(frozen=True)
class Plan:
    """When and whom to kill: at a point within a rank, when something is seen from outside, or at a time."""

    where: str
    victim: Victim
    rank: int
    inside: Aim | None = None
    nth: int = 1  # how often it is to be seen
    delay_s: float = 0.0  # after it is seen, or after the start


@dataclass
class Tally:
    """What a hunt did."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # (where, victim)
    starts: int = 0
    missed: int = 0  # runs that ended before what they were to be killed at
    runs: int = 0  # that were killed, went on and were compared
    steps: int = 0  # whose numbers and samples were compared
    repeated: int = 0  # of them done more than once
    seconds: float = 0.0

    def lines(self) -> Iterator[str]:
        """A short table."""
        wheres = sorted({where for where, _ in self.kills}, key=lambda where: (where not in INSIDE, where))
        yield "| killed | " + " | ".join(_VICTIM_WORDS[victim] for victim in VICTIMS) + " | sum |"
        yield "|---" * (len(VICTIMS) + 2) + "|"
        for where in wheres:
            row = [self.kills[where, victim] for victim in VICTIMS]
            yield f"| {_WORDS.get(where, where)} | " + " | ".join(map(str, row)) + f" | {sum(row)} |"
        sums = [sum(count for (_, v), count in self.kills.items() if v == victim) for victim in VICTIMS]
        yield "| sum | " + " | ".join(map(str, sums)) + f" | {self.kills.total()} |"
        yield ""
        yield (
            f"{self.starts} starts of {self.runs} runs in {self.seconds:.0f} s; {self.missed} starts ended before a kill that was "
            f"meant for them. Equal to the uninterrupted run: the adapter's bytes {self.runs} times; loss, gradient norm, "
            f"rate and samples of {self.steps} steps, {self.repeated} of them done more than once. No step was missing or "
            "logged twice; nothing was left over in the runs' folders and the token cache, and no process was left."
        )


_VICTIM_WORDS: dict[Victim, str] = {
    "rank": "a process",
    "ranks": "all processes",
    "launcher": "the launcher",
    "all": "everything",
}
_WORDS = {
    "step": "in a step",
    "eval": "in an evaluation",
    "save": "in a save",
    "rename": "at a renaming",
    "deletion": "at the deletion of a checkpoint",
    "gathering": "in the gathering of the adapter",
    "loading": "while loading",
    "tokenizing": "while tokenizing",
    "time": "at any time",
    "partial": "after a save has begun, by its folder",
    "manifest": "after a manifest was written",
    "published": "after a checkpoint was published",
    "line": "after a step was logged",
    "adapter": "after the adapter's folder was begun",
}


def seen_of(run: Path) -> dict[str, Callable[[], frozenset[str]]]:
    """What can be seen of a run from outside, as names that grow in number when it happens.

    What is begun under one name and ends under another counts once: a look may miss the first.
    """
    checkpoints = run / "checkpoints"

    def steps(*patterns: str) -> frozenset[str]:
        found = (path.relative_to(checkpoints).parts[0] for pattern in patterns for path in checkpoints.glob(pattern))
        return frozenset(re.findall(r"step-\d+", " ".join(found)))

    def lines() -> frozenset[str]:
        return frozenset(map(str, range(_num_steps(run))))

    return {
        "partial": lambda: steps(".step-*.partial", "step-*"),
        "manifest": lambda: steps(".step-*.partial/manifest.json", "step-*/manifest.json"),
        "published": lambda: steps("step-*"),
        "line": lines,
        "adapter": lambda: frozenset(path.name for path in run.glob("*adapter*")),
    }


class Hunt:
    """Kills runs in a folder of its own; ``close`` it."""

    def __init__(
        self, folder: Path, config: Path, *, seed: int, engine: str = "fsdp2", is_forking: bool = True
    ) -> None:
        self.folder, self.config, self.tally = folder, config, Tally()
        self._draw = random.Random(seed)
        self._engine = engine
        self._starter = starter_of(is_forking, is_forking and engine == "zero3")
        self._under_way: Start | None = None
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._pids: set[int] = set()
        self._open_plans: list[str] = []
        self._whole_s = 0.0

    def close(self) -> None:
        """End what is left of a run."""
        if self._under_way is not None:
            self._under_way.close()

    def run(self, num_kills: int) -> Tally:
        """Kill ``num_kills`` times; every run that was begun is led to its end and compared."""
        began_s = time.monotonic()
        whole = self._place("whole")
        started = time.monotonic()
        assert self._start(whole, None).wait(ENDS_S) == 0, self._told(whole)
        self._whole_s = time.monotonic() - started
        self._came_by = came_by(self.folder / "told" / "whole")
        while self.tally.kills.total() < num_kills:
            place = self._place(f"killed-{self.tally.runs + 1}")
            plan: Plan | None = None
            while True:
                left = num_kills - self.tally.kills.total()
                plan = self._plan(place) if left and plan is None else plan
                if not left:
                    plan = None
                if self._goes_to_its_end(place, plan):
                    break
                plan = None
            if plan is not None:
                self._open_plans.append(plan.where)  # the run was over: another will come there
            self._compare(place, whole)
            self.tally.seconds = time.monotonic() - began_s
        return self.tally

    # One start

    def _place(self, name: str) -> Path:
        """The run's folder; what it tells beside its output lies in another of its name."""
        (self.folder / "told" / name).mkdir(parents=True)
        return self.folder / "runs" / name

    def _told(self, run: Path) -> str:
        return (self.folder / "told" / run.name / "output").read_text()

    def _start(self, run: Path, inside: Aim | None) -> Start:
        told = self.folder / "told" / run.name
        env = {"DIST_LORA_TOLD": str(told), "TMPDIR": str(self._temporary), "OMP_NUM_THREADS": "1"}
        if inside is not None:
            env["DIST_LORA_AIM"] = inside.to_json()
        self.tally.starts += 1
        with (told / "output").open("a") as output:
            self._under_way = self._starter.start(
                "train", self.config, f"run={run.name}", f"runs_dir={self.folder / 'runs'}", *SETTINGS,
                f"data.cache_dir={self.folder / 'cache' / run.name}", f"parallel.engine={self._engine}", "--nproc", 2,
                env=environment("killed_at_a_point") | env, stdout=output, stderr=output,
            )  # fmt: skip
        return self._under_way

    def _plan(self, run: Path) -> Plan:
        """The next kill of a run; each place comes once before any comes again."""
        if not self._open_plans:
            self._open_plans = [*INSIDE, "time", "time", "time", "time", "partial", "manifest", "published", "line",
                                "adapter"]  # fmt: skip
            self._draw.shuffle(self._open_plans)
        where, victim = self._open_plans.pop(0), self._draw.choice(VICTIMS)
        rank = 0 if where in ONE_RANK else self._draw.randrange(2)
        # Mostly soon, so that a run is killed more than a few times.
        share_ahead = (1 - _num_steps(run) / STEPS) * self._draw.choice((0.3, 0.5, 1.0))
        if where in INSIDE:
            at_each_start = where in ("gathering", "loading", "tokenizing")
            num_ahead = self._came_by[where, rank] * (1.0 if at_each_start else share_ahead)
            aim = Aim(where, self._draw.randint(1, max(1, round(num_ahead))), rank, self._draw.random() < 0.5, victim)
            return Plan(where, victim, rank, inside=aim)
        if where == "time":
            return Plan(where, victim, rank, delay_s=self._draw.uniform(0, self._whole_s * (1 + share_ahead) / 2))
        nth = 1 if where == "adapter" else self._draw.randint(1, 4)
        return Plan(where, victim, rank, nth=nth, delay_s=self._draw.choice([0.0, self._draw.uniform(0, 0.01)]))

    def _goes_to_its_end(self, run: Path, plan: Plan | None) -> bool:
        """Start a run and kill it by a plan; False where it was killed."""
        if plan is not None and plan.where == "tokenizing":
            shutil.rmtree(self.folder / "cache" / run.name, ignore_errors=True)  # else nothing is left to do
        struck = self.folder / "told" / run.name / "struck"
        struck.unlink(missing_ok=True)
        start = self._start(run, plan.inside if plan else None)
        code = None
        if plan is not None and plan.inside is None:
            code, is_struck = self._watch(start, run, plan)
        if code is None:
            code = start.wait(ENDS_S)
        left = start.descendants()
        self._pids |= set(left)
        assert code is not None, f"{plan}: after {ENDS_S:.0f} s there is still {left}:\n{self._told(run)}"
        if plan is None or plan.inside is not None:
            is_struck = struck.exists()
        if is_struck:
            assert plan is not None
            self.tally.kills[plan.where, plan.victim] += 1
            wanted = {-signal.SIGKILL} if plan.victim in ("launcher", "all") else {1}
            assert code in wanted or (code == 0 and _is_late(plan)), f"{plan}: ended with {code}:\n{self._told(run)}"
            return False
        assert code == 0, f"{plan}: ended with {code}:\n{self._told(run)}"
        self.tally.missed += plan is not None
        return True

    def _watch(self, start: Start, run: Path, plan: Plan) -> tuple[int | None, bool]:
        """Kill when a plan's time has come; the exit code of a run that ended before, and whether it was killed."""
        began_s = time.monotonic()
        look = seen_of(run).get(plan.where)
        before, count = look() if look else frozenset(), 0
        while True:
            if look is None:
                is_time = time.monotonic() - began_s >= plan.delay_s
            else:
                now = look()
                count += bool(now - before)
                before, is_time = now, count >= plan.nth
            if is_time:
                break
            code = start.wait(0.001)
            if code is not None:
                return code, False
            assert time.monotonic() - began_s < ENDS_S, f"{plan}: not seen:\n{self._told(run)}"
        if look is not None:
            time.sleep(plan.delay_s)
        ranks = start.ranks()
        if plan.victim != "launcher" and plan.victim != "all" and len(ranks) <= plan.rank:
            return None, False  # it has no ranks yet, or none any more
        self._pids |= {start.pid, *ranks}
        chosen = ranks[plan.rank] if len(ranks) > plan.rank else start.pid
        is_alive = False
        for pid in doomed(plan.victim, launcher=start.pid, ranks=ranks, rank=chosen):
            is_alive |= _is_alive(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return None, is_alive

    # What must be there, and what must not

    def _compare(self, run: Path, whole: Path) -> None:
        found, wanted = _lines(run), _lines(whole)
        assert [line[0] for line in found] == list(range(1, STEPS + 1)), f"{run}: {[line[0] for line in found]}"
        assert found == wanted, f"{run}: {[pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1]]}"
        assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes(), f"{run}: another adapter"
        times = self._compare_samples(run, whole)
        self.tally.runs += 1
        self.tally.steps += STEPS
        self.tally.repeated += sum(count > 1 for count in times.values())
        assert not (left := self._leftovers(run)), f"{run}: {left} lie about"

    def _compare_samples(self, run: Path, whole: Path) -> Counter[int]:
        """How often the first rank did each step; every time with the samples of the uninterrupted run, in order."""
        times: Counter[int] = Counter()
        for rank in range(2):
            once = {step: samples for step, samples in _samples(self.folder / "told" / whole.name, rank)}
            done = list(_samples(self.folder / "told" / run.name, rank))
            assert list(once) == list(range(1, STEPS + 1))
            assert {step for step, _ in done} == set(once)
            assert all(samples == once[step] for step, samples in done), f"{run}: other samples"
            # A start goes on step by step, and only another start goes back: no step is passed over.
            assert all(b <= a + 1 for (a, _), (b, _) in zip(done, done[1:], strict=False)), done
            times = times if rank else Counter(step for step, _ in done)
        return times

    def _leftovers(self, run: Path) -> list[str]:
        """Files and folders that only a run under way may have, and processes."""
        paths = [*run.rglob("*"), *(self.folder / "cache" / run.name).rglob("*")]
        left = [str(path) for path in paths if LEFT.search(path.name)]
        steps = sorted(path.name for path in (run / "checkpoints").iterdir())
        for name in (name for name in steps if not LEFT.search(name)):
            verify(run / "checkpoints" / name)
        if not KEEP <= len(steps) <= KEEP + 1:  # the newest, and the best
            left.append(str(steps))
        assert self._under_way is not None
        left += [f"process {pid}" for pid in self._under_way.descendants()]
        shared = [path.name for path in Path("/dev/shm").iterdir()]
        left += [name for name in shared if any(re.search(rf"(?<!\d){pid}(?!\d)", name) for pid in self._pids)]
        return left


def _is_late(plan: Plan) -> bool:
    """Whether a run may have been over when it was struck: the last file was written, and a rank was on its way out."""
    return plan.victim in ("rank", "ranks") and plan.where in ("time", "adapter", "line", "published")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _lines(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in EXACT) for line in lines]


def _num_steps(run: Path) -> int:
    """How many steps a run has written down, as it lies there."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _samples(told: Path, rank: int) -> Iterator[tuple[int, tuple[Any, Any]]]:
    for line in (told / f"samples-{rank}.jsonl").read_text().splitlines():
        content = json.loads(line)
        yield content["step"], (content["all"], content["rank"])


def main() -> None:
    """The command: see the top of this file."""
    from tests.conftest import save_tiny_llama

    parser = argparse.ArgumentParser(description="Kill runs at random instants and compare them with one that was not.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--engine", choices=("fsdp2", "zero3"), default="fsdp2")
    parser.add_argument("--data", choices=CONFIGS, default="chats")
    parser.add_argument("--exec", action="store_true", help="start each process as a user does")
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        (folder / "base").mkdir()
        save_tiny_llama(folder / "base", "llama31")
        config = CONFIGS[wanted.data](folder, folder / "base")
        hunt = Hunt(folder, config, seed=wanted.seed, engine=wanted.engine, is_forking=not wanted.exec)
        try:
            hunt.run(wanted.kills)
        except KeyboardInterrupt:
            print("interrupted; until then:")
        finally:
            hunt.close()
        for line in hunt.tally.lines():
            print(line)


if __name__ == "__main__":
    main()
