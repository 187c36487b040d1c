"""What tests of all folders share: tiny Llama models made on the spot, and one real small model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock

from tests import ROOT, turns
from tests.e2e.starter import ASKING

# The special tokens of Llama 3.1 that matter for training, in Meta's spelling.
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|finetune_right_pad_id|>",
    "<|python_tag|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Rotary embeddings of the three generations, as their config.json has them.
ROPE = {
    "llama3": {"rope_type": "default", "rope_theta": 500000.0},
    "llama31": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama32": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
CONTEXT = {"llama3": 8192, "llama31": 131072, "llama32": 131072}

TinyLlama = Callable[..., Path]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--turn``: see ``turns.py``."""
    parser.addoption(
        "--turn", metavar="TREE|all", help="cases marked turn: those of this tree (default: HEAD's), or all"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Know the turn before anything is collected."""
    turns.configure(config.getoption("--turn"))


def pytest_report_header() -> str:
    """Say the turn, by which a run can be repeated."""
    return f"turn: {os.environ[turns.VARIABLE]} (--turn), kills by seed {turns.seed_of('kills')}"


@pytest.hookimpl(tryfirst=True)  # the parts are dealt out of all that there is, whatever -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases whose turn it isn't."""
    if left := turns.left_out(items):
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(autouse=True)
def _process_is_kept() -> Iterator[None]:
    """What a test, or a command that it runs in this process, does to the environment and to signals ends with it.

    A command that a later test starts would begin in another environment, and could not be forked (see ``e2e/starter.py``);
    and a shell can't trap a signal that was ignored when it was started, as a run that was asked to stop leaves them.
    """
    handlers = {number: signal.getsignal(number) for number in ASKING}
    with patch.dict(os.environ):
        yield
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: what ``make`` writes into a folder of this name, once for all workers of this run."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not mark.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                mark.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_llama(made_once: MadeOnce) -> TinyLlama:
    """Makes folders of tiny Llama models with random weights; equal arguments give the same folder.

    ``tiny_llama(variant="llama31", num_layers=2, ffn=128, vocab=512, dtype="float32", shard_size=None, seed=0)``.
    Hidden size 64, 4 heads of 16, 2 heads of keys and values. ``variant`` is llama3 (RoPE not scaled), llama31 (factor
    8) or llama32 (factor 32, the head tied to the embedding). ``shard_size``, such as "100KB", gives several
    safetensors files and an index. The files are transformers' own. Nobody may write into the folder: copy it first.
    """

    def make(
        variant: str = "llama31",
        *,
        num_layers: int = 2,
        ffn: int = 128,
        vocab: int = 512,
        dtype: str = "float32",
        shard_size: str | None = None,
        seed: int = 0,
    ) -> Path:
        key = (variant, num_layers, ffn, vocab, dtype, shard_size, seed)
        return made_once("-".join(map(str, key)), lambda folder: save_tiny_llama(folder, *key))

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32, kept in .cache; the first use takes a minute."""
    folder = ROOT / ".cache" / "smollm2-135m-instruct"
    script = ROOT / "launch" / "smollm2.py"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # another worker of pytest may want it too
        done = subprocess.run([sys.executable, script, "--out", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def save_tiny_llama(
    folder: Path,
    variant: str,
    num_layers: int = 2,
    ffn: int = 128,
    vocab: int = 512,
    dtype: str = "float32",
    shard_size: str | None = None,
    seed: int = 0,
) -> None:
    """A tiny Llama and its tokenizer in ``folder``; see ``tiny_llama``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=ffn,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=CONTEXT[variant],
        rms_norm_eps=1e-5,
        rope_parameters=ROPE[variant],
        tie_word_embeddings=variant == "llama32",
        bos_token_id=256,
        eos_token_id=[257, 260],
        pad_token_id=262,
        # Larger than Llama's 0.02: in so few layers attention and feed-forward should weigh in the logits.
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones would hide a norm that is not loaded
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes (ids 0 to 255) and Llama 3's special tokens (ids from 256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    ).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["bos_token"] == begin, config
