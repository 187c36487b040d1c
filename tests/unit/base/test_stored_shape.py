"""Where config.json and the weights' files contradict each other, the model is the one that transformers makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.base.quant.formats import Nf4, Plain
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.stored_shape import (
    EMBEDDING,
    HEAD,
    dtype_remarks,
    has_own_head,
    refuse_unquantized,
    stored_base,
    stored_remarks,
)
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.shape import Shape, read_config, read_shape
from dist_lora.layout.storage import base_parts
from dist_lora.train.build import Trainee, open_base
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, publish_nf4, trainee_of

IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))


def copy_of(source: Path, folder: Path, *, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    """A model's folder with other weights, or settings in config.json."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        (folder / "model.safetensors").unlink()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits_of(trainee: Trainee) -> Tensor:
    everything = torch.arange(len(IDS))
    with torch.no_grad():
        return trainee.model(IDS, positions=everything, attention=Documents((0, len(IDS)), "sdpa"), rows=everything)


def theirs(folder: Path, *, is_dequantized: bool = False) -> Tensor:
    """transformers' logits; of a quantized model with its weights dequantized: its products on a CPU are in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return (model.dequantize() if is_dequantized else model)(IDS[None]).logits[0]


# The head


@pytest.fixture(scope="module")
def tied(tiny_llama) -> dict[str, Tensor]:
    return load_file(tiny_llama("llama32") / "model.safetensors")


def heads(tied: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    embedding = tied[EMBEDDING]
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    last = embedding.clone()
    last[-1, -1] += 1
    without = {name: tensor for name, tensor in tied.items() if name != EMBEDDING}
    return {
        "none": tied,
        "equal": {**tied, HEAD: embedding.clone()},
        "equal in another dtype": {**tied, HEAD: embedding.double().float().bfloat16()},
        "other": {**tied, HEAD: other},
        "other in the last weight": {**tied, HEAD: last},
        "in place of the embedding": {**without, HEAD: other},
    }


@pytest.mark.parametrize(
    ("name", "is_tied"),
    [
        ("none", True),
        ("equal", True),
        ("equal in another dtype", False),  # it was rounded
        ("other", False),
        ("other in the last weight", False),
        ("in place of the embedding", True),
    ],
)
def test_a_tied_head_with_a_matrix_of_its_own_is_that_of_transformers(
    tiny_llama, tied, tmp_path, name, is_tied
) -> None:
    folder = copy_of(tiny_llama("llama32"), tmp_path / "model", tensors=heads(tied)[name])
    trainee = trainee_of(config_of(folder), World.alone())
    torch.testing.assert_close(logits_of(trainee), theirs(folder), rtol=1e-4, atol=1e-4)
    assert trainee.base.shape.tied == is_tied


def test_a_head_of_its_own_is_named_and_one_that_is_missing_is_damage(tiny_llama, tied, tmp_path, caplog) -> None:
    folder = copy_of(tiny_llama("llama32"), tmp_path / "own", tensors=heads(tied)["other"])
    base = open_base(config_of(folder), World.alone())
    assert not base.shape.tied
    assert [record.message for record in caplog.records] == [
        f"{folder / 'config.json'}: tie_word_embeddings is true, and lm_head.weight in the files differs from the "
        "embedding: the head is not tied, as in transformers. Set tie_word_embeddings to false"
    ]
    without = copy_of(tiny_llama("llama32"), tmp_path / "without", tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"1 tensor missing: lm_head\.weight"):
        open_base(config_of(without), World.alone())


# Linears that a 4-bit publisher left unquantized


@pytest.fixture(scope="module")
def published(tiny_llama, tmp_path_factory) -> Callable[..., Path]:
    """Makes a folder that transformers quantized and saved, all but the modules of a list."""
    source = tiny_llama()
    return lambda *skipped: publish_nf4(source, tmp_path_factory.mktemp("published"), skipped=skipped)


SKIPPED = ("k_proj", "model.layers.1.mlp")
LEFT = {
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.self_attn.k_proj",
    *(f"model.layers.1.mlp.{linear}" for linear in ("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def mixed(published) -> Path:
    return published(*SKIPPED)


def test_linears_left_unquantized_stay_so_and_the_logits_are_those_of_transformers(mixed, caplog) -> None:
    with caplog.at_level("INFO", logger="dist_lora"):
        base = open_base(config_of(mixed, model={"quant": "nf4"}), World.alone())
    assert base.shape.unquantized == LEFT == read_shape(mixed).unquantized
    lines = [record.message for record in caplog.records]
    assert [line for line in lines if "unquantized" in line] == [
        f"{mixed}: 5 of 14 linears were published unquantized and stay so: model.layers.0.self_attn.k_proj, "
        "model.layers.1.mlp.down_proj, model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, "
        "model.layers.1.self_attn.k_proj"
    ]
    trainee = trainee_of(config_of(mixed, model={"quant": "nf4"}), World.alone())
    stored = load_file(mixed / "model.safetensors")
    for name, linear in trainee.model.linears().items():
        assert linear.fmt == (Plain(torch.float32) if name in LEFT else Nf4())
        if name in LEFT:
            assert torch.equal(linear.weight, stored[f"{name}.weight"])
    torch.testing.assert_close(logits_of(trainee), theirs(mixed, is_dequantized=True), rtol=1e-4, atol=1e-4)
    assert "5 linears, embeddings, norms and head fp32" in trainee.precision.line()


@pytest.mark.parametrize("skipped", [(), SKIPPED, ("proj",)])
def test_the_planned_bytes_are_those_of_the_model(published, skipped) -> None:
    if len(skipped) == 1:  # transformers would quantize nothing
        shape = Shape.from_config(
            read_config(published()) | {"quantization_config": _quantization("q_proj")}, where="config.json"
        )
        assert {name.rpartition(".")[2] for name in shape.unquantized} == {"q_proj"}
        return
    folder = published(*skipped)
    trainee = trainee_of(config_of(folder, model={"quant": "nf4"}), World.alone())
    parts = base_parts(read_shape(folder), quant="nf4", item_bytes=4)
    assert sum(part.num_bytes for part in parts) == trainee.model.base_bytes


def _quantization(*skipped: str, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": list(skipped), **changes,
    }  # fmt: skip


def test_the_files_decide_which_linears_are_quantized_and_a_list_that_differs_is_named(mixed, tmp_path) -> None:
    unlisted = copy_of(mixed, tmp_path / "unlisted", quantization_config=_quantization("lm_head"))
    more = copy_of(mixed, tmp_path / "more", quantization_config=_quantization(*SKIPPED, "v_proj"))
    none = copy_of(mixed, tmp_path / "none", quantization_config=None)
    found = []
    for folder in (unlisted, more, none):
        on_disk, stated = open_base_on_disk(folder, quant="nf4"), read_shape(folder)
        stored, _ = stored_base(stated, on_disk, own_head=False)
        assert stored.unquantized == LEFT
        found.append(stored_remarks(read_config(folder), stated, stored, on_disk))
    assert found == [
        [],
        [
            "llm_int8_skip_modules lists 2 linears that are in NF4: model.layers.0.self_attn.v_proj, "
            "model.layers.1.self_attn.v_proj"
        ],
        ["quantization_config is missing, and the files hold 9 linears in NF4"],
    ]


def test_a_config_that_says_quantized_beside_weights_that_are_not_is_refused(tiny_llama, tmp_path) -> None:
    folder = copy_of(tiny_llama(), tmp_path / "model", quantization_config=_quantization())
    with pytest.raises(ConfigError) as raised:
        refuse_unquantized(read_config(folder), open_base_on_disk(folder, quant="nf4"))
    assert str(raised.value) == (
        f"{folder}/config.json: quantization_config: found weights quantized by bitsandbytes, and no weight in the files "
        "is. If they are the unquantized ones, remove quantization_config; model.quant: nf4 quantizes them as they are read"
    )
    with pytest.raises(ConfigError, match="no weight in the files is"):
        open_base(config_of(folder), World.alone())


def test_a_head_in_nf4_is_refused_by_its_name(mixed, tmp_path) -> None:
    from bitsandbytes import functional

    tensors = load_file(mixed / "model.safetensors")
    codes, state = functional.quantize_4bit(tensors[HEAD], quant_type="nf4")
    tensors |= {HEAD: codes} | {f"{HEAD}.{key}": part for key, part in state.as_dict(packed=True).items()}
    folder = copy_of(mixed, tmp_path / "model", tensors=tensors)
    with pytest.raises(ConfigError) as raised:
        open_base(config_of(folder, model={"quant": "nf4"}), World.alone())
    assert str(raised.value) == (
        f"{folder} holds weights in NF4 that are no linears of its 2 layers: lm_head.weight. Use the model's unquantized "
        "folder."
    )


# The dtype


@pytest.mark.parametrize(
    ("held", "stated", "dtype", "remarks"),
    [
        ("float32", "float32", "fp32", []),
        ("bfloat16", "bfloat16", "bf16", []),
        ("bfloat16", "bfloat16", "fp32", []),
        ("float32", "float32", "bf16", ["the files hold 21 tensors in float32; 21 of them are rounded to bf16 (model.dtype)"]),
        ("float16", "float16", "bf16", ["the files hold 21 tensors in float16; 21 of them are rounded to bf16 (model.dtype)"]),
        ("float16", "bfloat16", "fp32", ["dtype is bfloat16, and the files hold 21 tensors in float16: they are read as they are"]),
        (
            "mixed", "float32", "fp32",
            ["the files hold 20 tensors in float32, 1 tensors in bfloat16; all are converted to fp32, without loss"],
        ),
        (
            "mixed", "bfloat16", "bf16",
            ["the files hold 20 tensors in float32, 1 tensors in bfloat16; 20 of them are rounded to bf16 (model.dtype)"],
        ),
    ],
)  # fmt: skip
def test_a_dtype_that_is_not_the_files_is_said_in_a_line(tiny_llama, tmp_path, held, stated, dtype, remarks) -> None:
    tensors = load_file(tiny_llama("llama31") / "model.safetensors")
    if held == "mixed":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    else:
        tensors = {name: tensor.to(getattr(torch, held)) for name, tensor in tensors.items()}
    folder = copy_of(tiny_llama("llama31"), tmp_path / "model", tensors=tensors, dtype=stated)
    assert dtype_remarks(read_config(folder), open_base_on_disk(folder, quant="none"), dtype=dtype) == remarks


def test_a_head_is_compared_to_its_last_weight_in_slices(tiny_llama, tied, tmp_path, monkeypatch) -> None:
    from dist_lora.base import stored_shape

    monkeypatch.setattr(stored_shape, "_ROWS_AT_ONCE", 100)  # 512 rows: the last slice is smaller
    for name, is_own in [("other in the last weight", True), ("equal", False), ("none", False)]:
        folder = copy_of(tiny_llama("llama32"), tmp_path / name, tensors=heads(tied)[name])
        assert has_own_head(open_base_on_disk(folder, quant="none").index) == is_own
