"""What a run evaluates on two ranks is what one process finds; the user's own judge sees the adapter of the step, and its end."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_lora.config.schema import Config
from dist_lora.lora.adapter_reader import read_adapter
from dist_lora.run_folder.records import read_lines
from dist_lora.run_folder.report import write_report
from dist_lora.train import judge as judge_module
from dist_lora.train.command import evaluate
from dist_lora.world.world import World
from tests.ranks.pool import RankFailed
from tests.ranks.runs import chats_settings, metrics, train_command

# It says what it was given, and prints the adapter's size as a number after a line of talk.
JUDGE = """
import json, os, pathlib, sys
adapter, step = pathlib.Path(sys.argv[1]), sys.argv[2]
told = {name: os.environ.get(name) for name in ("DIST_LORA_ADAPTER", "DIST_LORA_RUN", "DIST_LORA_STEP", "RANK", "WORLD_SIZE")}
told["files"] = sorted(path.name for path in adapter.iterdir())
told["weights"] = (adapter / "adapter_model.safetensors").read_bytes().hex()
pathlib.Path(sys.argv[3], f"seen-{step}.json").write_text(json.dumps(told))
print("judging ...")
print(json.dumps({"step": int(step), "words/mean": 1.5}))
"""


def with_(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**settings, **{k: {**settings.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}


def evaluations(runs_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs_dir / "it" / "evaluations.jsonl").read_text().splitlines()]


def chats(path: Path, numbers: range, times: int) -> str:
    told = [[("user", f"say {i}"), ("assistant", f"{i} " * times)] for i in numbers]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in told]
    path.write_text("\n".join(lines))
    return str(path)


def judged_by(folder: Path, script: str, *arguments: str) -> str:
    (folder / "judge.py").write_text(script)
    return " ".join([sys.executable, str(folder / "judge.py"), *arguments])


@pytest.fixture(scope="module")
def settings(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    """Five steps, evaluated before the first, after the fourth and after the last, on sets of 3 long and 5 short answers."""
    folder = tmp_path_factory.mktemp("evaluated")
    sets = {
        "long": chats(folder / "long.jsonl", range(20, 23), 6),
        "short": chats(folder / "short.jsonl", range(30, 35), 1),
    }
    return with_(
        chats_settings(tiny_llama("llama31"), folder, num_steps=5),
        data={"eval": sets},
        eval={"every": 4, "at_start": True, "exact_match": True, "max_new_tokens": 2},
    )


@pytest.fixture(scope="module")
def evaluated(ranks, settings, tmp_path_factory) -> Path:
    """The runs_dir of that run on two ranks, with a judge."""
    folder = tmp_path_factory.mktemp("judged")
    command = judged_by(folder, JUDGE, "{adapter}", "{step}", str(folder))
    with_judge = with_(settings, runs_dir=str(folder), eval={"command": command})
    assert ranks(2).run(train_command, with_judge) == ["", ""]
    return folder


def test_each_set_has_its_numbers_and_all_together_those_of_their_target_tokens(settings, evaluated, tmp_path) -> None:
    assert train_command(World.alone(), with_(settings, runs_dir=str(tmp_path))) == ""
    two, alone = evaluations(evaluated), evaluations(tmp_path)
    assert [line["step"] for line in two] == [line["step"] for line in alone] == [0, 4, 5]
    for ours, theirs in zip(two, alone, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
    # One set after the other, by the other command, of the adapter that the run has left.
    config = Config.model_validate(settings)
    counted = {}
    for name, file in settings["data"]["eval"].items():
        one = config.model_copy(update={"data": config.data.model_copy(update={"eval": file})})
        counted[name] = evaluate(one, World.alone(), adapter=evaluated / "it" / "adapter")
    last, first = two[-1], two[0]
    for name, found in counted.items():
        assert last[f"eval_loss/{name}"] == pytest.approx(found["loss"], abs=1e-5)
        assert first[f"eval_loss/{name}"] == pytest.approx(found["base_loss"], abs=1e-5)
        assert last[f"eval_exact_match/{name}"] == found["exact_match"]["correct"] / found["exact_match"]["total"]
    tokens = {name: found["target_tokens"] for name, found in counted.items()}
    assert tokens["long"] > 3 * tokens["short"] / 5
    mean = sum(found["loss"] * tokens[name] for name, found in counted.items()) / sum(tokens.values())
    assert last["eval_loss"] == pytest.approx(mean, abs=1e-5)
    both = evaluate(config, World.alone(), adapter=evaluated / "it" / "adapter")
    assert both["loss"] == pytest.approx(mean, abs=1e-5)
    assert both["exact_match"]["total"] == 8
    for name, found in counted.items():
        assert both["sets"][name] == {
            key: found[key] for key in ("loss", "perplexity", "target_tokens", "base_loss", "exact_match")
        }


def test_a_judge_gets_the_adapter_of_its_step_and_its_numbers_are_recorded(evaluated) -> None:
    assert [(line["eval_step"], line["eval_words/mean"]) for line in evaluations(evaluated)] == [
        (0, 1.5),
        (4, 1.5),
        (5, 1.5),
    ]
    seen = {step: json.loads((evaluated / f"seen-{step}.json").read_text()) for step in (0, 4, 5)}
    for step, told in seen.items():
        assert told["DIST_LORA_ADAPTER"] == str(evaluated / "it" / "judge" / f"step-{step}")
        assert (told["DIST_LORA_RUN"], told["DIST_LORA_STEP"]) == (str(evaluated / "it"), str(step))
        assert (told["RANK"], told["WORLD_SIZE"]) == (None, None)
        assert not Path(told["DIST_LORA_ADAPTER"]).exists()
    adapter = evaluated / "it" / "adapter"
    assert sorted([*seen[5]["files"], "learned.json"]) == sorted(path.name for path in adapter.iterdir())
    assert bytes.fromhex(seen[5]["weights"]) == (adapter / "adapter_model.safetensors").read_bytes()
    assert len({told["weights"] for told in seen.values()}) == 3
    assert sorted(path.name for path in (evaluated / "it" / "judge").iterdir()) == ["stderr.txt", "stdout.txt"]
    assert (evaluated / "it" / "judge" / "stdout.txt").read_text().startswith("judging ...\n")
    assert read_adapter(adapter).tensors


def test_the_answers_of_the_first_samples_are_kept_from_each_evaluation(evaluated) -> None:
    kept = list(read_lines(evaluated / "it" / "samples.jsonl"))
    steps = [line["step"] for line in evaluations(evaluated)]
    assert [line["step"] for line in kept] == [step for step in steps for _ in range(8)]
    assert len({line["prompt"] for line in kept}) == 8, "the samples are those of both ranks, each once"
    by_step = [[line["prompt"] for line in kept if line["step"] == step] for step in steps]
    assert all(prompts == by_step[0] for prompts in by_step)


def test_the_page_of_a_run_has_a_curve_for_each_set_and_for_each_number_of_the_judge(evaluated, tmp_path) -> None:
    page = write_report(evaluated / "it", out=tmp_path / "page.html").read_text()
    for label in ("all held-out sets", "long", "short", "words, held out", "mean"):
        assert f">{label}</text>" in page
    assert all(f"<td>{line['eval_loss/long']:.4f}</td>" in page for line in evaluations(evaluated))


@pytest.mark.slow
def test_a_judge_that_fails_ends_all_ranks_and_once_it_is_mended_the_run_goes_on_to_the_same_bytes(
    ranks, settings, evaluated, tmp_path
) -> None:
    broken = judged_by(
        tmp_path,
        "import os, sys\nif os.environ['DIST_LORA_STEP'] == '4': sys.exit('no such test set')\nprint('{\"a\": 1}')",
    )
    run = with_(settings, runs_dir=str(tmp_path), checkpoint={"every": 100}, eval={"command": broken})
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(train_command, run)
    assert failed.value.kinds == ["ConfigError", "RankError"]
    told = failed.value.texts[0]
    assert (
        f"eval.command: {sys.executable} has ended with exit code 1; the end of what it said:\n  no such test set"
        in told
    )
    assert "Step 4 is saved, and its evaluation is not recorded" in told and told == failed.value.texts[1]
    assert [line["step"] for line in evaluations(tmp_path)] == [0]
    mended = judged_by(tmp_path, "print('{\"a\": 2}')")
    assert ranks(2).run(train_command, with_(run, eval={"command": mended})) == ["", ""]
    assert [(line["step"], line["eval_a"]) for line in evaluations(tmp_path)] == [(0, 1), (4, 2), (5, 2)]
    name = Path("it", "adapter", "adapter_model.safetensors")
    assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()
    assert metrics(tmp_path / "it")[4]["loss"] == metrics(evaluated / "it")[4]["loss"]


def train_and_stop_while_judged(world: World, settings: dict[str, Any]) -> str:
    """``dist-lora train`` whose first rank gets SIGUSR1 while its judge runs."""
    run = judge_module.run_leashed

    def asked(words: list[str], *, is_to_stop: Any, **more: Any) -> Any:
        asks: list[int] = []

        def polled() -> bool:
            if not asks:
                os.kill(os.getpid(), signal.SIGUSR1)
            asks.append(1)
            return bool(is_to_stop())

        return run(words, is_to_stop=polled, **more)

    with mock.patch.object(judge_module, "run_leashed", asked):
        return train_command(world, settings)


@pytest.mark.slow
def test_a_request_to_stop_ends_the_judge_and_the_next_start_asks_it_again(
    ranks, settings, evaluated, tmp_path
) -> None:
    slow = judged_by(tmp_path, "import time; time.sleep(600)")
    run = with_(settings, runs_dir=str(tmp_path), eval={"command": slow, "at_start": False})
    told = ranks(2).run(train_and_stop_while_judged, run)
    saved = tmp_path / "it" / "checkpoints" / "step-00000004"
    assert (
        told
        == [f"interrupted by SIGUSR1 on rank 0 at step 4/5; saved {saved}. The same command resumes from there."] * 2
    )
    assert not (tmp_path / "it" / "evaluations.jsonl").exists()
    quick = judged_by(tmp_path, "print('{\"a\": 2}')")
    assert ranks(2).run(train_command, with_(run, eval={"command": quick})) == ["", ""]
    assert [(line["step"], line["eval_a"]) for line in evaluations(tmp_path)] == [(4, 2), (5, 2)]
    name = Path("it", "adapter", "adapter_model.safetensors")
    assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()


def test_a_judge_that_hangs_is_killed_at_its_limit_and_ends_all_ranks(ranks, settings, tmp_path) -> None:
    hangs = judged_by(tmp_path, "import time; print('{\"a\": 1}', flush=True); time.sleep(600)")
    run = with_(
        settings,
        runs_dir=str(tmp_path),
        data={"eval": None},
        eval={"command": hangs, "command_timeout": 0.5, "exact_match": False},
    )
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(train_command, run)
    assert failed.value.kinds == ["ConfigError", "RankError"]
    assert "has not ended within 0.5 s (eval.command_timeout), and was killed. Step 0 is saved" in failed.value.texts[0]
