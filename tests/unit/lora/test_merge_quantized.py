"""An adapter that was trained beside a quantized base, merged: into the plain weights, or into what they were then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_lora.base.attention import Documents
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.lora.merge import merge_adapter
from dist_lora.train.build import build, load_adapter, open_base
from dist_lora.world.world import World
from tests.ranks.runs import train_command
from tests.ranks.tiny import publish_nf4

IDS = torch.randint(0, 512, (256,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["nf4", "int8"])
def trained(request, tiny_llama, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The settings of a run beside a quantized base, and its adapter."""
    return run_on(tiny_llama("llama31"), tmp_path_factory.mktemp(request.param), quant=request.param)


def run_on(base: Path, folder: Path, *, quant: str) -> tuple[dict[str, Any], Path]:
    """The settings of a run of some steps, and its adapter."""
    chats = [[("user", f"say {i}"), ("assistant", f"{i} {i}")] for i in range(8)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
    (folder / "train.jsonl").write_text("\n".join(lines))
    settings = {
        "run": "it",
        "runs_dir": str(folder),
        "model": {"name": str(base), "dtype": "fp32", "quant": quant},
        "lora": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
        "data": {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"steps": 6, "global_batch": 4, "sequence_length": 64},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "log": {"trackers": []},
    }
    train_command(World.alone(), settings)
    return settings, folder / "it" / "adapter"


@torch.no_grad()
def logits_as_trained(settings: dict[str, Any], adapter: Path) -> Tensor:
    config, world = Config.model_validate(settings), World.alone()
    trainee = build(config, open_base(config, world), world)
    load_adapter(trainee.adapters, adapter, world=world)
    rows = torch.arange(len(IDS))
    return trainee.model(IDS, positions=rows, attention=Documents((0, len(IDS))), rows=rows)


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS[None]).logits[0]


def assert_rounded(found: Tensor, wanted: Tensor) -> None:
    """Logits differ by bf16's rounding alone: another token comes first only where it was as good."""
    assert (found - wanted).abs().mean() < 2e-2
    chosen = wanted.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((wanted.amax(-1) - chosen) < 2e-2).float().mean() >= 0.99


def test_merged_into_the_values_it_was_trained_beside_it_is_the_trained_model(trained, tmp_path) -> None:
    settings, adapter = trained
    quant, base = settings["model"]["quant"], Path(settings["model"]["name"])
    merge_adapter(adapter, base=base, out=tmp_path / "merged", quant=quant)
    wanted = logits_as_trained(settings, adapter)
    assert (logits_of(tmp_path / "merged") - wanted).abs().max() < 1e-4
    plain, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    linears = {name for name in plain if name.startswith("model.layers.") and plain[name].dim() == 2}
    assert {name for name in plain if not plain[name].equal(merged[name])} == linears
    merge_adapter(adapter, base=base, out=tmp_path / "bf16", quant=quant, dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
    assert_rounded(logits_of(tmp_path / "bf16"), wanted)


def test_merged_into_the_plain_weights_it_is_peft_with_the_adapter_beside_them(trained, tmp_path) -> None:
    settings, adapter = trained
    base = Path(settings["model"]["name"])
    merge_adapter(adapter, base=base, out=tmp_path / "merged", dtype="bf16")
    with torch.no_grad():
        beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        wanted = beside(IDS[None]).logits[0]
    assert_rounded(logits_of(tmp_path / "merged"), wanted)


def test_rows_that_can_not_be_cut_into_blocks_are_told_before_anything_is_written(
    trained, tiny_llama, tmp_path
) -> None:
    odd = tiny_llama("llama31", ffn=96)  # the rows of down_proj have 96 weights
    _, adapter = trained
    with pytest.raises(ConfigError, match="nf4 splits each row into blocks of 64") as raised:
        merge_adapter(adapter, base=odd, out=tmp_path / "merged", quant="nf4", force=True)
    assert "can't have been the base of a run in nf4" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_a_base_published_in_nf4_with_linears_left_unquantized_is_merged_into_the_trained_model(
    tiny_llama, tmp_path, shard_size
) -> None:
    base = publish_nf4(tiny_llama(), tmp_path / "base", skipped=["k_proj", "model.layers.1.mlp"], shard_size=shard_size)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard_size is not None)
    settings, adapter = run_on(base, tmp_path, quant="nf4")
    report = merge_adapter(adapter, base=base, out=tmp_path / "merged")
    assert report.quant == "nf4"
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in merged and merged["dtype"] == "float32"
    torch.testing.assert_close(
        logits_of(tmp_path / "merged"), logits_as_trained(settings, adapter), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(
        ConfigError, match=r"--quant int8: .* was published in NF4, and a run on it has its values in NF4"
    ):
        merge_adapter(adapter, base=base, out=tmp_path / "int8", quant="int8")
