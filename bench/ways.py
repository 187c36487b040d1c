"""Ways to adapt side by side: LoRA of several ranks and on several linears, partial freezing, norms, and both together.

    bash launch/quickstart.sh                        # once: SmolLM2-135M and the quickstart's data
    python -m bench.ways --gsm8k FOLDER              # every way that isn't measured yet: hours on 2 cores
    python -m bench.ways --gsm8k FOLDER r16 last-3   # some
    python -m bench.ways                             # the tables of what is measured

It may be interrupted: a way that is done stays so, in .cache/ways/results.json, and the next call goes on with the others. Every
way trains the same samples in the same order. ``forgetting`` is what the loss on text of another kind rose by, which no way trains
on: GSM8K's questions with answers for the quickstart, and the quickstart's requests for GSM8K. Each kind of way has a learning rate of
its own on each task: the one with the lowest held-out loss after a run of a few steps, between one that is lower and one that is higher.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.kept import Kept
from dist_lora.checkpoint.folders import step_folders
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, SUMMARY_FILE
from dist_lora.run_folder.records import read_lines

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "ways"
RESULTS = Kept(FOLDER / "results.json")  # by TASK WAY, TASK before and TASK trial KIND RATE
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
NUM_OTHER, NUM_HELD_OUT = 24, 64  # samples of the text of another kind, and of GSM8K's held-out questions

TITLES = {
    "quickstart": "The quickstart's requests, 48 steps of 8",
    "gsm8k": "GSM8K, 60 steps of 4 x 512 tokens",
}
COLOURS = {"LoRA": "#2166ac", "unfrozen": "#b2182b", "norms": "#7b3294", "both": "#e08214"}
NEAR = 0.035  # of an axis
NUM_TRIAL_STEPS = 12
# Of each kind the way by which its learning rate is chosen, and the rates that are tried first.
TRIALS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "LoRA": ("r16", (5e-4, 2e-3, 5e-3)),
    "unfrozen": ("last-3", (3e-4, 1e-3, 3e-3)),
    "norms": ("norms", (3e-3, 1e-2, 3e-2)),
    "both": ("both", (3e-4, 1e-3, 3e-3)),
}


@dataclass(frozen=True)
class Way:
    """One way to adapt: what it is called in the table, and its settings beside the task's."""

    title: str
    kind: str
    lora: Mapping[str, Any] | None
    unfreeze: Mapping[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        """``lora`` and ``train.unfreeze``."""
        return {
            "lora": None if self.lora is None else {"rank": 16, "alpha": 32, **self.lora},
            "train": {"unfreeze": None if self.unfreeze is None else dict(self.unfreeze)},
        }


MLP = ["gate_proj", "up_proj", "down_proj"]
WAYS: Mapping[str, Way] = {
    "r1": Way("LoRA, r = 1", "LoRA", {"rank": 1}),
    "r4": Way("LoRA, r = 4", "LoRA", {"rank": 4}),
    "r16": Way("LoRA, r = 16", "LoRA", {}),
    "r64": Way("LoRA, r = 64", "LoRA", {"rank": 64}),
    "qv": Way("LoRA, r = 16, q and v", "LoRA", {"targets": ["q_proj", "v_proj"]}),
    "mlp": Way("LoRA, r = 16, MLP", "LoRA", {"targets": MLP}),
    "last-1": Way("the last layer", "unfrozen", None, {"last_layers": 1}),
    "last-3": Way("the last 3 layers", "unfrozen", None, {"last_layers": 3}),
    "last-10": Way("the last 10 layers", "unfrozen", None, {"last_layers": 10}),
    "norms": Way("norms", "norms", None, {"norms": True}),
    "both": Way("LoRA, r = 16, and the last layer", "both", {}, {"last_layers": 1}),
}


def config_of(task: str, name: str, rate: float, gsm8k: Path) -> dict[str, Any]:
    """The config of a way on a task, whose data are made here."""
    tree: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    quickstart = {name: str(ROOT / tree["data"][name]) for name in ("train", "eval")}
    others = data_of(gsm8k, quickstart["eval"])
    tree["model"]["name"] = str(ROOT / tree["model"]["name"])
    if task == "quickstart":
        tree["data"] = {"train": quickstart["train"], "eval": {"task": quickstart["eval"], "other": others["gsm8k"]}}
    else:
        tree["data"] = {
            "train": others["train"],
            "eval": {"task": others["held_out"], "other": others["quickstart"]},
        }
        tree["train"] = {"steps": 60, "global_batch": 4, "micro_batch": 2, "sequence_length": 512}
        tree["optim"] |= {"warmup_steps": 4}
        tree["eval"] = {"every": 1000}
        tree["parallel"] |= {"base_shard": "gpu"}  # faster here; what a rank holds is the quickstart's to show
    tree |= {"run": f"{task}-{name}-{rate:g}", "runs_dir": str(FOLDER / "runs"), "log": {"trackers": []}}
    tree["optim"] |= {"lr": rate}
    tree["eval"] |= {"tool_calls": False}
    for section, values in WAYS[name].settings().items():
        tree[section] = values if values is None or section == "lora" else {**tree.get(section, {}), **values}
    return tree


def data_of(gsm8k: Path, requests: str) -> dict[str, str]:
    """GSM8K as prompts with completions, and a few samples of each kind for the other task's held-out text."""
    made = {name: FOLDER / f"{name}.jsonl" for name in ("train", "held_out", "gsm8k", "quickstart")}

    def write(path: Path, lines: Iterable[str]) -> None:
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")

    FOLDER.mkdir(parents=True, exist_ok=True)
    questions = {name: [*_questions(gsm8k / f"{name}.jsonl")] for name in ("train", "test")}
    write(made["train"], questions["train"])
    write(made["held_out"], questions["test"][:NUM_HELD_OUT])
    write(made["gsm8k"], questions["test"][NUM_HELD_OUT : NUM_HELD_OUT + NUM_OTHER])
    write(made["quickstart"], Path(requests).read_text(encoding="utf-8").splitlines()[:NUM_OTHER])
    return {name: str(path) for name, path in made.items()}


def _questions(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        yield json.dumps({"prompt": sample["question"], "completion": sample["answer"]}, ensure_ascii=False)


def before(task: str, gsm8k: Path) -> dict[str, Any]:
    """What the base gives on a task before any training."""
    given = json.loads(_run("eval", config_of(task, "r16", 1e-3, gsm8k), "--json", output=subprocess.PIPE))["sets"]
    match = given["task"].get("exact_match")
    return {
        "loss": given["task"]["loss"],
        "other": given["other"]["loss"],
        "exact_match": match and match["correct"] / match["total"],
    }


def trial(task: str, kind: str, rate: float, gsm8k: Path) -> dict[str, Any]:
    """The held-out loss of a short run at this learning rate."""
    tree = config_of(task, TRIALS[kind][0], rate, gsm8k)
    tree["run"] = f"{task}-trial-{kind}-{rate:g}"
    tree["train"] |= {"steps": NUM_TRIAL_STEPS, "epochs": None}
    tree["data"]["eval"] = tree["data"]["eval"]["task"]
    tree["eval"] |= {"exact_match": False}
    _run("train", tree)
    *_, last = read_lines(_folder(tree) / EVALUATIONS_FILE)
    return {"loss": last["eval_loss"]}


def best_rate(task: str, kind: str, gsm8k: Path) -> float:
    """The learning rate whose trial has the lowest loss. While that is the smallest or the largest, the next one is tried too."""
    rates = list(TRIALS[kind][1])
    while True:
        for rate in rates:
            RESULTS.measure(f"{task} trial {kind} {rate:g}", partial(trial, task, kind, rate, gsm8k))
        results = RESULTS.read()
        best = min(rates, key=lambda rate: float(results[f"{task} trial {kind} {rate:g}"]["loss"]))
        if best == rates[-1]:
            rates.append(_next(rates[-2], best))
        elif best == rates[0]:
            rates.insert(0, _next(rates[1], best))
        else:
            return best


def _next(before: float, rate: float) -> float:
    return float(f"{rate * rate / before:.0e}")


def measure(task: str, name: str, rate: float, gsm8k: Path) -> dict[str, Any]:
    """Train one way, and what came of it."""
    tree = config_of(task, name, rate, gsm8k)
    _run("train", tree)
    return read_run(_folder(tree)) | {"rate": rate}


def _run(command: str, tree: Mapping[str, Any], *options: str, output: int | None = None) -> str:
    path = FOLDER / f"{tree['run']}.yaml"
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    words = [sys.executable, "-m", "dist_lora", command, str(path), "--nproc", "2", *options]
    return subprocess.run(words, cwd=ROOT, check=True, text=True, stdout=output).stdout


def _folder(tree: Mapping[str, Any]) -> Path:
    return FOLDER / "runs" / str(tree["run"])


def read_run(folder: Path) -> dict[str, Any]:
    """The table's numbers of a run that is done."""
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    steps = [*read_lines(folder / METRICS_FILE)]
    *_, last = read_lines(folder / EVALUATIONS_FILE)
    _, newest = max(step_folders(folder / "checkpoints").items())
    return {
        "loss": last["eval_loss/task"],
        "other": last["eval_loss/other"],
        "exact_match": last.get("eval_exact_match/task"),
        "trained": summary["trainable"],
        "peak_bytes": max(line["peak_bytes"] for line in steps),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "step_s": statistics.median(line["step_s"] for line in steps[1:]),
    }


def measure_all(task: str, names: Iterable[str], gsm8k: Path) -> None:
    """What the table of a task shows of these ways, and what their learning rates are chosen by."""
    RESULTS.measure(f"{task} before", partial(before, task, gsm8k))
    for name in names:
        rate = best_rate(task, WAYS[name].kind, gsm8k)
        known = RESULTS.read().get(f"{task} {name}")
        again = known is not None and known["rate"] != rate
        RESULTS.measure(f"{task} {name}", partial(measure, task, name, rate, gsm8k), again=again)


def table(task: str, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a task's table, of the ways that are measured."""
    rows = {WAYS[name].title: results[f"{task} {name}"] for name in WAYS if f"{task} {name}" in results}
    if not rows:
        return
    start = results[f"{task} before"]
    costs = task == "quickstart"  # a run on GSM8K shards nothing and generates no answers
    yield f"{TITLES[task]}:"
    yield ""
    yield "| way | learning rate | held-out loss | forgetting |" + (
        " exact match | trained weights | peak memory per rank | checkpoint | step |" if costs else ""
    )
    yield "|---" * (9 if costs else 4) + "|"
    yield f"| before training | | {start['loss']:.4f} | |" + (f" {start['exact_match']:.0%} | | | | |" if costs else "")
    for title, row in rows.items():
        line = f"| {title} | {row['rate']:g} | {row['loss']:.4f} | {row['other'] - start['other']:+.4f} |"
        if costs:
            line += f" {row['exact_match']:.0%} | {row['trained']:,} | {row['peak_bytes'] / 2**30:.2f} GiB |"
            line += f" {row['checkpoint_bytes'] / 1e6:.1f} MB | {row['step_s']:.1f} s |"
        yield line
    yield ""


def draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Each task's ways as points: what was learned against what was forgotten, the size of a point by the weights that it trains."""
    from matplotlib.figure import Figure

    tasks = [task for task in TITLES if any(f"{task} {name}" in results for name in WAYS)]
    if not tasks:
        sys.exit("no way is measured yet: --gsm8k FOLDER measures them")
    figure = Figure(figsize=(5.5 * len(tasks), 5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        start, places = results[f"{task} before"], dict[str, tuple[float, float]]()
        for name, way in WAYS.items():
            if (row := results.get(f"{task} {name}")) is None:
                continue
            places[name] = x, y = row["loss"], row["other"] - start["other"]
            axes.scatter(x, y, s=12 * math.log2(1 + row["trained"] / 1e4), color=COLOURS[way.kind], alpha=0.8)
        for names in near_one_another(places):
            place = max((places[name] for name in names), key=lambda point: point[1])
            axes.annotate(", ".join(names), place, xytext=(8, 4), textcoords="offset points", fontsize=8)
        axes.set_title(TITLES[task], loc="left", fontsize=10)
        axes.set_xlabel("held-out loss of the task")
        axes.set_ylabel("forgetting: loss on other text, less that before training")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def near_one_another(places: Mapping[str, tuple[float, float]]) -> list[list[str]]:
    """The names of points by groups in which each is near another, so that one label does for all: a few percent of the picture."""
    widths = [(max(of_axis) - min(of_axis)) or 1.0 for of_axis in zip(*places.values(), strict=True)]
    groups: list[list[str]] = []
    for name, place in places.items():
        near = [
            group
            for group in groups
            if any(
                all(abs(a - b) < NEAR * width for a, b, width in zip(place, places[other], widths, strict=True))
                for other in group
            )
        ]
        groups = [group for group in groups if group not in near] + [[*itertools.chain.from_iterable(near), name]]
    return [sorted(group, key=list(places).index) for group in groups]


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument(
        "--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl; without it nothing is trained"
    )
    parser.add_argument("--task", choices=tuple(TITLES), action="append", help="default: both")
    parser.add_argument("--picture", type=Path, help="draw what is measured to this file")
    wanted = parser.parse_args()
    if unknown := set(wanted.ways) - set(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}")
    tasks = wanted.task or [*TITLES]
    if wanted.gsm8k is not None:
        for task in tasks:
            measure_all(task, wanted.ways or [*WAYS], wanted.gsm8k)
    if wanted.picture is not None:
        draw(wanted.picture, RESULTS.read())
    for task in tasks:
        print("\n".join(table(task, RESULTS.read())))


if __name__ == "__main__":
    main()
