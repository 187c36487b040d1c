"""Answers of models that know a few texts by heart: they come piece by piece, and end by themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml

from dist_lora.chat.chat import ChatModel
from dist_lora.chat.command import open_for_answers
from dist_lora.data.chat import encode_prompt
from dist_lora.evaluation.generate import TOKENS_AT_ONCE, generate, stop_ids_of
from dist_lora.world.world import World
from tests.e2e.conftest import learn
from tests.e2e.runs import ROOT, command, run

ANSWERS = {
    "the sea": "deep and blue",
    "a fox": "red, quick",
    "bread": "warm",
    "iron": "rusts",
    "bells": "ring at noon",
    "rain": "auf dem Dächle, flüsternd",  # letters of two tokens each
}
# The same question, and an answer that only what was said before can tell.
TALKS = {"snow": ("falls without a sound", "and melts"), "clocks": ("tick", "tock")}
TEXTS = ("the sea is deep", "a fox", "snow falls without a sound", "iron rusts")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [turns(*pair) for pair in ANSWERS.items()]
CHATS += [turns(asked, first, "and then?", second) for asked, (first, second) in TALKS.items()]


@pytest.fixture(scope="module")
def adapter(make_base, tmp_path_factory) -> Path:
    """An adapter that knows the eight chats."""
    run_folder = learn(tmp_path_factory.mktemp("chats"), make_base(), [{"messages": chat} for chat in CHATS])
    last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < 0.05
    return run_folder / "adapter"


@pytest.fixture(scope="module")
def trainee(adapter):
    return open_for_answers(adapter, base=None, world=World.alone(torch.device("cpu")))


@pytest.mark.parametrize("at_once", [1, 8])
def test_all_learnt_answers_end_by_themselves(trainee, monkeypatch, at_once: int) -> None:
    """Also where ids are read eight at a time, as on a GPU: what is computed after an answer's end is dropped."""
    monkeypatch.setitem(cast(dict[str, int], TOKENS_AT_ONCE), "cpu", at_once)
    tokenizer = trainee.base.tokenizer
    stop_ids = stop_ids_of(trainee.base.folder, tokenizer)
    assert stop_ids == {257, 260, 261}  # <|end_of_text|>, <|eot_id|>, <|eom_id|>
    wanted = [tokenizer.encode(chat[-1]["content"], add_special_tokens=False) for chat in CHATS]
    answers = generate(
        trainee.model,
        [encode_prompt(chat[:-1], tokenizer=tokenizer) for chat in CHATS],
        stop_ids=stop_ids,
        max_new_tokens=max(map(len, wanted)) + 2,
        world=World.alone(torch.device("cpu")),
    )
    assert answers == wanted


@pytest.mark.slow
def test_a_chat_streams_an_answer_before_the_next_question_is_asked(adapter) -> None:
    with subprocess.Popen(
        command("generate", adapter), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as chat:  # fmt: skip
        assert chat.stdin is not None and chat.stdout is not None
        heard = []
        for asked in ("snow", "", "and then?"):  # an empty line asks nothing
            chat.stdin.write(f"{asked}\n")
            chat.stdin.flush()
            if asked:
                heard.append(chat.stdout.readline())
        chat.stdin.close()
        rest = chat.stdout.read()
        assert chat.wait(30) == 0
    assert [line.rstrip("\n") for line in heard] == list(TALKS["snow"])
    assert rest == ""


def test_an_answer_is_shown_letter_by_letter_and_no_letter_in_halves(trainee) -> None:
    model = ChatModel(
        trainee.model, trainee.base.tokenizer, stop_ids_of(trainee.base.folder, trainee.base.tokenizer), 99
    )
    shown: list[str] = []
    answer = model.answer(turns("rain"), show=shown.append)
    assert answer == "".join(shown) == ANSWERS["rain"]
    assert shown == list(ANSWERS["rain"])  # a token of this tokenizer is a byte, so a piece is a letter


def test_one_prompt_is_answered_once_and_no_longer_than_it_may_be(here, adapter) -> None:
    code, out, _, _ = here("generate", adapter, "--prompt", "snow", "--max-new-tokens", 5)
    assert (code, out) == (0, "falls\n")


def test_an_empty_prompt_is_the_users_mistake(here, adapter) -> None:
    for prompt in ("", "  \n"):
        code, out, err, _ = here("generate", adapter, "--prompt", prompt)
        assert (code, out) == (2, "")
        assert err == "error: --prompt: is empty; give the text to answer, or leave the option out for a chat\n"


# Plain text on a base that has never seen a chat


@pytest.fixture(scope="module")
def plain_base(make_base) -> Path:
    """A base without a chat template whose rows of the chat's tokens are zero."""
    return make_base(zero_rows=(258, 259, 260, 261), has_template=False)


@pytest.fixture(scope="module")
def plain_run(plain_base, tmp_path_factory) -> Path:
    return learn(tmp_path_factory.mktemp("texts"), plain_base, [{"text": text} for text in TEXTS])


def test_a_base_that_learnt_plain_texts_stops_by_itself(plain_run) -> None:
    beginnings = [text[:3] for text in TEXTS]
    done = run("generate", plain_run / "adapter", input="\n".join(beginnings) + "\n")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [begun + rest for begun, rest in zip(beginnings, said, strict=True)] == list(TEXTS)


def test_a_chat_template_is_set_aside_for_an_adapter_of_plain_text(here, make_base, plain_run, tmp_path) -> None:
    # The same weights with a template: what the run was trained on decides, and the flag where nothing is known.
    base = make_base(zero_rows=(258, 259, 260, 261))
    adapter = plain_run / "adapter"
    assert here("generate", adapter, "--base", base, "--prompt", "a f", "--plain")[:2] == (0, "ox\n")
    config = yaml.safe_load((plain_run / "config.yaml").read_text())
    assert config["data"]["format"] == "auto"
    config["data"]["format"] = "text"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    assert here("generate", moved, "--base", base, "--prompt", "a f")[:2] == (0, "ox\n")
    code, _, err, _ = here("generate", moved, "--base", base, "--prompt", "a f", "--system", "be brief")
    assert code == 2 and "--system: plain text is continued here" in err


def test_chats_on_such_a_base_are_refused_before_it_is_loaded_and_told_once(plain_run, tmp_path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    settings = ("run=chats", f"data.train={data}", "data.chat_template=llama3", "train.steps=1")
    config = plain_run.parent.parent / "config.yaml"
    done = run("train", config, *settings, "--nproc", 2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1 and "loaded base" not in done.stderr
    for token in ("<|start_header_id|> (258)", "<|end_header_id|> (259)", "<|eot_id|> (260)"):
        assert f"{token}: its row of model.embed_tokens.weight is zero" in done.stderr
    assert "start_header_id|> (258): its row of lm_head" not in done.stderr
    allowed = run("train", config, *settings, "data.untrained_tokens=allow", "--nproc", 1)
    assert allowed.returncode == 0, allowed.stderr
    assert "data.untrained_tokens: allow: training although <|eot_id|> (260)" in allowed.stderr
    recorded = yaml.safe_load((plain_run.parent / "chats" / "config.yaml").read_text())
    assert recorded["data"]["untrained_tokens"] == "allow"


def test_an_adapter_is_asked_in_the_template_that_it_was_trained_in(here, make_base, tmp_path) -> None:
    # The base has none: without the run's own the question would be plain text, and a system message be refused.
    run_folder = learn(
        tmp_path, make_base(has_template=False), [{"messages": CHATS[0]}], "data.chat_template=llama3", "train.steps=60"
    )
    asked = ("--prompt", "the sea")
    assert here("generate", run_folder / "adapter", *asked)[:2] == (0, "deep and blue\n")
    assert here("generate", run_folder / "adapter", *asked, "--system", "be brief")[0] == 0


def test_a_file_of_prompts_is_answered_as_each_of_them_alone(here, adapter, tmp_path) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    records = [{"id": i, "messages": chat[:-1]} for i, chat in enumerate(CHATS)] + [{"prompt": "bread"}]
    asked.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ("generate", adapter, "--prompts", asked, "--out", out, "--max-new-tokens", 40)
    code, said, err, _ = here(*arguments)
    assert (code, said) == (0, f"{out}: {len(records)} answers\n"), err
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [chat[-1]["content"] for chat in CHATS] + ["warm"]
    assert answers == [{**record, "generated": text} for record, text in zip(records, wanted, strict=True)]
    assert here(*arguments)[0] == 2  # it is there already
    assert here("generate", adapter, "--prompts", asked)[0] == 2


def test_evals_predictions_are_all_samples_in_order_on_two_ranks(adapter, tmp_path) -> None:
    out = tmp_path / "predictions.jsonl"
    config = adapter.parent.parent.parent / "config.yaml"
    data = adapter.parent.parent.parent / "data.jsonl"
    done = run("eval", config, f"data.eval={data}", "--adapter", adapter, "--predictions", out, "--nproc", 2, "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["expected"] for line in lines] == [chat[-1]["content"] for chat in CHATS]
    assert all(line["generated"] == line["expected"] and line["is_correct"] for line in lines)
    assert all(chat[0]["content"] in line["prompt"] for chat, line in zip(CHATS, lines, strict=True))
    assert json.loads(done.stdout)["exact_match"] == {"correct": len(CHATS), "total": len(CHATS)}
