"""Ours against PEFT on transformers' own Llama: the same batches, the same first adapter, a loop anyone would write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_lora.config.load import load_config
from dist_lora.config.schema import LINEARS, Config
from dist_lora.train.build import open_base
from dist_lora.train.command import loader_of, tokens_of
from dist_lora.world.world import World
from tests.e2e.runs import run

NUM_STEPS, WARMUP_STEPS, WEIGHT_DECAY = 10, 3, 0.05
MAX_GRAD_NORM = 0.2  # below the norm of every step, which the test checks
RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Trial:
    """One run of ours and what it began with."""

    base: Path
    config: Path
    first_adapter: Path
    run: Path
    lr: float

    def lines(self) -> list[dict[str, Any]]:
        """Its metrics, step by step."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def dist_lora(*arguments: object, timeout_s: float = 900) -> str:
    done = run(*arguments, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chats(num: int, first: int, *, longest: int) -> list[list[dict[str, str]]]:
    """Conversations of different lengths; every third has two turns."""
    made = []
    for i in range(first, first + num):
        turns = [
            {"role": "user", "content": f"Count from {i}."},
            {"role": "assistant", "content": ", ".join(str(i + k) for k in range(i * 5 % longest + 1))},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "Again"}, {"role": "assistant", "content": str(i)}]
        made.append(turns)
    return made


def write_chats(path: Path, conversations: list[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))


def peft_model(base: Path) -> Any:
    """A model of transformers with fresh adapters of PEFT beside all seven linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def draw_adapter(model: Any) -> None:
    """A as PEFT draws it, and B off zero, so that both have a gradient from the first step."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            bound = 0.05 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)


# What each model is trained with: between them packing, padding, recomputation, one and several ranks.
TRIALS: dict[str, dict[str, Any]] = {
    "llama3": {"packing": False, "nproc": 2, "lr": 5e-3},
    "llama31": {"packing": True, "nproc": 2, "lr": 5e-3, "activation_checkpointing": True},
    "llama32": {"packing": True, "nproc": 2, "lr": 5e-3},
    # Through 30 layers rounding alone makes a relative 4e-6 of the first loss, which AdamW's larger steps amplify.
    "smollm2": {"packing": False, "nproc": 1, "lr": 5e-4},
}


@pytest.fixture(scope="module")
def trial(request, tmp_path_factory) -> Iterator[Callable[[str], Trial]]:
    """``trial(name)``: a finished run of ``dist-lora train`` from an adapter that PEFT drew; run at its first use."""
    made: dict[str, Trial] = {}

    def make(name: str) -> Trial:
        if name not in made:
            is_real = name == "smollm2"
            base = request.getfixturevalue("smollm2") if is_real else request.getfixturevalue("tiny_llama")(name)
            made[name] = _run(name, base, tmp_path_factory.mktemp(name), longest=4 if is_real else 12)
        return made[name]

    yield make


def _run(name: str, base: Path, folder: Path, *, longest: int) -> Trial:
    write_chats(folder / "train.jsonl", chats(13, 0, longest=longest))
    write_chats(folder / "eval.jsonl", chats(7, 40, longest=longest))
    model = peft_model(base)
    draw_adapter(model)
    model.save_pretrained(folder / "first")
    chosen = TRIALS[name]
    config = folder / "config.yaml"
    config.write_text(
        f"run: trial\nruns_dir: {folder}/runs\nmodel: {{name: {base}, dtype: fp32}}\n"
        f"lora: {{rank: {RANK}, alpha: {ALPHA}, start_from: {folder}/first}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, cache_dir: {folder}/cache}}\n"
        f"train: {{steps: {NUM_STEPS}, global_batch: 4, micro_batch: 1, sequence_length: 128, seed: 7,\n"
        f"        packing: {str(chosen['packing']).lower()},\n"
        f"        activation_checkpointing: {str(chosen.get('activation_checkpointing', False)).lower()}}}\n"
        f"optim: {{lr: {chosen['lr']}, schedule: cosine, warmup_steps: {WARMUP_STEPS}, weight_decay: {WEIGHT_DECAY},\n"
        f"        max_grad_norm: {MAX_GRAD_NORM}}}\n"
        f"log: {{trackers: []}}\n"
    )
    dist_lora("train", config, "--nproc", chosen["nproc"])
    return Trial(base, config, folder / "first", folder / "runs" / "trial", chosen["lr"])


def padded_batches(config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, attention mask and labels ``(rows, longest)`` of each step's documents; -100 is no target."""
    base = open_base(config, World.alone())
    tokens, _ = tokens_of(config, base, World.alone())
    row_of = {int(sample): row for row, sample in enumerate(tokens.sample_ids)}
    loader = loader_of(config, tokens, World.alone())
    for step in range(NUM_STEPS):
        documents = [tokens.document(row_of[sample]) for sample in loader.batch(step).sample_ids]
        longest = max(len(ids) for ids, _ in documents)
        ids, mask, labels = (torch.full((len(documents), longest), fill) for fill in (0, 0, -100))
        for row, (of_document, is_target) in enumerate(documents):
            length = len(of_document)
            ids[row, :length] = torch.from_numpy(of_document.astype("int64"))
            mask[row, :length] = 1
            labels[row, :length] = ids[row, :length].masked_fill(~torch.tensor(is_target), -100)
        yield ids, mask, labels


def train_with_peft(trial: Trial) -> dict[str, Any]:
    """The plain loop: one padded batch a step, torch's AdamW, clipping and schedules."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trial.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trial.first_adapter, is_trainable=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=trial.lr, weight_decay=WEIGHT_DECAY)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, 1.0, total_iters=WARMUP_STEPS - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS - WARMUP_STEPS)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [WARMUP_STEPS])
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "lr": []}
    for ids, mask, labels in padded_batches(load_config(trial.config)):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        found["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
        found["loss"].append(float(loss.detach()))
        found["lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found["adapter"] = {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}
    return found


MARKS = {"smollm2": pytest.mark.turn(of=4), "llama3": pytest.mark.slow, "llama31": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in TRIALS])
def test_losses_norms_and_the_adapter_of_ten_steps_are_those_of_peft(trial, name) -> None:
    from safetensors.torch import load_file

    ours = trial(name)
    theirs = train_with_peft(ours)
    lines = ours.lines()
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert min(theirs["grad_norm"]) > MAX_GRAD_NORM, "nothing was clipped"
    assert theirs["loss"][-1] < 0.9 * theirs["loss"][0], "nothing was learned"
    assert [line["loss"] for line in lines] == pytest.approx(theirs["loss"], rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert [line["lr"] for line in lines] == pytest.approx(theirs["lr"], rel=1e-9)
    adapter = load_file(ours.run / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == theirs["adapter"].keys()
    wanted = torch.cat([theirs["adapter"][key].flatten() for key in adapter])
    found = torch.cat([values.flatten() for values in adapter.values()])
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_the_gathered_adapter_has_the_keys_of_a_fresh_peft_model_and_no_other(trial) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    ours = trial("llama31")
    adapter = load_file(ours.run / "adapter" / "adapter_model.safetensors")
    fresh = peft_model(ours.base)
    wanted = {key: tuple(values.shape) for key, values in get_peft_model_state_dict(fresh).items()}
    assert {key: tuple(values.shape) for key, values in adapter.items()} == wanted
    assert not [key for key in adapter if "embed_tokens" in key or "lm_head" in key]
    assert {key.split(".")[-3] for key in adapter} == set(LINEARS)
    loaded = set_peft_model_state_dict(fresh, adapter)
    assert loaded.unexpected_keys == []
    # PEFT lists the base's own keys, which no adapter holds, as missing.
    assert [key for key in loaded.missing_keys if "lora_" in key] == []


def test_a_held_out_loss_is_that_of_transformers_with_the_adapter_in_peft(trial) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = trial("llama31")
    told = json.loads(dist_lora("eval", ours.config, "--adapter", ours.run / "adapter", "--nproc", 2, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(ours.base)
    base = AutoModelForCausalLM.from_pretrained(ours.base, dtype=torch.float32)
    loss_sum, num_targets = {"loss": 0.0, "base_loss": 0.0}, 0
    model = PeftModel.from_pretrained(base, ours.run / "adapter").eval()

    def ids_of(turns: list[dict[str, str]], *, is_asked: bool) -> list[int]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_asked)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    for line in (ours.config.parent / "eval.jsonl").read_text().splitlines():
        turns = json.loads(line)["messages"]
        ids = ids_of(turns, is_asked=False)
        labels = torch.full((len(ids),), -100)
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                answer = slice(len(ids_of(turns[:i], is_asked=True)), len(ids_of(turns[: i + 1], is_asked=False)))
                labels[answer] = torch.tensor(ids[answer])
        num_targets += int((labels != -100).sum())
        with torch.no_grad():
            for key in loss_sum:
                logits = model(torch.tensor([ids])).logits[0] if key == "loss" else without_adapter(model, ids)
                loss_sum[key] += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100))
    assert told["target_tokens"] == num_targets
    assert told["loss"] == pytest.approx(loss_sum["loss"] / num_targets, abs=1e-5)
    assert told["base_loss"] == pytest.approx(loss_sum["base_loss"] / num_targets, abs=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    assert told["loss"] < told["base_loss"]


def without_adapter(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits ``(tokens, vocabulary)`` of the base that an adapter of PEFT lies beside."""
    with model.disable_adapter():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
