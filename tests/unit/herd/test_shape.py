"""The herd's facts against Meta's own list, its tokenizer, and transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models.llama3.tokenizer import Tokenizer
from llama_models.sku_list import all_registered_models
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.members import MEMBERS, Member
from dist_lora.herd.models import resolve_model
from dist_lora.herd.rope import RopeScaling
from dist_lora.herd.shape import Shape, module_path, read_shape

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A small Llama's config.json as transformers 4 wrote it; a change to None takes the entry out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "rope_theta": 500000.0,
        "rope_scaling": SCALING,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        **changes,
    }
    return {name: value for name, value in config.items() if value is not None}


def model_on_meta(config: dict[str, Any]) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


def hugging_face_config(shape: Shape, **changes: Any) -> dict[str, Any]:
    scaling = shape.rope_scaling
    return config_of(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context,
        rope_scaling={**SCALING, "factor": scaling.factor} if scaling else None,
        **changes,
    )


def metas_facts(member: Member) -> Any:
    """Meta's own entry of the member in bf16."""
    wanted = member.hub_id.replace("Meta-Llama", "Llama")
    entries = [
        model
        for model in all_registered_models()
        # The 405B with 16 kv heads is Meta's first release, not the one on the hub.
        if model.huggingface_repo == wanted and model.arch_args["n_kv_heads"] == 8
    ]
    (entry,) = entries
    return entry


def metas_ffn(dim: int, *, multiplier: float, multiple_of: int) -> int:
    """The feed-forward width as Meta's llama3/model.py computes it."""
    ffn = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * ((ffn + multiple_of - 1) // multiple_of)


@pytest.mark.parametrize("member", MEMBERS.values(), ids=lambda member: member.name)
def test_each_members_shape_is_that_of_metas_own_list(member: Member) -> None:
    meta, shape = metas_facts(member), member.shape
    arch = meta.arch_args
    assert (shape.hidden, shape.num_layers, shape.num_heads, shape.num_kv_heads) == (
        arch["dim"],
        arch["n_layers"],
        arch["n_heads"],
        arch["n_kv_heads"],
    )
    assert shape.ffn == metas_ffn(arch["dim"], multiplier=arch["ffn_dim_multiplier"], multiple_of=arch["multiple_of"])
    assert shape.head_dim == arch["dim"] // arch["n_heads"]
    assert (shape.vocab, shape.rope_theta, shape.norm_eps) == (128256, arch["rope_theta"], arch["norm_eps"])
    assert shape.context == meta.max_seq_length
    # Guard 3 8B is a tuned 3.1 8B; the list alone says that it is unscaled.
    assert (shape.rope_scaling is not None) == (arch["use_scaled_rope"] or member.name == "guard-3-8b")
    assert shape.tied == (arch["dim"] in (2048, 3072))


def test_the_herd_is_complete() -> None:
    sizes = {"3": ["8b", "70b"], "3.1": ["8b", "70b", "405b"], "3.2": ["1b", "3b"]}
    models = [f"{release}-{size}{kind}" for release in sizes for size in sizes[release] for kind in ("", "-instruct")]
    assert list(MEMBERS) == [*models, "3.3-70b-instruct", "guard-3-8b", "guard-3-1b"]
    assert all(member.name == name for name, member in MEMBERS.items())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("3-8b", 8_030_261_248),
        ("3.1-70b", 70_553_706_496),
        ("3.1-405b", 405_853_388_800),
        ("3.2-1b", 1_235_814_400),
        ("3.2-3b", 3_212_749_824),
        ("3.3-70b-instruct", 70_553_706_496),
        ("guard-3-1b", 1_235_814_400),
    ],
)
def test_parameters_are_those_that_are_published_and_that_transformers_builds(name: str, parameters: int) -> None:
    shape = MEMBERS[name].shape
    assert shape.num_parameters() == parameters
    assert sum(p.numel() for p in model_on_meta(hugging_face_config(shape)).parameters()) == parameters


@pytest.mark.parametrize("member", MEMBERS.values(), ids=lambda member: member.name)
def test_rope_stretches_as_the_release_says(member: Member) -> None:
    release = "3.2" if "1b" in member.name else "3.1" if member.guard else member.name.split("-")[0]
    assert (
        member.shape.rope_scaling
        == {
            "3": None,
            "3.1": RopeScaling(8.0, 1.0, 4.0, 8192),
            "3.2": RopeScaling(32.0, 1.0, 4.0, 8192),
            "3.3": RopeScaling(8.0, 1.0, 4.0, 8192),
        }[release]
    )


def test_special_tokens_are_those_of_metas_tokenizer() -> None:
    ids = Tokenizer.get_instance().special_tokens
    tokens = MEMBERS["3.1-8b-instruct"].tokens
    assert (tokens.begin_of_text, tokens.end_of_text) == (ids["<|begin_of_text|>"], ids["<|end_of_text|>"])
    assert (tokens.start_header, tokens.end_header) == (ids["<|start_header_id|>"], ids["<|end_header_id|>"])
    assert (tokens.end_of_turn, tokens.end_of_message) == (ids["<|eot_id|>"], ids["<|eom_id|>"])
    assert tokens.pad == ids["<|finetune_right_pad_id|>"]
    assert sorted(tokens.stop) == sorted(Tokenizer.get_instance().stop_tokens)


def test_llama_3_has_neither_the_pad_nor_the_message_end_of_3_1() -> None:
    base, instruct = MEMBERS["3-8b"].tokens, MEMBERS["3-8b-instruct"].tokens
    assert base.pad is None and base.end_of_message is None
    assert (base.stop, instruct.stop) == ((128001,), (128001, 128009))
    assert MEMBERS["3.1-8b"].tokens.stop == (128001,)


def test_a_members_purpose_says_what_it_can() -> None:
    assert MEMBERS["3-8b"].purpose == "continues text; a base for fine-tuning"
    assert MEMBERS["3.1-8b-instruct"].purpose == "answers, in chats (multilingual, long context, tool use)"
    assert MEMBERS["guard-3-1b"].purpose.startswith("judges whether a prompt or an answer is safe")
    assert [m.name for m in MEMBERS.values() if not m.is_finetuned] == [
        "3-8b", "3-70b", "3.1-8b", "3.1-70b", "3.1-405b", "3.2-1b", "3.2-3b",
    ]  # fmt: skip
    assert {m.licence for m in MEMBERS.values() if m.guard} == {
        "Llama 3.1 Community License",
        "Llama 3.2 Community License",
    }
    newest = MEMBERS["3.3-70b-instruct"]
    assert (newest.licence, str(newest.released)) == ("Llama 3.3 Community License", "2024-12-06")
    assert newest.purpose == "answers, in chats (multilingual, long context, tool use)"
    assert str(MEMBERS["3-70b"].released) == "2024-04-18" and str(MEMBERS["guard-3-8b"].released) == "2024-07-23"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 32])
def test_tensor_shapes_are_those_of_transformers_own_model(tied: bool, head_dim: int | None) -> None:
    config = config_of(tie_word_embeddings=tied, head_dim=head_dim)
    model = model_on_meta(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    shape = Shape.from_config(config, where="config.json")
    assert shape.tensor_shapes() == expected
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())


def test_linear_shapes_and_paths_are_those_of_transformers_own_modules() -> None:
    model = model_on_meta(config_of())
    for linear, (out, in_) in Shape.from_config(config_of(), where="config.json").linear_shapes().items():
        module = model.get_submodule(module_path(linear, layer=2))
        assert (module.out_features, module.in_features) == (out, in_)


def test_adapter_parameters_are_the_sum_of_r_times_in_plus_out() -> None:
    shape = Shape.from_config(config_of(), where="config.json")
    # q_proj is (64, 64), down_proj (64, 96): rank 4 on two layers.
    assert shape.adapter_parameters(["q_proj", "down_proj"], [0, 2], 4) == 2 * 4 * ((64 + 64) + (64 + 96))
    # All seven of 3.1 8B at rank 16, as PEFT prints it.
    eight = MEMBERS["3.1-8b"].shape
    assert eight.adapter_parameters(eight.linear_shapes(), range(32), 16) == 41_943_040


def test_the_config_of_transformers_4_and_of_5_give_the_same_shape() -> None:
    old = config_of()
    new = json.loads(LlamaConfig(**old).to_json_string())
    assert "rope_parameters" in new and "rope_scaling" not in new
    assert Shape.from_config(new | {"architectures": None}, where="x") == Shape.from_config(old, where="x")
    assert Shape.from_config(old, where="x").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("member", MEMBERS.values(), ids=lambda member: member.name)
def test_a_members_shape_survives_a_hugging_face_config(member: Member) -> None:
    assert Shape.from_config(hugging_face_config(member.shape), where="x") == member.shape


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it() -> None:
    absent = dict.fromkeys(
        [
            "architectures", "num_key_value_heads", "rope_theta", "rope_scaling", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "hidden_act",
        ]
    )  # fmt: skip
    config = config_of(**absent)
    theirs, ours = LlamaConfig(**config), Shape.from_config(config, where="x")
    assert ours.num_kv_heads == theirs.num_key_value_heads == 4
    assert ours.head_dim == theirs.head_dim == 16
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None and theirs.rope_parameters["rope_type"] == "default"
    assert (ours.context, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.tied is theirs.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "mistral"}, "model_type: found 'mistral', expected 'llama'"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures: found ['LlamaForSequenceClassification'], expected ['LlamaForCausalLM']",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        (
            {"attention_bias": True},
            "attention_bias: found true, expected false: the herd's linears have no bias",
        ),
        ({"mlp_bias": True}, "mlp_bias: found true, expected false: the herd's linears have no bias"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type: found 'linear', expected 'default' or 'llama3'",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type: found 'yarn', expected 'default' or 'llama3'",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling: found 'llama3', expected settings with rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1.0"),
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused_by_the_setting(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Shape.from_config(config_of(**changes), where="m/config.json")
    assert str(caught.value) == f"m/config.json: not a Llama that can be trained here:\n  {fault}"


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes in 4 bits of type 'fp4'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"bits": 3}, "{'bits': 3}"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes with {'quant_method': 'bitsandbytes'}"),
        ("int8", "'int8'"),
    ],
)
def test_a_model_quantized_in_a_way_that_is_not_read_is_refused_by_its_method(quantization: Any, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Shape.from_config(config_of(quantization_config=quantization), where="m/config.json")
    assert str(caught.value) == (
        "m/config.json: not a Llama that can be trained here:\n  quantization_config: found weights quantized by "
        f"{found}, expected none, or bitsandbytes with load_in_4bit and bnb_4bit_quant_type 'nf4': use the "
        "unquantized model"
    )
    assert caught.value.exit_code == 2


def test_a_model_that_is_nf4_by_bitsandbytes_has_the_shape_of_the_plain_one() -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized = Shape.from_config(config_of(quantization_config=settings), where="x")
    assert quantized == Shape.from_config(config_of(), where="x")


def test_all_foreign_parts_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Shape.from_config(config_of(mlp_bias=True, hidden_act="relu", model_type="mistral"), where="c")
    assert len(str(caught.value).split("\n")) == 4


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_size": None}, "hidden_size: is missing, expected a whole number above 0"),
        ({"vocab_size": "160"}, "vocab_size: found '160', expected a whole number above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: found True, expected a whole number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: found 0, expected a number above 0"),
        ({"rope_scaling": {**SCALING, "factor": None}}, "rope factor: found None, expected a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: found 'no', expected true or false"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, which doesn't divide the 4 heads"),
        ({"hidden_size": 66}, "num_attention_heads: found 4, which doesn't divide hidden_size 66"),
        ({"head_dim": 15}, "head_dim: found 15, expected an even number: RoPE rotates pairs"),
    ],
)
def test_a_damaged_config_names_each_size_that_cannot_be(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Shape.from_config(config_of(**changes), where="m/config.json")
    assert str(caught.value) == f"m/config.json is damaged:\n  {fault}\n  Fetch that file again."
    assert caught.value.exit_code == 4


def folder_with(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_folders_own_config_wins(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "config.json", json.dumps(config_of()))
    assert read_shape(folder).hidden == 64
    resolved = resolve_model(str(folder))
    assert (resolved.folder, resolved.hub_id, resolved.member) == (folder, None, None)


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "expected settings in")])
def test_a_config_json_that_cannot_be_read_is_damage(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(WeightsError, match=rf"config\.json is damaged: {said}.*Fetch that file again\."):
        read_shape(folder_with(tmp_path, "config.json", text))


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("tokenizer.json", r"expected config\.json, \*\.safetensors and the tokenizer's files side by side"),
        ("params.json", r"this is Meta's own format \(params\.json\); download the model in Hugging Face's format"),
        ("adapter_config.json", r"this is an adapter: set model\.name to its base and lora\.start_from to the adapter"),
    ],
)
def test_a_folder_without_config_json_says_what_it_is_instead(tmp_path: Path, file: str, advice: str) -> None:
    folder = folder_with(tmp_path, file, "{}")
    for ask in (lambda: resolve_model(str(folder)), lambda: read_shape(folder)):
        with pytest.raises(ConfigError, match=rf"model\.name: the folder .* has no config\.json: {advice}"):
            ask()


def test_an_adapter_inside_a_models_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "config.json", json.dumps(config_of()))
    read_shape(folder)
    folder_with(tmp_path, "adapter_config.json", "{}")
    for ask in (lambda: resolve_model(str(folder)), lambda: read_shape(folder)):
        with pytest.raises(ConfigError) as raised:
            ask()
        assert str(raised.value) == (
            f"model.name: the folder {folder} holds both a model (config.json) and an adapter (adapter_config.json), and "
            "transformers would use them together. Move adapter_config.json and adapter_model.safetensors to a folder of "
            "their own. This folder is then the base alone; to start from the adapter set lora.start_from to the other "
            "folder, and to make one model of both: dist-lora merge"
        )
        assert raised.value.exit_code == 2


@pytest.mark.parametrize("written", ["3.1-8b-instruct", "3.1-8B-Instruct"])
def test_a_member_is_found_in_any_case(written: str) -> None:
    resolved = resolve_model(written)
    assert (resolved.name, resolved.folder) == ("3.1-8b-instruct", None)
    assert resolved.hub_id == "meta-llama/Llama-3.1-8B-Instruct"
    assert resolved.member is MEMBERS["3.1-8b-instruct"]


@pytest.mark.parametrize(
    ("hub_id", "member"),
    [
        ("meta-llama/Llama-3.1-8B", "3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "3.1-8b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "3-70b-instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
    ],
)
def test_a_hub_id_stays_as_written_and_knows_its_member(hub_id: str, member: str | None) -> None:
    resolved = resolve_model(hub_id)
    assert (resolved.hub_id, resolved.folder) == (hub_id, None)
    assert resolved.member is (None if member is None else MEMBERS[member])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("3.1-8b-instuct", "nearest: 3.1-8b-instruct, "),
        ("Llama-3.1-70B-Instruct", "nearest: 3.1-70b-instruct, "),
        ("llama_guard_3_8b", "nearest: guard-3-8b, "),
        ("Meta-Llama-3-8B", "nearest: 3-8b, "),
        ("gpt", "members: 3-8b, 3-8b-instruct, "),
        ("./models/none", "members: 3-8b, "),
    ],
)
def test_a_name_that_is_nothing_offers_the_nearest_members(written: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(written)
    expected = "expected a herd member, an existing folder or a hub id (org/name); "
    assert str(caught.value).startswith(f"model.name: found {written!r}, {expected}{said}")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/llama", "x" * 5000, "a\0b"])
def test_a_name_that_no_folder_can_have_is_no_model(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.name: found .*, expected a herd member, an existing folder or a hub id"
    ):
        resolve_model(name)
