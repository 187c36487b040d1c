"""The comparison of ways to adapt: what it trains is what its table calls it, and what is measured stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from bench import ways
from bench.kept import Kept
from dist_lora.config.load import load_config

RATE = {"LoRA": 5e-3, "norms": 1e-2}  # the last of those that are tried first, and neither the first nor the last


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(ways, "FOLDER", tmp_path / "ways")
    monkeypatch.setattr(ways, "RESULTS", Kept(tmp_path / "ways" / "results.json"))
    monkeypatch.setattr(ways, "ROOT", tmp_path)
    quickstart = tmp_path / ".cache" / "quickstart"
    quickstart.mkdir(parents=True)
    for name in ("train", "eval"):
        (quickstart / f"{name}.jsonl").write_text('{"prompt": "a request", "completion": "a call"}\n' * 30)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"question": f"{name} {i}", "answer": f"#### {i}"}) + "\n" for i in range(100))
        )
    return tmp_path


def test_each_way_is_a_config_and_all_but_what_is_adapted_is_equal(folder) -> None:
    for task in ways.TITLES:
        trees = {name: ways.config_of(task, name, 1e-3, folder) for name in ways.WAYS}
        for name, tree in trees.items():
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tree))
            config = load_config(path)
            assert (not config.lora.has_adapters) == (ways.WAYS[name].kind in ("unfrozen", "norms"))
            assert (config.train.unfreeze is None) == (ways.WAYS[name].kind == "LoRA")
            del tree["lora"], tree["train"]["unfreeze"], tree["run"]
        assert all(tree == trees["r16"] for tree in trees.values())


def test_what_is_forgotten_is_measured_on_samples_of_the_other_task_that_none_trains_on(folder) -> None:
    data = ways.config_of("gsm8k", "r16", 1e-3, folder)["data"]
    texts = {name: Path(path).read_text() for name, path in [("train", data["train"]), *data["eval"].items()]}
    other = ways.config_of("quickstart", "r16", 1e-3, folder)["data"]["eval"]["other"]
    assert (len(texts["task"].splitlines()), len(texts["other"].splitlines())) == (ways.NUM_HELD_OUT, ways.NUM_OTHER)
    assert "a request" in texts["other"]
    assert not {*texts["train"].splitlines()} & {*texts["task"].splitlines()}
    assert not {*Path(other).read_text().splitlines()} & {*texts["task"].splitlines(), *texts["train"].splitlines()}


def test_a_kinds_rate_is_the_best_of_its_trials_and_what_is_measured_stays(folder, monkeypatch, capsys) -> None:
    done: list[str] = []

    def before(task: str, gsm8k: Path) -> dict[str, Any]:
        done.append(f"{task} before")
        return {"loss": 2.0, "other": 1.5, "exact_match": 0.25}

    def trial(task: str, kind: str, rate: float, gsm8k: Path) -> dict[str, Any]:
        done.append(f"{task} trial {kind} {rate:g}")
        return {"loss": abs(rate - RATE[kind])}

    def measure(task: str, name: str, rate: float, gsm8k: Path) -> dict[str, Any]:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(f"{task} {name}")
        row = {"loss": 0.5, "other": 1.75, "exact_match": 0.5, "trained": 4096, "peak_bytes": 2**30}
        return row | {"checkpoint_bytes": 5e6, "step_s": 2.04, "rate": rate}

    for name, function in {"before": before, "trial": trial, "measure": measure}.items():
        monkeypatch.setattr(ways, name, function)
    command = ["ways", "--gsm8k", str(folder), "--task", "quickstart", "r16", "norms"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        ways.main()
    first = [f"quickstart trial LoRA {rate:g}" for rate in (*ways.TRIALS["LoRA"][1], 1e-2)]
    second = [f"quickstart trial norms {rate:g}" for rate in ways.TRIALS["norms"][1]]
    assert done == ["quickstart before", *first, "quickstart r16", *second]
    capsys.readouterr()
    done.clear()
    ways.main()  # goes on with what was interrupted
    assert done == ["quickstart norms"]
    cells = "0.5000 | +0.2500 | 50% | 4,096 | 1.00 GiB | 5.0 MB | 2.0 s |"
    assert capsys.readouterr().out.splitlines()[-4:-1] == [
        "| before training | | 2.0000 | | 25% | | | | |",
        f"| {ways.WAYS['r16'].title} | {RATE['LoRA']:g} | {cells}",
        f"| {ways.WAYS['norms'].title} | {RATE['norms']:g} | {cells}",
    ]


def test_points_that_lie_together_have_one_label() -> None:
    places = {"a": (0.0, 0.0), "b": (10.0, 1.0), "c": (9.4, 1.0), "d": (9.7, 1.0), "e": (9.7, 0.5)}
    assert ways.near_one_another(places) == [["a"], ["b", "c", "d"], ["e"]]
    assert ways.near_one_another({"a": (1.0, 1.0)}) == [["a"]]


def test_the_picture_has_a_panel_for_each_task_with_a_way_that_is_measured(tmp_path) -> None:
    with pytest.raises(SystemExit, match="no way is measured yet"):
        ways.draw(tmp_path / "it.png", {"gsm8k before": {"loss": 2.0, "other": 1.5}})
    of_task = {"before": {"loss": 2.0, "other": 1.5}, "r16": {"loss": 0.5, "other": 1.75, "trained": 4096}}
    widths = []
    for tasks in (["gsm8k"], ["gsm8k", "quickstart"]):
        ways.draw(tmp_path / "it.png", {f"{task} {name}": row for task in tasks for name, row in of_task.items()})
        with Image.open(tmp_path / "it.png") as picture:
            widths.append(picture.width)
    assert widths[1] == 2 * widths[0]
