"""What an adapter has learned: the numbers of the dense dW, without one; recorded with the adapter that they are of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dist_lora.cli import app
from dist_lora.config.schema import LINEARS, ModuleAdapter
from dist_lora.errors import AdapterError, ConfigError, WeightsError
from dist_lora.lora.adapter_reader import open_adapter
from dist_lora.lora.learned import (
    LEARNED_FILE,
    Learned,
    LearnedLinear,
    learned_from,
    learned_table,
    read_learned,
    sentences,
    write_learned,
)
from dist_lora.lora.origin import identify_base
from dist_lora.lora.spectrum import norms_on_disk, singular_values, spectra
from dist_lora.work import look_at_learned
from tests.unit.lora.test_adapter_files import random_adapter, rewrite_config, tiny_llama, write

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A ``(R, D_in)`` and B ``(D_out, R)``, from (D_out, R, D_in)."""
    generator = torch.Generator().manual_seed(seed)
    d_out, rank, d_in = shape
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def linear_of(*values: float, weight_norm: float | None = None, name: str = Q0) -> LearnedLinear:
    return LearnedLinear(name, values, weight_norm)


# The numbers


@pytest.mark.parametrize("shape", [(48, 4, 32), (32, 8, 96), (5, 8, 32), (32, 8, 5), (3, 1, 7)])
def test_singular_values_are_those_of_the_dense_change(shape: tuple[int, int, int]) -> None:
    first, second = pair(*shape)
    rank, dense = shape[1], 1.7 * second.double() @ first.double()
    found = singular_values(first, second, scale=1.7)
    expected = torch.linalg.svdvals(dense)[:rank]
    assert len(found) == rank and found == sorted(found, reverse=True)
    torch.testing.assert_close(torch.tensor(found[: len(expected)]), expected.float(), rtol=1e-6, atol=1e-6)
    assert found[min(shape) :] == [0.0] * (rank - min(shape))
    assert linear_of(*found).norm == pytest.approx(float(dense.norm()), rel=1e-9)


def test_small_directions_keep_their_digits() -> None:
    """Where the squares are beyond fp32: B^T B would lose them."""
    first, second = torch.eye(3, 20), torch.eye(30, 3) * torch.tensor([1e30, 1.0, 1e-5])
    assert singular_values(first, second, scale=2.0) == pytest.approx([2e30, 2.0, 2e-5], rel=1e-6)


def test_effective_rank_and_directions_of_matrices_that_are_known() -> None:
    alike = singular_values(torch.eye(4, 9), torch.eye(7, 4), scale=0.5)
    assert alike == pytest.approx([0.5] * 4)
    assert (linear_of(*alike).effective_rank, linear_of(*alike).directions) == (pytest.approx(4), 4)
    one = singular_values(torch.ones(4, 9), torch.ones(7, 4), scale=1.0)  # all rows and columns alike: rank 1
    assert linear_of(*one).effective_rank == pytest.approx(1, abs=1e-6) and linear_of(*one).directions == 1
    # By hand: p = 1/2, 1/4, 1/4, so that the entropy is 1.5 ln 2; squares 4, 1, 1 of 6, and 90% are 5.4.
    hand = linear_of(2.0, 1.0, 1.0)
    assert (hand.effective_rank, hand.directions) == (pytest.approx(2**1.5), 3)
    assert linear_of(3.0, 1.0, 0.0).directions == 1  # 9 of 10 are 90%
    assert linear_of(5e-324, 0.0).effective_rank == 1.0


def test_an_untrained_linear_has_no_direction_and_divides_by_nothing() -> None:
    first, _ = pair(6, 3, 5)
    zero = linear_of(*singular_values(first, torch.zeros(6, 3), scale=2.0), weight_norm=4.0)
    assert (zero.norm, zero.relative, zero.effective_rank, zero.directions) == (0.0, 0.0, 0.0, 0)
    assert linear_of(1.0, weight_norm=0.0).relative is None
    assert [*sentences(Learned((zero, zero)))] == ["Nothing is learned: dW is zero in all 2 linears."]


def test_each_linear_has_its_own_rank_and_scale() -> None:
    modules = [ModuleAdapter(name=UP1, rank=2, alpha=8), ModuleAdapter(name=Q0, rank=4, alpha=4)]
    tensors: dict[str, Tensor] = {}
    for module in modules:
        first, second = pair(16, module.rank, 16, seed=module.rank)
        tensors |= {f"{module.name}.lora_A": first, f"{module.name}.lora_B": second}
    record = learned_from(spectra(tensors, modules), {Q0: 2.0}, modules)
    assert [(one.name, one.rank, one.weight_norm) for one in record.linears] == [(Q0, 4, 2.0), (UP1, 2, None)]
    for one, scale in zip(record.linears, (1.0, 4.0), strict=True):
        dense = scale * tensors[f"{one.name}.lora_B"] @ tensors[f"{one.name}.lora_A"]
        assert one.norm == pytest.approx(float(dense.norm()), rel=1e-5)


# On disk


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_llama().to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_of(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """One without a record, as an older version wrote it."""
    write(tmp_path / "adapter", random_adapter(tiny_llama()), base=identify_base(base))
    return tmp_path / "adapter"


def dense_of(adapter: Path, module: str, scale: float) -> Tensor:
    """dW in fp64 from the file's tensors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    first, second = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
    return scale * second @ first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_older_adapter_is_computed_from_its_base_and_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = base_of(tmp_path / "base", dtype), tmp_path / "adapter"
    write(adapter, random_adapter(tiny_llama()), base=identify_base(base))
    assert read_learned(adapter) is None
    record = look_at_learned(adapter, base=str(base))
    weights = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
    assert [(one.layer, one.linear) for one in record.linears] == [
        (layer, name) for layer in (0, 1) for name in LINEARS
    ]
    for one in record.linears:
        dense, weight = dense_of(adapter, one.name, 2.0), weights[f"{one.name}.weight"].double()
        assert one.weight_norm == pytest.approx(float(weight.norm()), rel=1e-6)
        assert one.relative == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-6)
        assert list(one.singular_values) == pytest.approx(torch.linalg.svdvals(dense)[:4].tolist(), rel=1e-6)
    written = read_learned(adapter)
    assert written is not None and written.has_weight_norms
    assert [one.norm for one in written.linears] == pytest.approx([one.norm for one in record.linears], rel=1e-6)
    base.rename(tmp_path / "gone")
    assert look_at_learned(adapter, base=None) == written  # the base isn't needed again


def test_a_base_published_in_nf4_has_the_norms_of_its_values(tmp_path: Path, base: Path, adapter: Path) -> None:
    tensors: dict[str, Tensor] = {}
    expected = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight") or "down" in name:  # its rows are no whole blocks
            tensors[name] = weight
            expected[name] = float(weight.double().norm())
            continue
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected[name] = float(functional.dequantize_4bit(codes, state).double().norm())
        tensors |= {name: codes} | {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    (tmp_path / "nf4").mkdir()
    save_file(tensors, tmp_path / "nf4" / "model.safetensors")
    (tmp_path / "nf4" / "config.json").write_bytes((base / "config.json").read_bytes())
    write(adapter, random_adapter(tiny_llama()), base=identify_base(tmp_path / "nf4"))
    norms = norms_on_disk(open_adapter(adapter), tmp_path / "nf4")
    assert norms == {name: pytest.approx(expected[f"{name}.weight"], rel=1e-6) for name in norms} and len(norms) == 14


def test_an_adapter_of_peft_with_patterns_and_rslora_has_its_scales(tmp_path: Path, base: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 6}, use_rslora=True,
        target_modules=["q_proj", "up_proj"], layers_to_transform=[1], init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "peft")
    record = look_at_learned(tmp_path / "peft", base=str(base))
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert [(one.linear, one.layer, one.rank) for one in record.linears] == [("q_proj", 1, 9), ("up_proj", 1, 4)]
    for one in record.linears:
        assert one.norm == pytest.approx(float(deltas[one.name].detach().norm()), rel=1e-5)


def test_what_is_not_finite_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[f"{UP1}.weight"][3, 3] = math.nan
    save_file(tensors, base / "model.safetensors")
    write(adapter, random_adapter(tiny_llama()), base=identify_base(base))
    with pytest.raises(WeightsError, match=rf"model.safetensors: {UP1}.weight holds NaN or infinity. Fetch it again"):
        look_at_learned(adapter, base=str(base))
    assert read_learned(adapter) is None
    file = adapter / "adapter_model.safetensors"
    content = load_file(file)
    content[f"base_model.model.{Q0}.lora_B.weight"][0, 0] = math.inf
    save_file(content, file)
    (adapter / "dist_lora.json").unlink()
    with pytest.raises(AdapterError, match=rf"NaN or infinity in base_model.model.{Q0}.lora_B.weight"):
        look_at_learned(adapter, base=str(base), reads_base=False)


def test_another_base_is_refused(tmp_path: Path, adapter: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"differs from it \(weights .*Name the model that it was trained on: --base"):
        look_at_learned(adapter, base=str(tmp_path / "other"))
    (adapter / "dist_lora.json").unlink()  # nothing says what it was trained on
    tiny_llama(num_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"model.layers.1.self_attn.q_proj.weight is missing, and B A \(64, 64\)"):
        look_at_learned(adapter, base=str(tmp_path / "short"))


# The record


def test_a_record_of_other_weights_or_a_damaged_one_is_told(adapter: Path) -> None:
    look_at_learned(adapter, base=None, reads_base=False)
    file = adapter / LEARNED_FILE
    content = json.loads(file.read_text())
    for changed, told in (
        ({"weights": "xxh3_128:0"}, r"was computed from other weights \(xxh3_128:0\) than those beside it \(xxh3_128:"),
        ({"format": 2}, r"has format 2, and format 1 is supported. Update dist-lora"),
        ({"linears": {Q0: {"singular_values": [], "weight_norm": None}}}, "singular_values: .*Remove it, and compute it"),
        ({"linears": {Q0: {"singular_values": [-1.0], "weight_norm": None}}}, "singular_values.0: .*greater than or equal"),
        ({"linears": {Q0: {"singular_values": [1e200], "weight_norm": None}}}, "singular_values.0: .*less than or equal"),
        ({"linears": {Q0: {"singular_values": [math.nan], "weight_norm": None}}}, "singular_values.0: .*or equal"),
        ({"linears": {}}, "is damaged: linears: Dictionary should have at least 1 item"),
        ({"linears": {"lm_head": {"singular_values": [1.0], "weight_norm": None}}}, "is damaged: linears.lm_head"),
    ):  # fmt: skip
        file.write_text(json.dumps({**content, **changed}))
        with pytest.raises(AdapterError, match=told):
            read_learned(adapter)
    file.write_text("{")
    with pytest.raises(AdapterError, match=r"learned.json is damaged: it is not JSON"):
        read_learned(adapter)


@pytest.mark.parametrize("name", [LEARNED_FILE, "dist_lora.json"])
def test_a_link_out_of_the_folder_is_not_read(adapter: Path, name: str) -> None:
    look_at_learned(adapter, base=None, reads_base=False)
    (adapter / name).rename(adapter.parent / "elsewhere")
    (adapter / name).symlink_to(adapter.parent / "elsewhere")
    with pytest.raises(AdapterError, match=rf"adapter has links that point outside of it: {name} \(to .*elsewhere\)"):
        read_learned(adapter)


def test_a_new_adapter_in_the_folder_takes_the_old_record_away(adapter: Path) -> None:
    look_at_learned(adapter, base=None, reads_base=False)
    write(adapter, random_adapter(tiny_llama()), weight_norms={Q0: 2.0})
    record = read_learned(adapter)
    assert record is not None and [one.name for one in record.linears if one.weight_norm] == [Q0]
    write(adapter, random_adapter(tiny_llama()))
    assert read_learned(adapter) is None


def test_a_folder_that_cannot_be_written_is_looked_at_all_the_same(adapter: Path, monkeypatch, caplog) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dist_lora.lora.learned.write_whole", refuse)
    assert len(look_at_learned(adapter, base=None, reads_base=False).linears) == 14
    assert "adapter: can't be written: Permission denied. The next call computes it again" in caplog.text


# In words


def test_the_sentences_count_the_numbers_at_hand() -> None:
    record = Learned(
        (
            linear_of(3.0, 0.0, 0.0, weight_norm=100.0),
            linear_of(2.0, 2.0, 2.0, weight_norm=100.0, name=UP1),
            linear_of(0.0, 0.0, weight_norm=50.0, name="model.layers.1.mlp.down_proj"),
        )
    )
    assert [*sentences(record)] == [
        "dW is zero in 1 of 3 linears.",
        "dW is 3% to 3.46% of W by norm, most in layer 1 up_proj, layer 0 q_proj.",
        "In half of the 2 linears, 1 or fewer of 3 directions hold 90% of dW's squared norm; the median effective rank is 2.",
    ]
    head, *rows = learned_table(record)
    assert head[3] == "|dW| / |W|, median"
    assert rows == [
        ["q_proj", "1", "3", "3%", "3%", "0", "1", "1"],
        ["up_proj", "1", "3", "3.46%", "3.46%", "1", "3", "3"],
        ["down_proj", "1", "2", "0%", "0%", "1", "0", "0"],
    ]


def test_without_the_norms_of_w_the_norm_of_dw_is_told() -> None:
    record = Learned((linear_of(3.0, 4.0), linear_of(1.0, weight_norm=2.0, name=UP1)))
    assert not record.has_weight_norms
    assert next(iter(sentences(record))) == "The norm of dW is 1 to 5, most in layer 0 q_proj, layer 1 up_proj."
    assert learned_table(record)[0][3] == "|dW|, median"


def test_the_command_takes_a_run_prints_a_table_and_records(tmp_path: Path, base: Path, adapter: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "adapter")
    rewrite_config(run / "adapter", base_model_name_or_path=str(base))
    done = CliRunner().invoke(app, ["learned", str(run), "--base", str(base)], catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and [line.split()[0] for line in lines[1:8]] == list(LINEARS)
    assert "of W by norm, most in layer" in lines[8] and len(lines) == 10
    as_json = CliRunner().invoke(app, ["learned", str(run), "--json"], catch_exceptions=False)
    found = json.loads(as_json.stdout)
    assert found["adapter"] == str(run / "adapter") and len(found["linears"]) == 14
    assert found["linears"][Q0]["weight_norm"] > 0
    with pytest.raises(ConfigError, match="--base MODEL and --without-base contradict each other"):
        CliRunner().invoke(app, ["learned", str(run), "--base", "x", "--without-base"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="expected an adapter's folder"):
        CliRunner().invoke(app, ["learned", str(tmp_path / "none")], catch_exceptions=False)


def test_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    record = Learned((linear_of(0.12345678901, 1e-30, 0.0, weight_norm=1234567.891),))
    write_learned(tmp_path, record, weights=None)
    read = read_learned(tmp_path)
    assert read == Learned((linear_of(0.1234568, 1e-30, 0.0, weight_norm=1234568.0),))
