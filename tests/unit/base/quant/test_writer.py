"""A base stored in NF4 is the base that training makes of the original: equal codes, scales, losses and identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_lora.base.index import open_index
from dist_lora.base.quant.nf4 import quantize_nf4
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.quant.writer import quantize_base
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.lora.origin import identify_base
from dist_lora.prepare.quantize import quantize_model
from dist_lora.world.world import World
from tests.ranks.runs import chats_settings, train_command


@pytest.fixture(scope="module", params=[None, "40KB"], ids=["one file", "several"])
def pair(request, tiny_llama, tmp_path_factory) -> tuple[Path, Path]:
    """A model and its quantized copy."""
    base = tiny_llama(dtype="bfloat16", shard_size=request.param)
    out = tmp_path_factory.mktemp("quantized") / "new" / "nf4"
    quantize_model(str(base), out=out)
    return base, out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_codes_and_scales_are_those_that_training_computes_of_the_original(pair) -> None:
    base, out = pair
    plain, stored = tensors_of(base), open_base_on_disk(out, quant="nf4")
    assert len(stored.nf4) == 2 * 7 and set(stored.index.tensors) == set(plain)
    for name, weight in plain.items():
        if name not in stored.nf4:
            assert torch.equal(tensors_of(out)[name], weight)
            continue
        parts = stored.nf4[name].read_rows(0, len(weight))
        for part, expected in zip(("codes", "absmax"), quantize_nf4(weight), strict=True):
            assert torch.equal(parts[part], expected), name
    assert {path.name for path in base.iterdir()} == {path.name for path in out.iterdir()} - {"quantized_from.json"}
    assert [path.name for path in out.parent.iterdir()] == ["nf4"]


def test_transformers_loads_it_as_what_it_makes_of_the_original_itself(pair) -> None:
    base, out = pair
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"]
    )  # fmt: skip
    ids = torch.arange(40)[None]
    own = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.bfloat16)
    stored, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(stored(ids).logits, own(ids).logits)


def losses_on(base: Path, folder: Path) -> list[float]:
    folder.mkdir()
    settings = chats_settings(base, folder, num_steps=3)
    settings |= {"runs_dir": str(folder), "model": settings["model"] | {"quant": "nf4"}}
    train_command(World.alone(), settings)
    return [json.loads(line)["loss"] for line in (folder / "it" / "metrics.jsonl").read_text().splitlines()]


def test_training_on_it_has_the_losses_and_the_origin_of_training_on_the_original(pair, tmp_path) -> None:
    base, out = pair
    losses = losses_on(out, tmp_path / "stored")
    assert len(losses) == 3 and losses == losses_on(base, tmp_path / "original")
    origins = [
        json.loads((tmp_path / run / "it" / "adapter" / "dist_lora.json").read_text())["base"]
        for run in ("stored", "original")
    ]
    assert origins[0]["content_hash"] == origins[1]["content_hash"] == open_index(base).content_hash()
    assert origins[0]["config_hash"] == origins[1]["config_hash"] and origins[0]["name"] == origins[1]["name"]


def test_other_weights_beside_the_record_are_told(pair, tmp_path) -> None:
    _, out = pair
    (tmp_path / "quantized_from.json").write_text((out / "quantized_from.json").read_text())
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"quantized_from\.json was written with other weights \(\w+\) than those"):
        identify_base(tmp_path)
    (tmp_path / "quantized_from.json").write_text('{"format": 2}')
    with pytest.raises(WeightsError, match=r"has format 2, and format 1 with a base was expected"):
        identify_base(tmp_path)


def test_a_quantized_model_and_an_existing_folder_are_refused(pair, tmp_path) -> None:
    base, out = pair
    with pytest.raises(ConfigError, match="is quantized already"):
        quantize_model(str(out), out=tmp_path / "twice")
    with pytest.raises(ConfigError, match=r"exists already\. Name a new folder for the quantized model"):
        quantize_model(str(base), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tiny_llama, tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weights = load_file(tiny_llama() / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text((tiny_llama() / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight: row 3, column 5 is nan"):
        quantize_base(base, out=tmp_path / "out", identity=dataclasses.asdict(identify_base(base)))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_rows_that_are_not_whole_blocks_are_refused(tiny_llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"can't be stored in nf4: .*down_proj\.weight: nf4 splits each row"):
        quantize_model(str(tiny_llama(ffn=100)), out=tmp_path / "out")
