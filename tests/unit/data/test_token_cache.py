"""Tokenized once, by all ranks, kept by content; what the rules leave out is counted and told."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed import HashStore
from transformers import PreTrainedTokenizerFast

from dist_lora import pace
from dist_lora.data import token_cache
from dist_lora.data.chat import encode_sample
from dist_lora.data.token_cache import TokenRules, prepare_tokens
from dist_lora.data.token_set import split_eval
from dist_lora.errors import DataError, RankError, ReadError, SaveError
from dist_lora.files import new_file
from dist_lora.world.world import World
from tests import ROOT

RULES = TokenRules(sequence_length=200)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (Path(token_cache.__file__).parent / "templates/llama3.jinja").read_text()


def byte_tokenizer():
    """One token a byte, and Llama-3's special tokens."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)


@pytest.fixture
def encoded_samples(monkeypatch):
    """The records that were really encoded, in any thread."""
    seen = []

    def counting(record, **settings):
        seen.append(json.dumps(record))
        return encode_sample(record, **settings)

    monkeypatch.setattr(token_cache, "encode_sample", counting)
    return seen


def write(path, contents):
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return str(path)


def conversation(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepare(
    names, cache_dir, *, world=None, rules=RULES, tokenizer_hash="t", which="train", tokenizer=None, vocab=None
):
    return prepare_tokens(
        names,
        which=which,
        rules=rules,
        tokenizer=tokenizer or byte_tokenizer(),
        tokenizer_hash=tokenizer_hash,
        cache_dir=cache_dir,
        world=world or World.alone(torch.device("cpu")),
        vocab=vocab,
    )


def on_ranks(world_size, run, *, local_size=None):
    """``run(world)`` on threads that are the ranks of one world; the results or errors, by rank."""
    store = HashStore()
    each = local_size or world_size

    def one(rank):
        world = World(rank, world_size, rank % each, each, torch.device("cpu"), store=store)
        try:
            return run(world)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def content(token_set):
    return [
        (int(token_set.sample_ids[i]), *(part.tolist() for part in token_set.document(i)))
        for i in range(len(token_set))
    ]


def assert_one_clean_folder(cache_dir):
    names = sorted(path.name for path in (cache_dir / "tokens").iterdir())
    assert len(names) == 2 and names[1] == f"{names[0]}.lock"


def test_documents_are_the_encoded_samples(tmp_path):
    records = [conversation("a", "b"), conversation("é", "longer")]
    token_set = prepare(write(tmp_path / "d.jsonl", records), tmp_path / "cache")
    for index, record in enumerate(records):
        encoded = encode_sample(record, tokenizer=byte_tokenizer(), fmt="messages", train_on="assistant")
        assert content(token_set)[index] == (index, encoded.ids, encoded.is_target)
    assert token_set.num_targets.tolist() == [2, 7] and token_set.num_target_tokens == 9
    assert token_set.num_tokens == sum(token_set.lengths) == len(token_set.ids)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_records", [1, 7])
def test_ranks_encode_each_sample_once_and_all_see_the_same(world_size, num_records, tmp_path, encoded_samples):
    records = [conversation(str(i), "x" * i) for i in range(num_records)]
    name = write(tmp_path / "d.jsonl", records)
    alone = prepare(name, tmp_path / "alone")
    encoded_samples.clear()
    results = on_ranks(world_size, lambda world: prepare(name, tmp_path / "cache", world=world))
    assert [content(result) for result in results] == [content(alone)] * world_size
    assert sorted(encoded_samples) == sorted(map(json.dumps, records))
    assert_one_clean_folder(tmp_path / "cache")


def test_a_second_start_encodes_nothing_and_a_change_encodes_again(tmp_path, encoded_samples):
    records = [conversation("a", "b"), conversation("c", "d")]
    name = write(tmp_path / "d.jsonl", records)

    def encodes(**changes):
        encoded_samples.clear()
        prepare(name, tmp_path / "cache", **changes)
        return len(encoded_samples)

    assert [encodes(), encodes()] == [2, 0]
    assert [
        encodes(tokenizer_hash="another template"),
        encodes(rules=replace(RULES, sequence_length=100)),
    ] == [2, 2]
    assert [
        encodes(rules=replace(RULES, train_on="all")),
        encodes(rules=replace(RULES, on_no_target="drop")),
    ] == [2, 2]
    write(tmp_path / "d.jsonl", [*records[:1], conversation("c", "D")])
    assert [encodes(), encodes()] == [2, 0]
    write(tmp_path / "d.jsonl", records)
    assert encodes() == 0


def test_nodes_that_share_the_cache_share_the_work(tmp_path, encoded_samples):
    records = [conversation(str(i), "x") for i in range(8)]
    name = write(tmp_path / "d.jsonl", records)
    results = on_ranks(4, lambda world: prepare(name, tmp_path / "cache", world=world), local_size=2)
    assert [content(result) for result in results] == [content(results[0])] * 4
    assert len(encoded_samples) == 8
    assert_one_clean_folder(tmp_path / "cache")


def test_nodes_with_their_own_caches_each_do_the_work(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation(str(i), "x") for i in range(8)])

    def run(world):
        return prepare(name, tmp_path / f"node{world.world_rank // 2}", world=world)

    results = on_ranks(4, run, local_size=2)
    assert [content(result) for result in results] == [content(results[0])] * 4
    assert len(encoded_samples) == 16
    encoded_samples.clear()
    assert_one_clean_folder(tmp_path / "node1")
    for left in (tmp_path / "node1/tokens").iterdir():  # one node has lost its cache, the other has not
        subprocess.run(["rm", "-r", left], check=True)
    again = on_ranks(4, run, local_size=2)
    assert [content(result) for result in again] == [content(results[0])] * 4
    assert len(encoded_samples) == 8


def test_nodes_with_different_files_are_told(tmp_path):
    for node in range(2):
        write(tmp_path / f"d{node}.jsonl", [conversation("q", str(node))])
    results = on_ranks(
        4,
        lambda world: prepare(str(tmp_path / f"d{world.world_rank // 2}.jsonl"), tmp_path, world=world),
        local_size=2,
    )
    assert all("differ between this node, that of rank 2, and the first" in str(result) for result in results)


def test_two_jobs_at_once_on_one_cache_both_succeed_and_work_once(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation(str(i), "x") for i in range(20)])
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(on_ranks, 2, lambda world: prepare(name, tmp_path / "cache", world=world)) for _ in range(2)
        ]
        results = [result for job in jobs for result in job.result()]
    assert [content(result) for result in results] == [content(results[0])] * 4
    assert len(encoded_samples) == 20
    assert_one_clean_folder(tmp_path / "cache")


def test_without_locks_on_the_disk_two_jobs_still_succeed(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError("No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    name = write(tmp_path / "d.jsonl", [conversation(str(i), "x") for i in range(20)])
    both_began = threading.Barrier(2)

    def slow(record, **settings):
        if record["messages"][0]["content"] == "0":
            both_began.wait(30)
        return encode_sample(record, **settings)

    monkeypatch.setattr(token_cache, "encode_sample", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = (job.result() for job in [pool.submit(prepare, name, tmp_path / "cache") for _ in range(2)])
    assert content(first) == content(second)
    assert_one_clean_folder(tmp_path / "cache")


KILLED = """
import time
from tests.unit.data import test_token_cache as here
def hang(record, **settings):
    if record["messages"][0]["content"] == "5":
        print("in the middle", flush=True)
        time.sleep(600)
    return here.encode_sample(record, **settings)
here.token_cache.encode_sample = hang
here.prepare({name!r}, here.Path({cache!r}))
"""


@pytest.mark.slow
def test_a_killed_job_leaves_a_cache_that_the_next_one_uses(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation(str(i), "x") for i in range(10)])
    code = KILLED.format(name=name, cache=str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"in the middle\n"
        os.kill(job.pid, signal.SIGKILL)
    assert any(".building-" in path.name for path in (tmp_path / "cache/tokens").iterdir())
    assert len(prepare(name, tmp_path / "cache")) == 10
    assert len(encoded_samples) == 10
    assert_one_clean_folder(tmp_path / "cache")


def test_what_a_job_left_that_was_killed_after_its_tokens_were_published_goes_too(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation("a", "b")])
    prepare(name, tmp_path / "cache")
    (lock,) = (tmp_path / "cache/tokens").glob("*.lock")
    left = lock.with_name(f"{lock.stem}.building-5eed")
    left.mkdir()
    (left / "0.ids").write_bytes(b"1234")
    assert len(prepare(name, tmp_path / "cache")) == 1
    assert len(encoded_samples) == 1
    assert_one_clean_folder(tmp_path / "cache")


def test_a_published_folder_with_a_short_file_is_made_again(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation("a", "b")])
    whole = content(prepare(name, tmp_path / "cache"))
    (ids,) = (tmp_path / "cache/tokens").glob("*/ids")
    ids.write_bytes(ids.read_bytes()[:-4])
    assert content(prepare(name, tmp_path / "cache")) == whole
    assert len(encoded_samples) == 2


@pytest.mark.parametrize("summary", ["", "[]", '{"sizes": 7}', '{"sizes": {"ids": "x"}}', "[" * 100_000])
def test_a_published_folder_with_a_damaged_summary_is_made_again(tmp_path, encoded_samples, summary):
    name = write(tmp_path / "d.jsonl", [conversation("a", "b")])
    whole = content(prepare(name, tmp_path / "cache"))
    (file,) = (tmp_path / "cache/tokens").glob("*/summary.json")
    file.write_text(summary)
    assert content(prepare(name, tmp_path / "cache")) == whole
    assert len(encoded_samples) == 2


def test_a_long_sample_is_cut_from_the_right_and_its_targets_counted_after(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dist_lora")
    name = write(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "c" * 50}, {"prompt": "ab", "completion": "c"}])
    token_set = prepare(name, tmp_path, rules=replace(RULES, sequence_length=10))
    assert token_set.lengths.tolist() == [10, 5]
    assert token_set.num_targets.tolist() == [7, 2]
    assert "2 samples, 15 tokens, 9 trained on; truncated 1 sample to sequence_length=10, tokenized in" in caplog.text


def no_targets(tmp_path):
    """Ten samples: the second is cut before its answer, the fourth has none, the ninth has weight 0."""
    records = [conversation("q", "a") for _ in range(10)]
    records[1] = conversation("q" * 300, "a")
    records[3] = {"messages": records[3]["messages"][:1]}
    records[8]["messages"][1]["weight"] = 0
    return write(tmp_path / "d.jsonl", records)


@pytest.mark.parametrize("world_size", [1, 3])
def test_samples_without_targets_are_told_with_their_places(world_size, tmp_path):
    name = no_targets(tmp_path)
    errors = on_ranks(world_size, lambda world: prepare(name, tmp_path / "cache", world=world))
    assert [type(error) for error in errors] == [DataError] + [RankError] * (world_size - 1)
    assert {error.exit_code for error in errors} == {2}
    nothing = "it has nothing to train on (no assistant turn, or all of them weight 0)"
    assert str(errors[0]) == (
        "data.train: 3 of 10 samples have no target tokens (30%):\n"
        f"  {name}:2: its 325 tokens are truncated to train.sequence_length = 200, before the first target\n"
        f"  {name}:4: {nothing}\n"
        f"  {name}:9: {nothing}\n"
        "Set data.on_no_target: drop to leave them out, or a longer train.sequence_length."
    )


def test_samples_without_targets_are_left_out_on_request_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dist_lora")
    name = no_targets(tmp_path)
    for _ in range(2):  # told on every start, from the cache too
        caplog.clear()
        token_set = prepare(name, tmp_path / "cache", rules=replace(RULES, on_no_target="drop"))
        assert "dropped 3 of 10 without target tokens" in caplog.text
    assert token_set.sample_ids.tolist() == [0, 2, 4, 5, 6, 7, 9]


def test_a_target_that_is_a_documents_first_token_is_none(tmp_path):
    name = write(tmp_path / "d.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError, match=r"1 of 1 samples have no target tokens \(100%\)"):
        prepare(name, tmp_path, rules=replace(RULES, sequence_length=1))


def test_when_nothing_is_left_it_is_an_error_whatever_the_rules(tmp_path):
    name = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q"}]}, conversation("q" * 300, "a")])
    with pytest.raises(DataError) as caught:
        prepare(name, tmp_path, rules=replace(RULES, on_no_target="drop", on_too_long="drop"))
    assert "none of 2 samples is left: 1 are longer than train.sequence_length = 200, 1 have no" in str(caught.value)
    assert f"{name}:1: it has nothing to train on" in str(caught.value) and f"{name}:2: 325 tokens" in str(caught.value)


def test_samples_that_are_too_long_are_dropped_or_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dist_lora")
    name = write(tmp_path / "d.jsonl", [conversation("q", "a"), conversation("q", "a" * 300)])
    assert len(prepare(name, tmp_path / "cache", rules=replace(RULES, on_too_long="drop"))) == 1
    assert "dropped 1 of 2 too long" in caplog.text
    with pytest.raises(DataError) as caught:
        prepare(name, tmp_path / "cache", rules=replace(RULES, on_too_long="error"))
    assert str(caught.value) == (
        f"data.train: 1 of 2 samples are longer than train.sequence_length = 200:\n  {name}:2: 325 tokens\n"
        "Set data.on_too_long: truncate or drop, or a longer train.sequence_length."
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_broken_records_of_all_ranks_are_told_together(world_size, tmp_path):
    lines = [json.dumps(conversation("q", "a"))] * 20
    for number in (2, 5, 6, 9, 12, 13, 20):
        lines[number - 1] = "{oops"
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    errors = on_ranks(world_size, lambda world: prepare(str(tmp_path / "d.jsonl"), tmp_path / "cache", world=world))
    told = str(errors[0]).splitlines()
    assert told[0] == "data.train: 7 of 20 records are broken:"
    assert [line.split(": ")[0].rpartition(":")[2] for line in told[1:6]] == ["2", "5", "6", "9", "12"]
    assert told[6:] == ["  and 2 more"]
    assert not list((tmp_path / "cache/tokens").glob("*/summary.json"))


def test_what_one_rank_cannot_read_ends_all(tmp_path):
    errors = on_ranks(3, lambda world: prepare(str(tmp_path / "none.jsonl"), tmp_path, world=world))
    assert [type(error) for error in errors] == [DataError, RankError, RankError]
    assert all("none.jsonl doesn't exist" in str(error) for error in errors)


def test_a_tokenizer_without_a_template_ends_all_before_anything_is_encoded(tmp_path, encoded_samples):
    name = write(tmp_path / "d.jsonl", [conversation("q", "a")])

    def run(world):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        return prepare(name, tmp_path / "cache", world=world, tokenizer=tokenizer)

    errors = on_ranks(2, run)
    assert all("data.chat_template: llama3 | llama3.1 | llama3.2 | chatml | FILE" in str(error) for error in errors)
    assert encoded_samples == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    name = write(tmp_path / "d.jsonl", [conversation("q", "a")])
    with pytest.raises(SaveError, match=r"data\.cache_dir: .*file/tokens can't be written: Not a directory"):
        prepare(name, tmp_path / "file")


@pytest.mark.parametrize("stage", ["_open_published", "_write", "new_file"])
def test_a_disk_that_fills_is_told_at_every_stage(stage, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    @contextmanager
    def filling(path):
        with new_file(path):
            yield full

    name = write(tmp_path / "d.jsonl", [conversation("q", "a")])
    monkeypatch.setattr(f"dist_lora.data.token_cache.{stage}", filling if stage == "new_file" else full)
    with pytest.raises(SaveError, match=r"data\.cache_dir: .*No space left on device"):
        prepare(name, tmp_path / "cache")


def test_a_source_that_can_not_be_read_is_told_as_one(tmp_path, monkeypatch):
    def faulty(*args):
        raise OSError(5, "Input/output error")

    name = write(tmp_path / "d.jsonl", [conversation("q", "a")])
    monkeypatch.setattr("dist_lora.data.sources._file_chunks", faulty)
    with pytest.raises(ReadError, match=r"data\.train: .*d\.jsonl can't be read: Input/output error"):
        prepare(name, tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr("dist_lora.data.text_files.JsonLines.__getitem__", faulty)
    with pytest.raises(ReadError, match=r"d\.jsonl:1: can't be read: Input/output error"):
        prepare(name, tmp_path / "cache")


def test_a_source_that_is_written_while_it_is_read_is_told_and_nothing_is_published(tmp_path, monkeypatch):
    name = write(tmp_path / "d.jsonl", [conversation("q", "a")])

    def appending(*args, **settings):
        with (tmp_path / "d.jsonl").open("a") as file:
            file.write(json.dumps(conversation("b", "c")) + "\n")
        return encode_sample(*args, **settings)

    monkeypatch.setattr(token_cache, "encode_sample", appending)
    with pytest.raises(ReadError, match=r"d\.jsonl changed while it was read"):
        prepare(name, tmp_path / "cache")
    assert not list((tmp_path / "cache/tokens").glob("*/summary.json"))
    monkeypatch.undo()
    assert len(prepare(name, tmp_path / "cache")) == 2


def test_the_cache_goes_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_LORA_CACHE", str(tmp_path / "elsewhere"))
    prepare(write(tmp_path / "d.jsonl", [conversation("q", "a")]), None)
    assert_one_clean_folder(tmp_path / "elsewhere")
    monkeypatch.delenv("DIST_LORA_CACHE")
    assert token_cache.default_cache_dir() == Path.home() / ".cache/dist_lora"


def test_long_work_and_long_waits_are_reported(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="dist_lora")
    monkeypatch.setattr(token_cache, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(pace, "EVERY_S", 0.0)
    name = write(tmp_path / "d.jsonl", [conversation(str(i), "x") for i in range(3)])
    waiting = threading.Event()
    monkeypatch.setattr(token_cache.time, "sleep", lambda seconds, sleep=time.sleep: (waiting.set(), sleep(seconds)))

    def until_the_other_waits(record, **settings):
        waiting.wait(30)
        return encode_sample(record, **settings)

    monkeypatch.setattr(token_cache, "encode_sample", until_the_other_waits)
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(prepare, name, tmp_path / "cache") for _ in range(2)]:
            job.result()
    assert "  tokenizing data.train: 1 of 3 (33%), about " in caplog.text
    assert "another job is tokenizing the same data; waiting for it" in caplog.text
    assert "3 samples, 78 tokens, 6 trained on, from the cache" in caplog.text


def test_train_and_eval_of_one_run_do_not_meet(tmp_path):
    names = {which: write(tmp_path / f"{which}.jsonl", [conversation(which, "a")]) for which in ("train", "eval")}

    def run(world):
        return [content(prepare(names[which], tmp_path / "c", world=world, which=which)) for which in names]

    (train, held_out), other = on_ranks(2, run)
    assert [train, held_out] == other and train != held_out


def test_held_out_documents_depend_on_content_and_seed_alone(tmp_path):
    texts = [f"document {i}" for i in range(40)]
    one = prepare(write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path)
    other = prepare(write(tmp_path / "b.jsonl", [{"text": text} for text in reversed(texts)]), tmp_path)

    def ids(token_set):
        return sorted(document for _, document, _ in content(token_set))

    train, held_out = split_eval(one, fraction=0.1, seed=7)
    assert len(held_out) == 4 and ids(train) + ids(held_out) != ids(one)
    assert sorted(ids(train) + ids(held_out)) == ids(one)
    assert ids(held_out) == ids(split_eval(other, fraction=0.1, seed=7)[1])
    assert ids(held_out) != ids(split_eval(one, fraction=0.1, seed=8)[1])
    assert held_out.num_tokens + train.num_tokens == one.num_tokens
    assert len(split_eval(one, fraction=0.001, seed=7)[1]) == 1
    assert len(split_eval(one, fraction=0.999, seed=7)[0]) == 1
    with pytest.raises(DataError, match=r"data\.eval: 0\.5 of 1 document can't be held out; name a file"):
        split_eval(one.select(np.array([3])), fraction=0.5, seed=0)


def test_many_samples_that_are_cut_are_a_warning_that_says_what_they_lose(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dist_lora")
    within = [{"prompt": "ab", "completion": "c" * 50}] * 3
    two = [
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("user", "a"), ("assistant", "b"), ("user", "c" * 40), ("assistant", "d"))
            ]
        }
    ]
    rules = replace(RULES, sequence_length=20)
    prepare(write(tmp_path / "w.jsonl", [*within, {"prompt": "a", "completion": "b"}]), tmp_path, rules=rules)
    assert "truncated 3 samples to sequence_length=20" in caplog.text and "were cut" not in caplog.text
    for name, samples, told in (
        (
            "d",
            [*within, *within],
            "6 of 6 samples were cut to sequence_length=20: 6 lost the end of an answer and its end token.",
        ),
        ("m", two * 5, "5 of 5 samples were cut to sequence_length=60: 5 lost a whole answer."),
    ):
        for _ in range(2):  # made, and from the cache
            caplog.clear()
            rules = replace(RULES, sequence_length=20 if name == "d" else 60)
            prepare(write(tmp_path / f"{name}.jsonl", samples), tmp_path, rules=rules)
            (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
            assert f"data.train: {told} A longer train.sequence_length keeps it" in warning.getMessage()


@pytest.mark.parametrize(
    "is_target, limit, expected",
    [
        ([0, 1, 1, 1], 2, (True, False)),  # within the only answer
        ([0, 1, 0, 1], 2, (False, True)),  # between two
        ([0, 1, 1, 0, 1], 2, (True, True)),  # within one, and another follows
        ([0, 1, 0, 0], 2, (False, False)),  # what follows isn't trained on
        ([0, 0, 1, 1], 2, (False, True)),  # just before one
    ],
)
def test_what_a_cut_takes_away_is_counted_by_answers(is_target, limit, expected):
    assert token_cache._what_is_lost([bool(target) for target in is_target], limit) == expected
