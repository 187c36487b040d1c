"""Bad input of every kind: the exit code says whose fault it is, and one message says where and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, Done, command, run, write_lines

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


def chat(asked: str, answer: str, **more: object) -> dict[str, object]:
    """One record: a question and its answer."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture(scope="session")
def bad(tmp_path_factory, tiny_llama) -> Path:
    """A folder of bad data files and model folders."""
    folder = tmp_path_factory.mktemp("bad")
    good = [chat(f"say {i}", f"{i}") for i in range(10)]
    (folder / "empty.jsonl").write_text("")
    lines = [json.dumps(record) for record in good]
    lines[6] = lines[6].replace('"role"', "role", 1)
    (folder / "line7.jsonl").write_text("\n".join(lines) + "\n")
    write_lines(folder / "columns.jsonl", [{"question": "say 1", "reply": "1"}])
    write_lines(folder / "long.jsonl", [chat("say this: " + "x" * 60, "x") if i < 3 else r for i, r in enumerate(good)])
    write_lines(folder / "too_long.jsonl", [chat("say this: " + "x" * 60, "x") for _ in range(10)])
    write_lines(folder / "masked.jsonl", [chat(f"say {i}", f"{i}", weight=0) for i in range(10)])
    (folder / "list.yaml").write_text("- run\n- model\n")
    (folder / "torn.yaml").write_text("run: [x\n")

    sharded = tiny_llama("llama31", shard_size="100KB")
    for name in ("lacking", "cut", "of_meta", "no_template", "no_tokenizer", "torn_config"):
        shutil.copytree(sharded, folder / name)
    (folder / "lacking" / "model-00002-of-00006.safetensors").unlink()
    cut = folder / "cut" / "model-00003-of-00006.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    for path in (folder / "of_meta").glob("*.safetensors*"):
        path.unlink()
    (folder / "of_meta" / "consolidated.00.pth").write_bytes(b"weights")
    (folder / "params").mkdir()
    (folder / "params" / "params.json").write_text("{}")
    (folder / "params" / "consolidated.00.pth").write_bytes(b"weights")
    (folder / "no_template" / "chat_template.jinja").unlink()
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    (folder / "torn_config" / "config.json").write_text("{")
    return folder


@dataclass(frozen=True)
class Case:
    """What is typed after ``dist-lora train CONFIG``, the exit code, and what stderr must say."""

    name: str
    arguments: tuple[str, ...]
    code: int
    told: tuple[str, ...]


CASES = [
    # settings
    Case("several settings at once",
         ("lora.rnak=4", "data.trian=x", "train.steps=many", "optim.learning_rate=1", "parallel.engine=ddp"), 2,
         ("5 settings of", "lora.rnak=4 (argument): no such setting (nearest: rank)",
          "data.trian=x (argument): no such setting (nearest: train)",
          "train.steps=many (argument): found 'many', expected a whole number of at least 1",
          "optim.learning_rate=1 (argument): no such setting: another trainer's name; here it is optim.lr",
          "parallel.engine=ddp (argument): found 'ddp', expected auto, fsdp2")),
    Case("a target that is mistyped", ("lora.targets=[q_proj,v_porj]",), 2,
         (f"lora.targets[1]: 'v_porj' is not a linear of Llama ({LINEARS}); did you mean v_proj?",)),
    Case("the head of a tied model as a target", ("model.name={tied}", "lora.targets=[q_proj,lm_head]"), 2,
         ("lora.targets[1]: 'lm_head' stays frozen", "where they are tied, both are one matrix")),
    Case("a layer that the model lacks", ("lora.layers=[0,99]",), 2,
         ("lora.layers: found 99, expected 0-1 (the model has 2 layers)",)),
    Case("no shards and two ranks", ("parallel.engine=none", "--nproc", "2"), 2,
         ("parallel.engine: none runs one process and 2 were started", "Set parallel.engine=fsdp2")),
    Case("a number of processes that can't be", ("--nproc", "0"), 2, ("--nproc",)),
    # data
    Case("a data file that is missing", ("data.train={bad}/colums.jsonl",), 2,
         ("data.train: {bad}/colums.jsonl doesn't exist (nearest: columns.jsonl)",)),
    Case("a data file that is empty", ("data.train={bad}/empty.jsonl",), 2,
         ("{bad}/empty.jsonl: no records; at least one is expected",)),
    Case("a line that is not JSON", ("data.train={bad}/line7.jsonl",), 2,
         ("data.train: 1 of 10 records are broken:", "{bad}/line7.jsonl:7: not JSON", "one object per line is expected")),
    Case("other columns", ("data.train={bad}/columns.jsonl",), 2,
         ("{bad}/columns.jsonl:1: columns 'question', 'reply' match no known format", "messages needs", "alpaca needs",
          "prompt-completion needs", "text needs text")),
    Case("some answers truncated away", ("data.train={bad}/long.jsonl",), 2,
         ("data.train: 3 of 10 samples have no target tokens (30%)", "train.sequence_length = 64",
          "data.on_no_target: drop")),
    Case("every answer truncated away", ("data.train={bad}/too_long.jsonl",), 2,
         ("data.train: 10 of 10 samples have no target tokens (100%)", "before the first target")),
    Case("every answer truncated away and dropped", ("data.train={bad}/too_long.jsonl", "data.on_no_target=drop"), 2,
         ("data.train: none of 10 samples is left",)),
    Case("every answer masked", ("data.train={bad}/masked.jsonl",), 2,
         ("data.train: 10 of 10 samples have no target tokens (100%)", "all of them weight 0")),
    Case("held-out data that are missing", ("data.eval={bad}/nowhere.jsonl",), 2,
         ("data.eval: {bad}/nowhere.jsonl doesn't exist",)),
    Case("a chat template that is missing", ("data.chat_template={bad}/nowhere.jinja",), 2,
         ("data.chat_template: {bad}/nowhere.jinja is neither a file nor one of llama3, llama3.1, llama3.2, chatml",)),
    Case("a cache that can't be written", ("data.cache_dir={bad}/empty.jsonl/cache",), 2,
         ("data.cache_dir: {bad}/empty.jsonl/cache", "Not a directory")),
    # the model
    Case("no such model", ("model.name=llama-3.1-8b-instrct",), 2,
         ("model.name: found 'llama-3.1-8b-instrct'", "nearest: 3.1-8b-instruct")),
    Case("a model of the hub without a network", ("model.name=org/nothing",), 2,
         ("model.name: org/nothing: incomplete in the local cache, and can't be downloaded",)),
    Case("a model that lacks a shard", ("model.name={bad}/lacking",), 4,
         ("{bad}/lacking lacks 1 of the 6 files", "model-00002-of-00006.safetensors")),
    Case("a shard that is truncated", ("model.name={bad}/cut",), 4,
         ("{bad}/cut/model-00003-of-00006.safetensors is {short} bytes long and its header describes {length}",)),
    Case("weights in Meta's format", ("model.name={bad}/of_meta",), 4,
         ("{bad}/of_meta holds Meta's own format", "consolidated.00.pth", "Use the model's safetensors files")),
    Case("a folder in Meta's format", ("model.name={bad}/params",), 2,
         ("the folder {bad}/params has no config.json: this is Meta's own format (params.json)",)),
    Case("a config.json that is torn", ("model.name={bad}/torn_config",), 4,
         ("{bad}/torn_config/config.json is damaged: not JSON",)),
    Case("a model without its tokenizer", ("model.name={bad}/no_tokenizer",), 4,
         ("{bad}/no_tokenizer: the tokenizer can't be loaded",)),
    Case("chats and no chat template", ("model.name={bad}/no_template",), 2,
         ("the model's tokenizer has no chat template", "data.chat_template: llama3 | llama3.1 | llama3.2 | chatml | FILE")),
    # the run
    Case("runs that can't be written", ("runs_dir={bad}/empty.jsonl",), 2,
         ("the run's folder can't be written: Not a directory", "Set runs_dir")),
]  # fmt: skip


def assert_told_once(done: Done, code: int, told: tuple[str, ...]) -> None:
    """The exit code, one error, its first text once and the others in it."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count(told[0]) == 1, f"{told[0]!r} is not told once:\n{done.stderr}"
    assert all(text in done.stderr for text in told), done.stderr
    assert done.stderr.lower().count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def filled(bad, tiny_llama):
    """Puts the paths of the bad things in a text."""
    length = (tiny_llama("llama31", shard_size="100KB") / "model-00003-of-00006.safetensors").stat().st_size
    places = {"bad": bad, "tied": tiny_llama("llama32"), "length": f"{length:,}", "short": f"{length - 1000:,}"}
    return lambda text: text.format(**places)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_told_once_before_a_weight_is_read(case, config, filled, here, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(os, "preadv", refuse)
    done = here("train", config, f"run=bad-{CASES.index(case)}", *map(filled, case.arguments))
    assert_told_once(done, case.code, tuple(map(filled, case.told)))


ON_TWO_RANKS = ("several settings at once", "a line that is not JSON", "a shard that is truncated",
                "chats and no chat template", "runs that can't be written")  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ON_TWO_RANKS], ids=lambda case: case.name)
def test_two_ranks_tell_it_once(case, config, filled) -> None:
    done = run("train", config, f"run=bad-two-{CASES.index(case)}", *map(filled, case.arguments), "--nproc", 2)
    assert_told_once(done, case.code, tuple(map(filled, case.told)))
    assert " of 2 on " not in done.stderr, "what is everybody's fault is not blamed on a rank"


@pytest.mark.parametrize(
    "file, told",
    [
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        ("", "can't be read: Is a directory"),
        ("torn.yaml", "torn.yaml:2: not YAML"),
        ("list.yaml", "expected settings with names"),
    ],
)
def test_a_file_that_is_no_config_is_told(file, told, bad, here) -> None:
    assert_told_once(here("train", bad / file), 2, (told,))


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (("eval", "{config}"), 2, "data.eval: not set; give a file"),
        (("eval", "{config}", "data.eval=0.2", "--adapter", "{bad}/nowhere"), 2, "{bad}/nowhere: no such folder"),
        (("gather", "{bad}/nowhere", "--out", "{bad}/out"), 2, "{bad}/nowhere: no such folder. Give a run"),
        (("merge", "{bad}/nowhere", "--out", "{bad}/out"), 2, "{bad}/nowhere: no such folder"),
        (("merge", "{bad}", "--out", "{bad}/out"), 2, "expected an adapter's folder, with adapter_config.json and"),
        (("merge", "org/adapter", "--out", "{bad}/out"), 2, "hf download org/adapter --local-dir adapter"),
        (("report", "{bad}/empty.jsonl"), 2, "{bad}/empty.jsonl: is a file, not a folder; expected a run's folder"),
        (("train", "{config}", "run=bad-resume", "checkpoint.resume={bad}/nowhere"), 2,
         "checkpoint.resume: {bad}/nowhere: no such folder; expected a checkpoint's folder"),
        (("generate", "{bad}/nowhere", "--prompt", "hello"), 2, "{bad}/nowhere: no such folder"),
        (("generate", "{bad}/nowhere", "--prompt", " "), 2, "--prompt: is empty"),
        (("train", "{config}", "run=bad-start", "lora.start_from={bad}/nowhere"), 2,
         "{bad}/nowhere: no such folder"),
    ],
)  # fmt: skip
def test_other_commands_tell_it_once(arguments, code, told, config, bad, here) -> None:
    places = {"config": config, "bad": bad}
    done = here(*(argument.format(**places) for argument in arguments))
    assert_told_once(done, code, (told.format(**places),))


def test_a_wrong_setting_is_told_without_torch(config) -> None:
    told = (
        "import sys; from dist_lora.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    arguments = ["train", config, "lora.targets=[q_proj,v_porj]", "--nproc", "2"]
    done = subprocess.run(
        [sys.executable, "-c", told, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False False\n"), done.stderr
    assert "did you mean v_proj?" in done.stderr


# Runs that are there already


@pytest.mark.turn(of=2, among="whole runs")
def test_a_run_with_other_settings_is_refused_and_both_values_told(config, whole, here) -> None:
    done = here("train", config, "train.seed=3", "lora.alpha=8", "optim.lr=1e-3")
    assert_told_once(done, 2, ("train.seed: the run has 0, the config says 3", "lora.alpha: the run has 32.0, "
                               "the config says 8.0", "run=NAME"))  # fmt: skip
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.turn(of=2, among="whole runs")
def test_a_run_that_another_process_writes_is_refused_until_that_has_ended(config, here) -> None:
    first = subprocess.Popen(
        command("train", config, "run=twice", "train.steps=1000000", "--nproc", 1),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stderr is not None
        assert any(line.startswith("step 1/") for line in first.stderr)
        second = here("train", config, "run=twice")
        first.terminate()
        rest = first.stderr.read()
        assert first.wait(30) == 75, rest
    finally:
        first.kill()
    folder = config.parent / "runs" / "twice"
    assert_told_once(second, 2, (f"{folder}: process {first.pid} on ", "is writing this run now", "run=NAME"))
    assert_told_once(here("train", config, "run=twice", "train.steps=1"), 2, ("and train.steps is 1",))


# A run that is only looked at

SAMPLES = [
    ("messages", chat("say 1", "1"), (),
     "<|start_header_id|>user<|end_header_id|>\n\nsay 1<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n⟦1<|eot_id|>⟧"),
    ("all turns", {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}, (),
     "⟦b<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"),
    ("the last turn", {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}, ("data.train_on=last",),
     "\n\nb<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"),
    ("alpaca", {"instruction": "say", "input": "", "output": "yes"}, (),
     "user<|end_header_id|>\n\nsay<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"),
    ("prompt and completion", {"prompt": "2+2=", "completion": "4"}, (),
     "<|begin_of_text|>2+2=⟦4<|end_of_text|>⟧"),
    ("text", {"text": "two\nlines"}, (), "<|begin_of_text|>⟦two⏎\nlines<|end_of_text|>⟧"),
]  # fmt: skip


@pytest.mark.parametrize("record, arguments, shown", [pytest.param(*case[1:], id=case[0]) for case in SAMPLES])
def test_a_dry_run_shows_plan_and_targets_with_their_end_token_and_leaves_nothing(
    record, arguments, shown, config, here, tmp_path
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [record] * 4)
    done = here("train", config, "run=dry", f"data.train={data}", *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    plan, _, sample = done.stdout.partition("\n\n")
    assert [line.split()[0] for line in plan.splitlines()] == ["model", "adapters", "data", "training", "advice"]
    assert "139,584 frozen weights, 2 layers" in plan
    # rank 4; widths 64 and 128, 32 of keys and values: 4 (in + out) for each of the seven linears, in two layers
    sizes = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64]
    assert f"{4 * 2 * sum(sizes):,} trained weights" in plan
    assert "4 samples" in plan and "8 steps of 4 sequences" in plan
    assert shown in sample
    assert not (config.parent / "runs" / "dry").exists()


def test_a_dry_run_on_two_ranks_prints_once_and_one_of_bad_input_leaves_nothing(config, bad, here) -> None:
    done = run("train", config, "run=dry", "--dry-run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training  8 steps of 4") == done.stdout.count("⟦0<|eot_id|>⟧") == 1
    assert "2 ranks x micro_batch" in done.stdout
    refused = here("train", config, "run=dry", f"data.train={bad}/line7.jsonl", "--dry-run")
    assert_told_once(refused, 2, (f"{bad}/line7.jsonl:7: not JSON",))
    assert refused.stdout == ""
    assert not (config.parent / "runs" / "dry").exists()
