"""What servers do with an adapter and with a merged model, by small cases whose factors are worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dist_lora.config.schema import LINEARS, ModuleAdapter
from dist_lora.herd.shape import module_path
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity
from dist_lora.lora.served import servers_of_adapter
from dist_lora.lora.servers import AdapterFiles, Served, lines_of, serve_adapter, serve_merged, warning_of
from tests.unit.lora.test_adapter_files import random_adapter, tiny_llama, write

SERVERS = ("vLLM", "TGI", "llama.cpp", "Ollama")


def files(*, rank: int = 16, alpha: float = 32, layers: tuple[int, ...] = (0, 1), linears: Any = LINEARS, own: Any = None, **rest: Any) -> AdapterFiles:  # fmt: skip
    """An adapter of a model of two layers; ``own`` has (rank, alpha) of linears that differ from the others, by name."""
    names = [module_path(linear, layer=layer) for layer in layers for linear in linears]
    pairs = {name: (own or {}).get(name, (rank, alpha)) for name in names}
    modules = [ModuleAdapter(name=name, rank=r, alpha=float(a)) for name, (r, a) in pairs.items()]
    settings = {"has_rslora": False, "num_layers": 2, "min_width": 1024, **rest}
    return AdapterFiles(rank=rank, alpha=alpha, modules=modules, **settings)


def verdicts(served: list[Served]) -> dict[str, str]:
    assert tuple(each.server for each in served) == SERVERS
    return {each.server: each.verdict for each in served}


def why(served: list[Served], server: str) -> str:
    return next(each.why for each in served if each.server == server)


V1 = "model.layers.1.self_attn.v_proj"


def of_all_layers(linear: Any, rank: int, alpha: float) -> dict[str, tuple[int, float]]:
    """A linear's own rank and alpha, in both layers."""
    return {module_path(linear, layer=layer): (rank, alpha) for layer in (0, 1)}


ALL = dict.fromkeys(SERVERS, "yes")


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({}, ALL),
        ({"rank": 8, "alpha": 7.5}, ALL),
        ({"rank": 512}, ALL),
        ({"rank": 513}, {"vLLM": "no", "TGI": "wrong"}),
        ({"rank": 3, "alpha": 6}, {"TGI": "wrong"}),  # 6 / 3 for q_proj, and 6 / 8 for the others
        ({"rank": 3, "alpha": 6, "linears": ("q_proj",)}, ALL),
        ({"rank": 24}, {"TGI": "wrong"}),  # padded to 32
        ({"layers": (1,)}, {"TGI": "no"}),
        ({"linears": ("v_proj", "up_proj")}, ALL),
        # An own rank without its own alpha: vLLM and TGI divide by the rank of the others, llama.cpp by its own.
        ({"own": {V1: (8, 32)}}, {"vLLM": "wrong", "TGI": "no"}),
        ({"own": {V1: (16, 64)}}, {"vLLM": "wrong", "TGI": "wrong", "llama.cpp": "wrong", "Ollama": "wrong"}),
        # An own rank with the same factor: 16 / 8 = 32 / 16. llama.cpp divides the adapter's alpha by 8.
        ({"own": {V1: (8, 16)}}, {"TGI": "no", "llama.cpp": "wrong", "Ollama": "wrong"}),
        ({"has_rslora": True, "own": {module_path(x, layer=y): (16, 128) for x in LINEARS for y in (0, 1)}},
         {"llama.cpp": "wrong", "Ollama": "wrong"}),  # 32 / sqrt(16) = 8 = 128 / 16
        # The same of rank 8, whose factor is another number by rounding: 32 / sqrt(8), and 32 sqrt(8) / 8.
        ({"rank": 8, "has_rslora": True, "own": {module_path(x, layer=y): (8, 32 * 8**0.5) for x in LINEARS for y in (0, 1)}},
         {"llama.cpp": "wrong", "Ollama": "wrong"}),
        # Own ranks with the same factor 2. TGI divides the first linear's alpha by 16, and goes on with what it padded that to.
        ({"own": of_all_layers("down_proj", 8, 16)}, {"llama.cpp": "wrong", "Ollama": "wrong"}),
        ({"own": of_all_layers("q_proj", 8, 16)}, {"TGI": "wrong", "llama.cpp": "wrong", "Ollama": "wrong"}),
        ({"vocab": 128_256}, ALL),
        ({"vocab": 258_048}, ALL),
        ({"vocab": 258_049}, {"vLLM": "no"}),
    ],
)  # fmt: skip
def test_each_server_takes_refuses_or_scales_as_its_source_says(adapter: dict, expected: dict) -> None:
    assert verdicts(serve_adapter(files(**adapter))) == ALL | expected


@pytest.mark.parametrize(
    ("rank", "option"),
    [(1, ""), (16, ""), (17, "--max-lora-rank 32"), (64, "--max-lora-rank 64"), (257, "--max-lora-rank 320"), (512, "--max-lora-rank 512")],
)  # fmt: skip
def test_vllm_is_told_the_smallest_of_its_ranks_that_is_enough(rank: int, option: str) -> None:
    told = why(serve_adapter(files(rank=rank)), "vLLM")
    assert " ".join(told.split()) == " ".join(
        f"vllm serve BASE --enable-lora {option} --lora-modules NAME=FOLDER".split()
    )


@pytest.mark.parametrize("own", [(3, 6), (32, 64)])
def test_vllm_is_told_the_largest_rank_of_any_linear(own: tuple[int, float]) -> None:
    rank = 32 if own[0] < 32 else 16
    assert "--max-lora-rank 32 " in why(serve_adapter(files(rank=rank, alpha=2 * rank, own={V1: own})), "vLLM")


@pytest.mark.parametrize(("rank", "num_gpus"), [(8, "1 GPU"), (16, "2 GPUs"), (32, "4 GPUs"), (48, "4 GPUs"), (64, "")])
def test_tgi_is_told_on_how_many_gpus_it_pads_nothing(rank: int, num_gpus: str) -> None:
    told = why(serve_adapter(files(rank=rank)), "TGI")
    assert (f"(on {num_gpus} at most: on more it pads" in told) if num_gpus else ("at most" not in told)


def test_a_wrong_factor_is_named_with_the_right_one_and_warned_of() -> None:
    served = serve_adapter(files(own={V1: (8, 32)}))
    assert f"multiplies all by 2: {V1} has 4; merge it" in why(served, "vLLM")
    assert warning_of(served).startswith("vLLM would load this and answer otherwise than it was trained")
    assert warning_of(serve_adapter(files())) == ""
    served = serve_adapter(files(own=of_all_layers("v_proj", 8, 24)))
    v0 = V1.replace(".1.", ".0.")
    assert why(served, "vLLM").endswith(
        f"multiplies all by 2: {v0} has 3 and 1 more differ; merge it (dist-lora merge)"
    )
    ignored = f"it ignores alpha_pattern and multiplies by lora_alpha / rank: {v0} by 4 in place of 3"
    assert why(served, "llama.cpp") == f"{ignored}, and 1 more; merge it (dist-lora merge)"
    assert why(serve_adapter(files(own={v0: (8, 24)})), "llama.cpp") == f"{ignored}; merge it (dist-lora merge)"
    assert warning_of(served).startswith("vLLM, TGI, llama.cpp, Ollama would load this")
    two = serve_adapter(files(own=of_all_layers("down_proj", 8, 16)))
    assert warning_of(two).startswith("llama.cpp and Ollama would load this")
    by_sqrt = serve_adapter(files(has_rslora=True, own={V1: (16, 128)}))
    assert "it ignores use_rslora and multiplies" in why(by_sqrt, "llama.cpp")
    served = serve_adapter(files(rank=24, alpha=48))
    assert "multiplies model.layers.0.self_attn.k_proj by 1.5 in place of 2" in why(served, "TGI")  # 48 / 32
    served = serve_adapter(files(rank=3, alpha=6))
    assert "multiplies model.layers.0.self_attn.k_proj by 0.75 in place of 2" in why(served, "TGI")
    assert [line.split()[:3] for line in lines_of(served)[:2]] == [["vLLM", "takes", "it"], ["TGI", "WRONG", "it"]]


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({}, "reorders the heads of q_proj and k_proj in the wrong matrix"),
        ({"linears": ("k_proj",)}, "reorders the heads of k_proj"),
        ({"linears": ("v_proj",), "rank": 64, "min_width": 32}, "transposes what has a rank (64) above a linear's width (32)"),
        ({"linears": ("v_proj",), "own": {V1: (64, 32)}, "min_width": 32}, "transposes what has a rank (64)"),
        ({"linears": ("v_proj",), "alpha": 7.5}, "takes whole numbers for lora_alpha only, not 7.5"),
    ],
)  # fmt: skip
def test_ollama_is_given_a_converted_file_where_its_own_conversion_would_be_wrong(adapter: dict, told: str) -> None:
    found = why(serve_adapter(files(**adapter)), "Ollama")
    assert f"ADAPTER ./adapter.gguf (where it says 'loras are not yet implemented', merge it). Never ADAPTER FOLDER: its own conversion {told}" in found  # fmt: skip
    as_wide = files(linears=("v_proj", "o_proj"), min_width=16)
    assert why(serve_adapter(as_wide), "Ollama").startswith("a Modelfile with FROM BASE and ADAPTER FOLDER")


def test_an_adapters_folder_is_judged_by_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "plain", random_adapter(tiny_llama(), rank=16), rank=16)
    assert verdicts(servers_of_adapter(tmp_path / "plain")) == ALL | {"TGI": "no"}  # 2 layers, and its base has 32
    write(tmp_path / "own", random_adapter(tiny_llama(), rank=16), rank=16, base=BaseIdentity("mine"))
    assert verdicts(servers_of_adapter(tmp_path / "own")) == ALL
    some = random_adapter(tiny_llama(num_layers=3), layers=(1,))
    write(tmp_path / "part", some, layers=[1], base=BaseIdentity("mine"))
    assert verdicts(servers_of_adapter(tmp_path / "part")) == ALL | {"TGI": "no"}


def test_an_adapter_of_its_own_ranks_by_linear_is_one_that_vllm_would_scale_wrongly(tmp_path: Path) -> None:
    """The factors are PEFT's own, read from a model that it made of the folder's settings."""
    tensors = random_adapter(tiny_llama(), rank=4, targets=("q_proj", "v_proj"))
    name = "model.layers.0.self_attn.v_proj"
    tensors |= {f"{name}.lora_A": torch.ones(2, 64), f"{name}.lora_B": torch.ones(32, 2)}
    modules = [
        ModuleAdapter(name=key.removesuffix(".lora_A"), rank=tensor.shape[0], alpha=8)
        for key, tensor in tensors.items()
        if key.endswith("A")
    ]
    write_adapter(
        tmp_path / "a", tensors=tensors, rank=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj"), modules=modules,
        base=BaseIdentity("mine"),
    )  # fmt: skip
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    made = get_peft_model(tiny_llama(), LoraConfig(**{k: settings[k] for k in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}))  # fmt: skip
    factors = {n.removeprefix("base_model.model."): m.scaling["default"] for n, m in made.named_modules() if hasattr(m, "lora_A")}  # fmt: skip
    assert factors[name] == 4 and factors["model.layers.1.self_attn.v_proj"] == 2
    served = servers_of_adapter(tmp_path / "a")
    assert verdicts(served) == {"vLLM": "wrong", "TGI": "wrong", "llama.cpp": "yes", "Ollama": "yes"}
    assert f"{name} has {factors[name]:g}" in why(served, "vLLM")


HUB_CONFIG = {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}}
NEW_CONFIG = {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HUB_CONFIG, ALL),
        (NEW_CONFIG, ALL | {"Ollama": "wrong"}),
        (NEW_CONFIG | {"rope_theta": 5e5}, ALL | {"Ollama": "wrong"}),
        (NEW_CONFIG | {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, ALL),
        (NEW_CONFIG | {"rope_parameters": {"rope_type": "default"}}, ALL | {"Ollama": "wrong"}),
        (NEW_CONFIG | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, ALL),
        (NEW_CONFIG | {"rope_theta": 5e5, "rope_parameters": None}, ALL),
        (NEW_CONFIG | HUB_CONFIG, ALL),
        (NEW_CONFIG | HUB_CONFIG | {"rope_scaling": None}, ALL | {"Ollama": "wrong"}),
        ({"architectures": ["LlamaModel"], "rope_theta": 1.0}, dict.fromkeys(SERVERS, "no")),
        *(({"architectures": names, "rope_theta": 1.0}, dict.fromkeys(SERVERS, "no")) for names in (None, [])),
        ({"rope_theta": 1.0}, dict.fromkeys(SERVERS, "no")),
    ],
)
def test_a_merged_model_is_judged_by_its_config(config: dict, expected: dict) -> None:
    served = serve_merged(config, is_float32=False, is_member=True)
    assert verdicts(served) == expected


def test_a_merged_model_in_float32_and_one_with_a_tokenizer_of_its_own_are_told_what_that_means() -> None:
    served = serve_merged(HUB_CONFIG, is_float32=True, is_member=False)
    assert "--dtype float32" in why(served, "vLLM") and "Llama 3's is" in why(served, "llama.cpp")
    served = serve_merged(HUB_CONFIG, is_float32=False, is_member=True)
    assert "float32" not in why(served, "vLLM") and "tokenizer" not in why(served, "llama.cpp")
