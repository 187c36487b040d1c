"""Tokens whose rows are trained: PEFT's numbers on one process and on several, saved as PEFT reads it, and resumed elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_lora.base.attention import Documents
from dist_lora.chat.command import open_for_answers
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.config.schema import LINEARS, Config
from dist_lora.errors import ConfigError
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.merge import merge_adapter
from dist_lora.train.command import evaluate
from dist_lora.world.world import World
from tests.e2e.test_against_peft import NUM_STEPS
from tests.ranks.everywhere import PLACES, assert_alike_everywhere, assert_goes_on_elsewhere
from tests.ranks.plain import WEIGHT_DECAY, draw_first_a, train_by_hand
from tests.ranks.pool import RankFailed
from tests.ranks.runs import chats_settings, metrics, train_command
from tests.unit.lora.test_new_tokens import adapter_of_peft

RANK, ALPHA, LR = 4, 8, 5e-3
TOKENS = ["<|start_header_id|>", 115, "<|eot_id|>", 300]  # one of text, and one that is in no sample
IDS = [115, 258, 260, 300]
VARIANTS = ["llama31", "llama32"]  # a head of its own, and a tied one
# In nodes of so many: replicated over nodes, or over all ranks.
NODES = [(4, 2, {"engine": "fsdp2", "base_shard": "node", "adapters": "shard"}),
         (4, 2, {"engine": "fsdp2", "base_shard": "world", "adapters": "replicate"}), (2, 2, {"base_shard": "gpu"})]  # fmt: skip
ADAPTER = Path("adapter", "adapter_model.safetensors")


def settings_of(base: Path, folder: Path) -> dict[str, Any]:
    settings = chats_settings(base, folder, num_steps=NUM_STEPS)
    optim = settings["optim"] | {"lr": LR, "schedule": "constant", "max_grad_norm": None}
    # The first layer has no adapter: what reaches the embedding goes through it.
    lora = {"rank": RANK, "alpha": ALPHA, "layers": [1], "train_tokens": TOKENS}
    return settings | {"lora": lora, "optim": optim}


def model_of_peft(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    is_tied = model.config.tie_word_embeddings
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), layers_to_transform=[1], task_type="CAUSAL_LM",
        trainable_token_indices=IDS if is_tied else {"embed_tokens": IDS, "lm_head": IDS},
    )  # fmt: skip
    model = get_peft_model(model, config)
    draw_first_a(model)
    return model


@pytest.fixture(scope="module")
def theirs(tiny_llama, tmp_path_factory) -> Any:
    """``theirs(variant)``: losses and trained tensors of PEFT's own loop; run at its first use."""
    made: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}

    def train(variant: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        if variant in made:
            return made[variant]
        base, folder = tiny_llama(variant), tmp_path_factory.mktemp(variant)
        model = model_of_peft(base).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)
        losses = train_by_hand(model, optimizer, settings_of(base, folder))
        made[variant] = losses, get_peft_model_state_dict(model)
        return made[variant]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_adapters_have_the_numbers_of_peft_wherever_they_are_trained(
    ranks, tiny_llama, theirs, tmp_path, variant
) -> None:
    base = tiny_llama(variant)
    losses, tensors = theirs(variant)
    assert losses[-1] < 0.9 * losses[0]
    places = [(size, size, parallel) for size, parallel in PLACES] + (NODES if variant == "llama32" else NODES[:1])
    for number, (size, node_size, parallel) in enumerate(places):
        settings = settings_of(base, tmp_path) | {"runs_dir": str(tmp_path / str(number)), "parallel": parallel}
        assert ranks(size).run(train_command, settings, node_size=node_size) == [""] * size
        run = tmp_path / str(number) / "it"
        assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-4), parallel
        found = load_file(run / ADAPTER)
        assert found.keys() == tensors.keys()
        for key, values in found.items():
            assert (values - tensors[key]).norm() < 1e-3 * tensors[key].norm(), (parallel, key)
    frozen = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rows = found["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert not torch.isclose(rows[:3], frozen[IDS[:3]]).all(1).any(), "a row that the data use is as it was"


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_and_our_reader_compute_alike_with_what_was_trained(tiny_llama, tmp_path, variant) -> None:
    base, ids = tiny_llama(variant), torch.tensor([256, 258, 97, 115, 259, 98, 260, 300, 115, 7])
    assert train_command(World.alone(), settings_of(base, tmp_path) | {"runs_dir": str(tmp_path)}) == ""
    adapter = tmp_path / "it" / "adapter"
    written = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    assert written == (IDS if variant == "llama32" else {"embed_tokens": IDS, "lm_head": IDS})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    ours = open_for_answers(adapter, base=str(base), world=World.alone()).model
    places = torch.arange(len(ids))
    with torch.no_grad():
        found = ours(ids, positions=places, attention=Documents((0, len(ids))), rows=places)
        torch.testing.assert_close(found, model(ids[None]).logits[0], atol=2e-5, rtol=1e-5)
        with model.disable_adapter():
            assert (model(ids[None]).logits[0] - found).abs().max() > 0.1


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_stopped_on_two_ranks_goes_on_on_one_and_three(ranks, tiny_llama, tmp_path, variant) -> None:
    settings = settings_of(tiny_llama(variant), tmp_path) | {"parallel": {"engine": "fsdp2", "adapters": "shard"}}
    assert_goes_on_elsewhere(ranks, settings, tmp_path)


@pytest.mark.turn(of=2)
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_quantized_base_all_engines_have_the_numbers_of_one_process(ranks, tiny_llama, tmp_path, variant) -> None:
    settings = settings_of(tiny_llama(variant), tmp_path)
    settings["optim"]["lr_ratio"] = 8.0
    settings["model"]["quant"] = "nf4"
    assert_alike_everywhere(ranks, settings, tmp_path)


@pytest.mark.slow
def test_rows_alone_are_trained_alike_everywhere_and_merged(ranks, tiny_llama, tmp_path) -> None:
    base, ids = tiny_llama("llama31"), torch.tensor([[256, 258, 97, 115, 260, 300]])
    settings = settings_of(base, tmp_path)
    settings["lora"] = {"modules": [], "train_tokens": TOKENS}
    assert_alike_everywhere(ranks, settings, tmp_path)
    # Four rows on three ranks: the last one has none.
    spread = {"runs_dir": str(tmp_path / "three"), "parallel": {"engine": "fsdp2", "adapters": "shard"}}
    ranks(3).run(train_command, settings | spread)
    losses = [[line["loss"] for line in metrics(tmp_path / name / "it")] for name in ("0", "three")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    adapter = tmp_path / "0" / "it" / "adapter"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    merge_adapter(adapter, base=base, out=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_run_starts_from_an_adapter_with_rows_and_keeps_its_tokens(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    first = settings_of(base, tmp_path) | {"runs_dir": str(tmp_path / "first")}
    assert train_command(World.alone(), first) == ""
    start = tmp_path / "first" / "it" / "adapter"
    again = first | {"runs_dir": str(tmp_path / "again"), "lora": {"start_from": str(start)}}
    assert train_command(World.alone(), again) == ""
    run = tmp_path / "again" / "it"
    assert metrics(run)[0]["loss"] < 0.9 * metrics(tmp_path / "first" / "it")[0]["loss"]
    assert open_adapter(run / "adapter").tokens == tuple(IDS)
    gathered = gather_adapter(run, out=tmp_path / "gathered")
    assert (gathered / ADAPTER.name).read_bytes() == (run / ADAPTER).read_bytes()
    with pytest.raises(
        ConfigError, match=r"lora\.train_tokens: 115 in the config, ids 115, 258, 260, 300 in the adapter"
    ):
        train_command(
            World.alone(), again | {"run": "other", "lora": {"start_from": str(start), "train_tokens": [115]}}
        )


def test_other_tokens_are_refused_on_resume_and_the_same_in_another_order_are_not(tiny_llama, tmp_path) -> None:
    settings = settings_of(tiny_llama("llama31"), tmp_path) | {"runs_dir": str(tmp_path)}
    assert train_command(World.alone(), settings) == ""
    longer = settings | {"train": settings["train"] | {"steps": NUM_STEPS + 1}}
    for tokens in ([*TOKENS, 301], TOKENS[1:], []):
        with pytest.raises(
            ConfigError, match=r"lora\.train_tokens: the run has \[115, 258, 260, 300\], the config says \["
        ):
            train_command(World.alone(), longer | {"lora": settings["lora"] | {"train_tokens": tokens}})
    assert (
        train_command(
            World.alone(),
            longer | {"lora": settings["lora"] | {"train_tokens": [260, "<|start_header_id|>", 300, 115]}},
        )
        == ""
    )
    assert [line["step"] for line in metrics(tmp_path / "it")] == list(range(1, NUM_STEPS + 2))


def test_a_token_that_is_none_ends_the_run_on_every_rank_before_the_base_is_read(ranks, tiny_llama, tmp_path) -> None:
    settings = settings_of(tiny_llama("llama31"), tmp_path) | {"runs_dir": str(tmp_path)}
    settings["lora"] = {"train_tokens": ["<|my|>"]}
    with pytest.raises(RankFailed) as raised:
        ranks(2).run(train_command, settings)
    assert raised.value.kinds[0] == "ConfigError" and "lora.train_tokens: '<|my|>' is 6 tokens" in raised.value.texts[0]
    assert not (tmp_path / "it").exists()


def test_what_eval_says_of_the_base_is_of_the_base_without_the_rows(tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    settings = settings_of(base, tmp_path) | {"runs_dir": str(tmp_path)}
    assert train_command(World.alone(), settings) == ""
    held_out = settings | {"data": settings["data"] | {"eval": settings["data"]["train"]}}
    del held_out["lora"]
    config = Config.model_validate(held_out)
    found = evaluate(config, World.alone(), adapter=tmp_path / "it" / "adapter")
    assert found["base_loss"] == pytest.approx(evaluate(config, World.alone(), adapter=None)["loss"], rel=1e-5)
    assert found["loss"] < 0.9 * found["base_loss"]


def test_rows_of_peft_for_the_embedding_alone_leave_a_head_of_its_own_as_the_bases(
    tiny_llama, tmp_path, caplog
) -> None:
    base, ids = tiny_llama("llama31"), torch.tensor([256, 258, 97, 260, 300, 115, 7])
    adapter = adapter_of_peft(base, tmp_path / "peft", IDS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with caplog.at_level("WARNING", logger="dist_lora"):
        ours = open_for_answers(adapter, base=str(base), world=World.alone()).model
    assert "has the rows of its trained tokens for the embedding alone: those of the head are the base's" in caplog.text
    places = torch.arange(len(ids))
    with torch.no_grad():
        found = ours(ids, positions=places, attention=Documents((0, len(ids))), rows=places)
        torch.testing.assert_close(found, model(ids[None]).logits[0], atol=2e-5, rtol=1e-5)
