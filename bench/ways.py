"""Ways to adapt side by side: LoRA of several ranks and on several linears, partial freezing, norms, and both together.

    bash launch/quickstart.sh                        # once: SmolLM2-135M and the quickstart's data
    python -m bench.ways --gsm8k FOLDER              # every way that isn't measured yet: about 10 minutes each on 2 cores
    python -m bench.ways --gsm8k FOLDER r16 last-3   # some
    python -m bench.ways --print                     # the tables of what is measured

It may be interrupted: a way that is done stays so, in .cache/ways/results.json, and the next call goes on with the others. Every
way trains the same samples in the same order. ``forgetting`` is the loss on text of another kind, which nobody trained on: the
quickstart's requests for GSM8K, and GSM8K's questions with answers for the quickstart. Each kind of way has a learning rate of
its own (LEARNING_RATES), the best of those that were tried on the first task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / "ways"
RESULTS = FOLDER / "results.json"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
NUM_OTHER, NUM_HELD_OUT = 24, 64  # samples of the text of another kind, and of GSM8K's held-out questions

Kind = str
LEARNING_RATES: Mapping[Kind, Mapping[str, float]] = {
    "LoRA": {"quickstart": 2e-3, "gsm8k": 1e-3},
    "unfrozen": {"quickstart": 2e-4, "gsm8k": 1e-4},
    "norms": {"quickstart": 1e-2, "gsm8k": 5e-3},
    "both": {"quickstart": 2e-4, "gsm8k": 1e-4},
}


@dataclass(frozen=True)
class Way:
    """One way to adapt: what it is called in the table, and its settings beside the task's."""

    title: str
    kind: Kind
    lora: Mapping[str, Any] | None
    unfreeze: Mapping[str, Any] | None = None

    def settings(self, task: str) -> dict[str, Any]:
        """``lora``, ``train.unfreeze`` and ``optim.lr``."""
        return {
            "lora": None if self.lora is None else {"rank": 16, "alpha": 32, **self.lora},
            "train": {"unfreeze": None if self.unfreeze is None else dict(self.unfreeze)},
            "optim": {"lr": LEARNING_RATES[self.kind][task]},
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


def config_of(task: str, name: str, gsm8k: Path) -> dict[str, Any]:
    """The config of a way on a task; its data are made first by ``data_of``."""
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
        tree["eval"] = {"every": 1000}
    tree |= {"run": f"{task}-{name}", "runs_dir": str(FOLDER / "runs"), "log": {"trackers": []}}
    tree["eval"] |= {"at_start": True, "tool_calls": False}
    for section, values in WAYS[name].settings(task).items():
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


def measure(task: str, name: str, gsm8k: Path) -> dict[str, Any]:
    """Train one way, and what came of it."""
    tree = config_of(task, name, gsm8k)
    path = FOLDER / f"{tree['run']}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "dist_lora", "train", str(path), "--nproc", "2", "checkpoint.resume=auto"]
    subprocess.run(command, cwd=ROOT, check=True)
    return read_run(FOLDER / "runs" / tree["run"])


def read_run(folder: Path) -> dict[str, Any]:
    """The table's numbers of a run that is done."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = max((folder / "checkpoints").glob("step-*"))
    first, last = evaluations[0], evaluations[-1]
    return {
        "before": first["eval_loss/task"],
        "loss": last["eval_loss/task"],
        "other_before": first["eval_loss/other"],
        "other": last["eval_loss/other"],
        "exact_match": last.get("eval_exact_match/task"),
        "trained": summary["trainable"],
        "peak_bytes": max(summary["peak_bytes"]),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()),
        "step_s": statistics.median(line["step_s"] for line in steps[1:]),
    }


def read_results() -> dict[str, dict[str, Any]]:
    """What is measured, by ``TASK WAY``."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def table(task: str, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a task's table, of the ways that are measured."""
    rows = {name: results[f"{task} {name}"] for name in WAYS if f"{task} {name}" in results}
    if not rows:
        return
    first = next(iter(rows.values()))
    has_match = first["exact_match"] is not None
    yield f"{task}: held-out loss {first['before']:.4f} before training, {first['other_before']:.4f} on text of another kind."
    yield ""
    heads = ["way", "held-out loss", *(["exact match"] if has_match else []), "forgetting", "trained weights"]
    yield "| " + " | ".join([*heads, "peak memory", "checkpoint", "step"]) + " |"
    yield "|---" * (len(heads) + 3) + "|"
    for name, row in rows.items():
        match = [f"{row['exact_match']:.0%}"] if has_match else []
        cells = [
            WAYS[name].title,
            f"{row['loss']:.4f}",
            *match,
            f"{row['other'] - row['other_before']:+.4f}",
            f"{row['trained']:,}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['checkpoint_bytes'] / 1e6:.1f} MB",
            f"{row['step_s']:.1f} s",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--task", choices=("quickstart", "gsm8k"), action="append", help="default: both")
    parser.add_argument("--print", action="store_true", help="train nothing")
    wanted = parser.parse_args()
    tasks = wanted.task or ["quickstart", "gsm8k"]
    if not wanted.print:
        if wanted.gsm8k is None:
            parser.error("--gsm8k FOLDER is needed to train")
        for task in tasks:
            for name in wanted.ways or WAYS:
                results = read_results()
                if f"{task} {name}" not in results:
                    results[f"{task} {name}"] = measure(task, name, wanted.gsm8k)
                    unfinished = RESULTS.with_suffix(".partial")
                    unfinished.write_text(json.dumps(results, indent=1), encoding="utf-8")
                    unfinished.replace(RESULTS)
    for task in tasks:
        print("\n".join(table(task, read_results())))


if __name__ == "__main__":
    main()
