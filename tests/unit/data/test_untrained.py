"""Data whose special tokens the base never learned are refused with the tokens' names, before any rank loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_lora.base.index import open_index
from dist_lora.base.stored_shape import EMBEDDING, HEAD
from dist_lora.data import token_set
from dist_lora.data.chat import load_tokenizer
from dist_lora.data.token_cache import TokenRules, prepare_tokens
from dist_lora.data.token_set import TokenSet
from dist_lora.data.untrained import check_special_tokens, tokens_in_use
from dist_lora.errors import DataError, WeightsError
from dist_lora.herd.shape import read_shape
from dist_lora.world.world import World

# The ids of the tiny tokenizer: bytes are 0 to 255.
BEGIN, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, END_OF_MESSAGE, PAD, PYTHON = range(256, 264)
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
CHATS = [CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}]


@pytest.fixture
def base(tiny_llama, tmp_path: Path):
    """Makes a copy of a tiny model whose rows of some ids, in some tensors, have other values."""

    def make(
        *ids: int, tensors: tuple[str, ...] = (EMBEDDING, HEAD), value: float | torch.Tensor, **kind: object
    ) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_llama(**kind), folder)
        for file in folder.glob("*.safetensors"):
            weights = load_file(file)
            for name in set(tensors) & set(weights):
                weights[name][list(ids)] = (
                    value if isinstance(value, torch.Tensor) else torch.tensor(value).to(weights[name])
                )
            save_file(weights, file, metadata={"format": "pt"})
        return folder

    return make


def tokens_of(records: list[dict], folder: Path, **rules: object) -> TokenSet:
    data = folder.parent / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return prepare_tokens(
        str(data),
        which="train",
        rules=TokenRules(sequence_length=100, **rules),
        tokenizer=load_tokenizer(folder, chat_template=None),
        tokenizer_hash=str(folder),
        cache_dir=folder.parent / "cache",
        world=World.alone(torch.device("cpu")),
    )


def check(folder: Path, tokens: TokenSet, policy: str = "error", trained: tuple[int, ...] = ()) -> None:
    check_special_tokens(
        tokens,
        tokenizer=load_tokenizer(folder, chat_template=None),
        index=open_index(folder),
        is_tied=read_shape(folder).tied,
        on_untrained=policy,
        trained=trained,
        world=World.alone(torch.device("cpu")),
    )


def refusal(folder: Path, tokens: TokenSet) -> str:
    with pytest.raises(DataError) as raised:
        check(folder, tokens)
    return str(raised.value)


@pytest.mark.parametrize("shard_size", [None, "60KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, 1e-20])
def test_rows_of_zeros_are_named_with_the_ways_out(base, value, dtype, shard_size) -> None:
    folder = base(START_HEADER, END_HEADER, END_OF_TURN, value=value, dtype=dtype, shard_size=shard_size)
    text = refusal(folder, tokens_of(CHATS, folder))
    assert text == (
        "data.train needs tokens that this base was never trained on:\n"
        f"  <|start_header_id|> (258): its row of {EMBEDDING} is zero\n"
        f"  <|end_header_id|> (259): its row of {EMBEDDING} is zero\n"
        f"  <|eot_id|> (260): its row of {EMBEDDING} is zero\n"
        f"  <|eot_id|> (260): its row of {HEAD} is zero\n"
        "The rows of embedding and head stay frozen beside the adapters, so the model can't learn to read these tokens or to end an "
        'answer with them. Train their rows too: lora.train_tokens: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]; or '
        "use the model's Instruct version (like model.name: 3.1-8b-instruct); or train on plain text, which "
        "ends in <|end_of_text|> (data.format: text or prompt-completion); or set a data.chat_template without these "
        "tokens. To train anyway: data.untrained_tokens: allow"
    )


def test_rows_that_are_all_alike_are_named_with_those_they_equal(base) -> None:
    row = torch.randn(64)
    folder = base(END_OF_TURN, PAD, PYTHON, tensors=(EMBEDDING,), value=row)
    text = refusal(folder, tokens_of(CHATS, folder))
    assert f"<|eot_id|> (260): its row of {EMBEDDING} is also that of <|finetune_right_pad_id|>, <|python_tag|>" in text
    assert "start_header" not in text


def test_a_row_of_the_head_counts_for_what_is_written_alone(base) -> None:
    # As in real Instruct models: what no answer ever held has the head's row that it was made with.
    folder = base(BEGIN, START_HEADER, END_HEADER, PAD, tensors=(HEAD,), value=torch.randn(64))
    answers = tokens_of(CHATS, folder)
    check(folder, answers)
    text = refusal(folder, tokens_of(CHATS, folder, train_on="all"))
    assert f"<|start_header_id|> (258): its row of {HEAD} is also that of" in text
    assert "<|begin_of_text|> (256)" not in text


def test_a_tied_head_is_the_embedding_and_is_told_once(base) -> None:
    folder = base(END_OF_TURN, value=0.0, variant="llama32")
    text = refusal(folder, tokens_of(CHATS, folder))
    assert text.count("<|eot_id|> (260)") == 1 and EMBEDDING in text


@pytest.mark.parametrize("variant", ["llama31", "llama32"])
def test_an_instruct_model_passes(tiny_llama, tmp_path, variant) -> None:
    folder = shutil.copytree(tiny_llama(variant), tmp_path / "base")
    check(folder, tokens_of(CHATS, folder))


def test_plain_text_passes_on_a_base_without_chat_tokens(base) -> None:
    folder = base(START_HEADER, END_HEADER, END_OF_TURN, END_OF_MESSAGE, PAD, PYTHON, value=0.0)
    texts = tokens_of([{"text": "abc"}, {"text": "de"}], folder)
    check(folder, texts)
    # A name that a text holds as text is no token.
    check(folder, tokens_of([{"text": "abc <|eot_id|>"}], folder))


def test_the_end_of_a_text_need_not_be_readable_but_writable(base) -> None:
    # Nothing comes after it, so nothing ever reads it.
    folder = base(END_OF_TEXT, tensors=(EMBEDDING,), value=0.0)
    texts = tokens_of([{"text": "abc"}, {"text": "de"}], folder)
    check(folder, texts)
    shutil.rmtree(folder)
    folder = base(END_OF_TEXT, tensors=(HEAD,), value=0.0)
    assert "<|end_of_text|> (257): its row of lm_head.weight is zero" in refusal(folder, texts)


def test_the_opt_in_trains_and_says_so(base, caplog) -> None:
    folder = base(END_OF_TURN, value=0.0)
    with caplog.at_level("WARNING", logger="dist_lora"):
        check(folder, tokens_of(CHATS, folder), "allow")
    assert [record.message for record in caplog.records] == [
        f"data.untrained_tokens: allow: training although <|eot_id|> (260): its row of {tensor} is zero"
        for tensor in (EMBEDDING, HEAD)
    ]


def test_tokens_whose_rows_are_trained_are_no_longer_refused(base) -> None:
    folder = base(START_HEADER, END_HEADER, END_OF_TURN, value=0.0)
    tokens = tokens_of(CHATS, folder)
    text = refusal(folder, tokens)
    named = json.loads(text.partition("lora.train_tokens: ")[2].partition("; or")[0])
    ids = load_tokenizer(folder, chat_template=None).convert_tokens_to_ids(named)
    assert ids == [START_HEADER, END_HEADER, END_OF_TURN]
    check(folder, tokens, trained=tuple(ids))
    with pytest.raises(DataError, match=r"lora\.train_tokens: \[\"<\|eot_id\|>\"\]"):
        check(folder, tokens, trained=(START_HEADER, END_HEADER))


def test_a_trained_token_that_no_sample_has_is_a_warning(tiny_llama, tmp_path, caplog) -> None:
    folder = shutil.copytree(tiny_llama("llama31"), tmp_path / "base")
    with caplog.at_level("WARNING", logger="dist_lora"):
        check(folder, tokens_of(CHATS, folder), trained=(END_OF_TURN, PYTHON))
    assert [record.message for record in caplog.records] == [
        "lora.train_tokens: no sample of data.train has <|python_tag|> (263): nothing teaches what it means"
    ]


def test_an_added_token_that_is_not_special_is_looked_at_too(base) -> None:
    folder = base(264, 265, value=0.0)
    tokenizer = load_tokenizer(folder, chat_template=None)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    text = refusal(folder, tokens_of([{"text": "a <think> b"}], folder))
    assert f"<think> (264): its row of {EMBEDDING} is zero" in text


def test_a_file_that_became_shorter_is_told_as_damage(base) -> None:
    folder = base(END_OF_TURN, value=0.0)
    tokens, index = tokens_of(CHATS, folder), open_index(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(index.tensors[EMBEDDING].start + 1000)
    with pytest.raises(WeightsError, match="the file was truncated"):
        check_special_tokens(
            tokens,
            tokenizer=load_tokenizer(folder, chat_template=None),
            index=index,
            is_tied=False,
            on_untrained="error",
            world=World.alone(torch.device("cpu")),
        )


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7, 2**24])
def test_tokens_in_use_are_those_of_the_chosen_documents_read_and_written(monkeypatch, tokens_at_once) -> None:
    monkeypatch.setattr(token_set, "_TOKENS_AT_ONCE", tokens_at_once)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 6, 40)
    ids = generator.integers(0, 60, lengths.sum()).astype(np.uint32)
    is_target = generator.random(lengths.sum()) < 0.5
    starts = np.cumsum(lengths) - lengths
    whole = TokenSet(ids, is_target, starts, lengths, lengths, np.arange(40))
    some = whole.select(generator.permutation(40)[:13])
    documents = [some.document(i) for i in range(13)]
    wanted = range(20, 70)  # 60 to 69 are beyond the vocabulary of 60
    read = {int(n) for document, _ in documents for n in document[:-1]} & set(wanted)
    written = {int(n) for document, target in documents for n in document[1:][target[1:]]} & set(wanted)
    found = tokens_in_use(some, ids=wanted, vocab=60)
    assert (set(found.read), set(found.written)) == (read, written)
    assert 0 < len(read) < 40 and 0 < len(written) < 40


@pytest.mark.slow
def test_a_published_instruct_model_passes_with_its_chat_tokens_and_not_with_those_it_never_met(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2, chat_template=None)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    chat = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True, return_dict=False)

    def token_set(ids: list[int]) -> TokenSet:
        size = np.array([len(ids)])
        return TokenSet(np.array(ids, np.uint32), np.ones(len(ids), bool), np.array([0]), size, size - 1, np.array([0]))

    check(smollm2, token_set(chat))
    unmet = tokenizer.convert_tokens_to_ids(["<jupyter_text>", "<repo_name>"])
    text = refusal(smollm2, token_set([*plain, *unmet, *plain]))
    assert "<jupyter_text> (12): its row of model.embed_tokens.weight is also that of <jupyter_output>" in text
    assert "<repo_name>" not in text
