"""What LoRA does to a model, against counts by hand and the figures of its paper; and models given by their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.load import load_config
from dist_lora.config.schema import Config, LoraSection
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.models import known_model
from dist_lora.plan.explain import Way, explain, ways_of
from dist_lora.train.build import open_base
from dist_lora.world.world import World
from tests.shapes import GPT3, GPT3_WEIGHTS

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def config_of(*, shape: dict[str, Any] | None = None, name: str = "3-8b", quant: str = "none", **lora: Any) -> Config:
    model = {"name": name, "quant": quant, "shape": shape}
    return Config.model_validate({"run": "a", "model": model, "lora": lora, "data": {"train": "a.jsonl"}})


def ways(config: Config) -> dict[str, Way]:
    return {way.name: way for way in ways_of(config, known_model(config.model))}


def test_gpt3_at_rank_4_on_q_and_v_trains_what_the_paper_says() -> None:
    """LoRA's paper (arXiv 2106.09685, section 4.2) says of it: "35MB" saved, and "from 1.2TB to 350GB" of memory.

    The 37.7 MB are what 18.9 million weights take in 16 bits. The 350 GB are GPT-3 in 16 bits; the paper's 1.2 TB are less
    than the usual 16 bytes a weight, and are not what is reckoned here.
    """
    config = config_of(
        shape={**GPT3, "num_parameters": GPT3_WEIGHTS}, name="GPT-3", rank=4, targets=["q_proj", "v_proj"]
    )
    told = explain(config)
    assert 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert "trained 18,874,368, frozen 175,000,000,000: 0.011%" in told
    assert "37.7 MB in 16 bits" in told
    assert "q_proj v_proj  (12288, 12288)   (12288, 4)    (4, 12288)" in told
    lora, full = ways(config)["LoRA"], ways(config)["all weights"]
    assert full.state_bytes == 16 * 175e9 and full.saved_bytes == 350e9
    assert lora.state_bytes == pytest.approx(350e9 + 16 * 18_874_368, rel=1e-5)  # in whole rows
    assert "2.8 TB (8.0 x)" in told and "350.0 GB (4,635.9 x)" in told and "350.3 GB" in told
    assert "The frozen count is as given" in told


def test_without_a_count_a_shape_by_hand_is_a_llamas_and_said_to_be() -> None:
    config = config_of(shape=GPT3, rank=4, targets=["q_proj", "v_proj"])
    d = 12288
    assert known_model(config.model).shape.num_parameters() == 96 * (4 * d * d + 3 * d * 4 * d + 2 * d) + d + 50257 * d
    assert "The frozen count is that of a Llama of these sizes" in explain(config)
    assert "trained 18,874,368, frozen" in explain(config)


def test_a_layer_of_a_model_whose_weights_were_counted_by_hand_is_its_part_of_what_is_no_embedding() -> None:
    shape = known_model(config_of(shape={**GPT3, "num_parameters": GPT3_WEIGHTS}).model).shape
    assert shape.weights_of_a_layer() == pytest.approx(12 * 12288**2, rel=0.01)  # 4 d^2 of attention, 8 d^2 after it


def test_llama_3_8b_at_rank_5_by_hand() -> None:
    told = explain(config_of(rank=5))
    q, k, ffn = 5 * (4096 + 4096), 5 * (1024 + 4096), 5 * (14336 + 4096)
    assert 32 * (2 * q + 2 * k + 3 * ffn) == 13_107_200
    assert "trained 13,107,200, frozen 8,030,261,248: 0.163%" in told and "26.2 MB in 16 bits" in told
    assert "with r = 5 and alpha / r = 6.4" in told
    # O(r d) multiplications against O(d^2): 40,960 beside 16,777,216
    assert (
        "q_proj o_proj      (4096, 4096)     (4096, 5)     (5, 4096)    16,777,216         40,960, 410 times fewer"
        in told
    )
    assert (
        "k_proj v_proj      (1024, 4096)     (1024, 5)     (5, 4096)    4,194,304          25,600, 164 times fewer"
        in told
    )
    assert "gate_proj up_proj  (14336, 4096)    (14336, 5)" in told
    assert "down_proj          (4096, 14336)    (4096, 5)     (5, 14336)" in told


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_explained_in_some_ten_lines(name: str) -> None:
    lines = explain(config_of(name=name)).splitlines()
    assert 10 <= len(lines) <= 15 and max(map(len, lines)) <= 140
    assert lines[0].startswith(MEMBERS[name].title + ":")


@pytest.mark.parametrize("name", ["3-8b", "3.2-1b", "3.1-405b"])
def test_the_last_layers_alone_are_the_tensors_of_a_checkpoint_that_are_theirs(name: str) -> None:
    shape = MEMBERS[name].shape
    found = ways(config_of(name=name))
    for count, label in ((1, "the last layer"), (4, "the last 4 layers")):
        ours = 0
        for tensor, size in shape.tensor_shapes().items():
            if tensor.startswith("model.layers.") and int(tensor.split(".")[2]) >= shape.num_layers - count:
                ours += size[0] * (size[1] if len(size) == 2 else 1)
        assert found[label].trained == ours
        assert found[label].state_bytes == 2 * (shape.num_parameters() - ours) + 16 * ours
        assert found[label].saved_bytes == 2 * ours


def test_a_model_of_one_layer_has_no_last_four() -> None:
    assert [*ways(config_of(shape={**LLAMA_3_8B, "num_hidden_layers": 1}))] == ["all weights", "the last layer", "LoRA"]
    assert "the last 3 layers" in ways(config_of(shape={**LLAMA_3_8B, "num_hidden_layers": 3}))


def test_a_base_in_nf4_is_counted_as_it_is_kept() -> None:
    found = ways(config_of(quant="nf4"))["LoRA on a base in nf4"]
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    base = linears * 0.5625 + (8_030_261_248 - linears) * 2
    assert found.state_bytes == pytest.approx(base + 16 * 41_943_040, rel=1e-9)
    assert found.saved_bytes == 4 * 41_943_040


def test_adapters_in_some_layers_are_counted_there() -> None:
    assert "in 2 of 32 layers" in explain(config_of(layers=[30, 31]))
    assert ways(config_of(layers=[30, 31]))["LoRA"].trained == 41_943_040 // 16


def test_an_adapter_larger_than_its_matrix_is_said_to_be() -> None:
    assert "1.25 times as many" in explain(config_of(targets=["k_proj"], rank=1024))


def test_sizes_by_hand_are_explained_as_the_member_of_these_sizes() -> None:
    by_name, by_hand = (explain(config_of(**given)).splitlines() for given in ({}, {"shape": LLAMA_3_8B}))
    assert [line for line in by_hand if "frozen count" not in line][1:] == by_name[1:]


def test_sizes_are_given_in_the_names_of_a_config_json(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: a\nmodel:\n  name: mine\n  shape: {hiden_size: 4, num_hidden_layers: x}\ndata: {train: a}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides=["model.shape.vocab_size=0"])
    told = str(caught.value)
    assert f"{path}:4: model.shape.hiden_size: no such setting (nearest: hidden_size)" in told
    assert f"{path}:4: model.shape.hidden_size: is missing. Width d of the model." in told
    assert f"{path}:4: model.shape.num_hidden_layers: found 'x', expected a whole number of at least 1" in told
    assert "model.shape.vocab_size=0 (argument): found 0, expected a whole number of at least 1" in told


def test_a_size_whose_name_yaml_reads_as_a_number_is_told_with_the_names_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: a\nmodel: {name: mine, shape: {1: 2}}\ndata: {train: a}\n")
    with pytest.raises(
        ConfigError, match=r"model\.shape\.1: no such setting \(model\.shape has hidden_size, intermediate_size"
    ):
        load_config(path)


def test_one_size_is_changed_by_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: a\nmodel: {name: mine}\ndata: {train: a}\n")
    sizes = [f"model.shape.{name}={size}" for name, size in LLAMA_3_8B.items()]
    shape = load_config(path, overrides=[*sizes, "model.shape.num_hidden_layers=2"]).model.shape
    assert shape is not None and (shape.num_hidden_layers, shape.hidden_size) == (2, 4096)


@pytest.mark.parametrize("written", ["3", "[1]", "x"])
def test_a_shape_that_is_no_mapping_is_told_what_it_holds(tmp_path: Path, written: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"run: a\nmodel:\n  name: mine\n  shape: {written}\ndata: {{train: a}}\n")
    with pytest.raises(
        ConfigError,
        match=r"a\.yaml:4: model\.shape: found .*, expected settings, like shape: \{\.\.\.\} with hidden_size,",
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_key_value_heads": 5}, "model.shape.num_key_value_heads: found 5, which doesn't divide the 32 heads"),
        (
            {"num_attention_heads": 24},
            "model.shape.num_attention_heads: found 24, which doesn't divide hidden_size 4096",
        ),
        ({"head_dim": 65}, "model.shape.head_dim: found 65, expected an even number: RoPE rotates pairs"),
        ({"num_hidden_layers": 5000}, "model.shape.num_hidden_layers: found 5000, expected at most 1,000"),
        (
            {"num_parameters": 10**9},
            "model.shape.num_parameters: found 1,000,000,000, expected more than the 1,050,673,152 of the embedding and "
            "the head (vocab_size x hidden_size each; one where they are tied)",
        ),
    ],
)
def test_sizes_that_no_llama_has_are_told(changed: dict[str, Any], told: str) -> None:
    sizes = {**LLAMA_3_8B, **changed}
    if "num_attention_heads" in changed:
        del sizes["num_key_value_heads"]
    with pytest.raises(ConfigError) as caught:
        known_model(config_of(shape=sizes).model)
    assert told in str(caught.value)


def test_a_model_on_the_hub_of_which_only_the_name_is_known_is_told_so() -> None:
    with pytest.raises(ConfigError) as caught:
        known_model(config_of(name="org/some-llama").model)
    assert "org/some-llama is not a herd member, and its sizes are on the hub" in str(caught.value)
    assert known_model(config_of(name="meta-llama/Llama-3.1-8B").model).shape == MEMBERS["3.1-8b"].shape


def test_a_layer_that_a_model_lacks_is_told() -> None:
    with pytest.raises(ConfigError, match=r"lora\.layers: found 99, expected 0-31"):
        explain(config_of(layers=[99]))


def test_a_model_that_is_only_sizes_is_not_trained() -> None:
    with pytest.raises(ConfigError) as caught:
        open_base(config_of(shape=LLAMA_3_8B, name="mine"), World.alone())
    assert str(caught.value) == (
        "model.shape: mine is given by its sizes alone and has no weights: such a config is for plan and explain. To train, "
        "remove model.shape and set model.name to a member, a folder or a hub id"
    )
    assert caught.value.exit_code == 2


def test_a_rate_by_the_formula_is_explained_with_its_number() -> None:
    config = config_of(name="3-8b")
    with_auto = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": "auto"})})
    assert "optim.lr: auto is 0.000286: 5e-4 x (2000 / 4,096)^0.781" in explain(with_auto)
    assert "optim.lr" not in explain(config)


def test_rows_of_tokens_are_counted_once_or_twice_as_the_head_is_tied() -> None:
    plain, tokens = LoraSection(), LoraSection(train_tokens=["<|my|>", 128011])
    for name, rows, matrices in (("3.1-8b", 4, "embedding and head"), ("3.2-1b", 2, "the embedding")):
        shape = MEMBERS[name].shape
        more = rows * shape.hidden
        assert shape.trained_weights(tokens) - shape.trained_weights(plain) == more
        text = explain(config_of(name=name, train_tokens=["<|my|>", 128011]))
        assert (
            f"Of 2 tokens the rows of {matrices} are trained too: {rows} x {shape.hidden:,} = {more:,} weights." in text
        )
        assert f"trained {shape.trained_weights(tokens):,}" in text
