"""A checkpoint that bitsandbytes or transformers saved in NF4 is read as it is: their codes, and their scales to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_lora.base.index import open_index
from dist_lora.base.quant.formats import Nf4
from dist_lora.base.quant.nf4 import quantize_nf4
from dist_lora.base.quant.published import NF4_ON_DISK, BaseOnDisk, open_base_on_disk
from dist_lora.errors import ConfigError, DistLoraError, WeightsError
from dist_lora.herd.shape import read_shape
from dist_lora.lora.origin import identify_base

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
ROWS, WIDTH = 37, 192  # 3 blocks a row, 111 in all


def random_weight(*, rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator)).to(dtype)


def as_published(
    weight: Tensor, *, is_nested: bool, storage: torch.dtype = torch.uint8, name: str = NAME, **settings: Any
) -> dict[str, Tensor]:
    """The tensors that transformers saves for one weight."""
    chosen = {"blocksize": 64, "quant_type": "nf4", **settings}
    codes, state = functional.quantize_4bit(weight, compress_statistics=is_nested, quant_storage=storage, **chosen)
    packed = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {name: codes, **packed}


def write(folder: Path, tensors: dict[str, Tensor], *, with_norm: bool = True) -> Path:
    norm = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)} if with_norm else {}
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **norm}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The tensors with other settings in the JSON beside the weight; None takes one out."""
    settings = json.loads(bytes(tensors[STATE].tolist())) | changes
    text = json.dumps({key: value for key, value in settings.items() if value is not None})
    return {**tensors, STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def library_weight(folder: Path, name: str) -> Tensor:
    """What bitsandbytes makes of a weight on disk, in the type that it was saved from."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    beside = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    return functional.dequantize_4bit(tensors[name], state)


def library_absmax(folder: Path, name: str) -> Tensor:
    beside = {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
        if key.startswith(f"{name}.")
    }
    state = functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    if not state.nested:
        return state.absmax
    return functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def message(folder: Path, *, quant: str = "nf4", kind: type[DistLoraError] = WeightsError) -> str:
    with pytest.raises(kind) as raised:
        open_base_on_disk(folder, quant=quant)
    assert raised.value.exit_code == {WeightsError: 4, ConfigError: 2}[kind]
    return str(raised.value)


@pytest.fixture(params=[False, True], ids=["fp32 absmax", "nested absmax"])
def is_nested(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_rows_are_those_that_the_library_dequantizes(tmp_path, is_nested, storage, dtype):
    weight = random_weight(dtype=dtype)
    folder = write(tmp_path, as_published(weight, is_nested=is_nested, storage=storage))
    on_disk = open_base_on_disk(folder, quant="nf4").nf4[NAME]
    codes = quantize_nf4(weight)[0]
    whole, absmax = library_weight(folder, NAME), library_absmax(folder, NAME).view(ROWS, -1)
    assert on_disk.shape == (ROWS, WIDTH) and whole.dtype == dtype
    for first, count in [(0, ROWS), (0, 1), (5, 17), (36, 1), (20, 0), (37, 0)]:
        parts = on_disk.read_rows(first, count)
        here = slice(first, first + count)
        assert torch.equal(parts["codes"], codes[here]) and parts["codes"].dtype == torch.uint8
        assert torch.equal(parts["absmax"].view(torch.int32), absmax[here].contiguous().view(torch.int32))
        assert torch.equal(Nf4().dequantize(parts, dtype), whole[here])
        assert all(part.is_contiguous() for part in parts.values())


def test_rows_that_begin_within_a_nested_block_take_its_scale(tmp_path):
    weight = random_weight(rows=41, width=64 * 100)  # a row has 100 blocks, and 256 share a scale
    folder = write(tmp_path, as_published(weight, is_nested=True))
    on_disk = open_base_on_disk(folder, quant="nf4").nf4[NAME]
    absmax = library_absmax(folder, NAME).view(41, 100)
    assert len(load_file(folder / "model.safetensors")[f"{NAME}.nested_absmax"]) == 17
    for first, count in [(0, 41), (2, 1), (2, 2), (3, 5), (38, 3), (25, 1), (26, 0)]:
        assert torch.equal(on_disk.read_rows(first, count)["absmax"], absmax[first : first + count])


def test_only_the_bytes_of_the_rows_are_read(tmp_path, monkeypatch, is_nested):
    rows, width = 4_096, 4_096
    codes_bytes, blocks = rows * width // 2, rows * width // 64
    small = as_published(torch.ones(64, 64, dtype=torch.bfloat16), is_nested=is_nested)
    tensors = change_state(small, shape=[rows, width])
    tensors |= {
        NAME: torch.full((codes_bytes, 1), 0x1F, dtype=torch.uint8),
        f"{NAME}.absmax": torch.ones(blocks, dtype=torch.uint8 if is_nested else torch.float32),
    }
    if is_nested:
        tensors[f"{NAME}.nested_absmax"] = torch.ones(blocks // 256)
    write(tmp_path, tensors)
    real_preadv, counts = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(got := real_preadv(*a)) or got)
    on_disk = open_base_on_disk(tmp_path, quant="nf4").nf4[NAME]
    assert sum(counts) < 500
    counts.clear()
    parts = on_disk.read_rows(1_000, 8)
    assert parts["codes"].shape == (8, width // 2) and parts["codes"].eq(0x1F).all()
    of_codes, of_absmax = 8 * width // 2, 8 * width // 64
    assert sum(counts) == of_codes + (of_absmax + 1024 + 4 * of_absmax // 256 if is_nested else 4 * of_absmax)


@pytest.fixture(scope="module")
def saved_by_transformers(tiny_llama, tmp_path_factory) -> Callable[[bool, str, str | None], Path]:
    """Makes a folder that transformers quantized and saved: (double quantization, storage, one file or several)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny_llama(dtype="bfloat16")

    def make(is_nested: bool, storage: str, shard_size: str | None) -> Path:
        folder = tmp_path_factory.mktemp("published")
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=is_nested,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=["lm_head", "k_proj"],
        )
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
        return folder

    return make


@pytest.mark.parametrize(("storage", "shard_size"), [("uint8", None), ("bfloat16", "20KB")])
def test_a_model_that_transformers_saved(saved_by_transformers, tiny_llama, is_nested, storage, shard_size):
    folder = saved_by_transformers(is_nested, storage, shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size is not None)
    shape = read_shape(folder)
    base = open_base_on_disk(folder, quant="nf4")
    base.index.expect(shape.tensor_shapes())
    assert len(base.nf4) == 2 * 6  # k_proj was left plain
    plain = load_file(tiny_llama(dtype="bfloat16") / "model.safetensors")
    for name, tensor in base.index.tensors.items():
        assert (tensor.dtype == NF4_ON_DISK) == (name in base.nf4)
        if name not in base.nf4:
            assert tensor.dtype == "BF16"
            continue
        rows = shape.tensor_shapes()[name][0]
        parts = base.nf4[name].read_rows(0, rows)
        assert torch.equal(Nf4().dequantize(parts, torch.bfloat16), library_weight(folder, name)), name
        assert torch.equal(parts["codes"], quantize_nf4(plain[name])[0]), name
    # What an adapter remembers of its base can be made of it.
    assert len(identify_base(folder).content_hash) == 32


def test_a_plain_folder_is_its_index(tiny_llama):
    folder = tiny_llama()
    for quant in ("none", "nf4", "int8"):
        assert open_base_on_disk(folder, quant=quant) == BaseOnDisk(open_index(folder), {})


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_nf4_on_disk_can_be_nothing_else_in_memory(tmp_path, is_nested, quant):
    folder = write(tmp_path, as_published(random_weight(), is_nested=is_nested))
    assert message(folder, quant=quant, kind=ConfigError) == (
        f"model.quant: {quant}, and {folder} holds 1 weights that are quantized already, in NF4 by bitsandbytes. Set "
        "model.quant to nf4, or use the model's unquantized folder."
    )
    with pytest.raises(WeightsError, match=r"holds \d tensors of a dtype other than BF16, F16 and F32"):
        open_index(folder)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"blocksize": 128}, "blocksize 128"),
    ],
)
def test_another_type_or_block_is_refused_with_what_is_read(tmp_path, is_nested, settings, what):
    folder = write(tmp_path, as_published(random_weight(), is_nested=is_nested, **settings))
    assert message(folder, kind=ConfigError) == (
        f"{folder} holds weights quantized by bitsandbytes in an unsupported way (supported is NF4 in blocks of 64 "
        "weights, with absmax in fp32 or double-quantized). Use the model's unquantized folder.\n"
        f"  {NAME}: {what}"
    )


def test_all_refused_weights_are_counted(tmp_path):
    tensors: dict[str, Tensor] = {}
    for layer in range(7):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors |= as_published(random_weight(), is_nested=False, name=name, quant_type="fp4")
    text = message(write(tmp_path, tensors), kind=ConfigError)
    assert "model.layers.4.mlp.up_proj.weight: quant_type 'fp4' and 2 more" in text


def test_rows_that_share_blocks_and_foreign_levels_are_refused(tmp_path):
    folder = write(tmp_path, as_published(random_weight(rows=2, width=96), is_nested=False))
    assert f"{NAME}: rows of 96 weights, which share blocks" in message(folder, kind=ConfigError)
    tensors = as_published(random_weight(), is_nested=False)
    tensors[f"{NAME}.quant_map"][3] += 1e-6
    assert f"{NAME}: levels [-1.0, -0.6962, -0.5251, -0.3949]... in its quant_map" in message(
        write(tmp_path, tensors), kind=ConfigError
    )
    nested = change_state(as_published(random_weight(), is_nested=True), nested_dtype="bfloat16")
    assert f"{NAME}: nested_dtype 'bfloat16'" in message(write(tmp_path, nested), kind=ConfigError)


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_that_is_missing_is_named(tmp_path, part):
    tensors = as_published(random_weight(), is_nested=True)
    del tensors[f"{NAME}.{part}"]
    folder = write(tmp_path, tensors)
    assert message(folder) == (
        f"{folder} lacks {NAME}.{part}, without which a quantized weight can't be read. Fetch the weights again."
    )


def test_a_weight_whose_codes_are_missing_is_named(tmp_path):
    tensors = as_published(random_weight(), is_nested=False)
    del tensors[NAME]
    assert f"lacks {NAME}, without which a quantized weight can't be read" in message(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("part", "wrong", "what"),
    [
        (NAME, torch.zeros(7, 1, dtype=torch.uint8), "it has 7 bytes of U8, and 3,552 of any type were expected"),
        (f"{NAME}.absmax", torch.zeros(111), "it has 444 bytes of F32, and 111 of U8 were expected"),
        (f"{NAME}.nested_absmax", torch.zeros(2), "it has 8 bytes of F32, and 4 of F32 were expected"),
        (
            f"{NAME}.nested_quant_map",
            torch.zeros(256, dtype=torch.bfloat16),
            "it has 512 bytes of BF16, and 1,024 of F32 were expected",
        ),
        (f"{NAME}.quant_map", torch.zeros(15), "it has 60 bytes of F32, and 64 of F32 were expected"),
        (STATE, torch.zeros(4), "it has 16 bytes of F32, and JSON in bytes was expected"),
        (STATE, torch.zeros(10_001, dtype=torch.uint8), "it has 10,001 bytes of U8, and JSON in bytes was expected"),
        (STATE, torch.tensor([123, 34, 97], dtype=torch.uint8), "it is not JSON (Unterminated string"),
        (STATE, torch.tensor([255, 254], dtype=torch.uint8), "it is not JSON ("),
        (STATE, torch.tensor([49], dtype=torch.uint8), "a JSON object was expected"),
    ],
)
def test_a_damaged_part_is_named_with_what_was_expected(tmp_path, part, wrong, what):
    folder = write(tmp_path, {**as_published(random_weight(), is_nested=True), part: wrong})
    text = message(folder)
    assert text.startswith(f"{folder / 'model.safetensors'} is damaged: {part}: {what}") and "Fetch it again." in text


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shape": [ROWS]}, "shape is [37], and two sizes were expected"),
        ({"shape": None}, "shape is None, and two sizes were expected"),
        ({"shape": [-1, 64]}, "shape is [-1, 64], and two sizes were expected"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0, and a whole number above 0 was expected"),
        ({"nested_blocksize": None}, "nested_blocksize is None, and a whole number above 0 was expected"),
        ({"nested_offset": float("nan")}, "nested_offset is nan, and a number was expected"),
        ({"nested_offset": "0.1"}, "nested_offset is '0.1', and a number was expected"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, changes, what):
    folder = write(tmp_path, change_state(as_published(random_weight(), is_nested=True), **changes))
    assert f"is damaged: {STATE}: {what}. Fetch it again." in message(folder)


def test_a_scale_that_is_not_finite_is_named_by_its_row(tmp_path):
    tensors = as_published(random_weight(), is_nested=False)
    tensors[f"{NAME}.absmax"][3 * 20 + 2] = float("inf")
    on_disk = open_base_on_disk(write(tmp_path, tensors), quant="nf4").nf4[NAME]
    on_disk.read_rows(0, 20)
    with pytest.raises(WeightsError, match=rf"damaged: in {NAME} the scale of row 20, block 2 is inf\. Fetch it again"):
        on_disk.read_rows(15, 10)


def test_bytes_that_belong_to_no_weight_are_refused(tmp_path):
    tensors = {**as_published(random_weight(), is_nested=True), "model.odd": torch.zeros(3, dtype=torch.uint8)}
    assert "holds 1 tensor of a dtype other than BF16, F16 and F32: model.odd (U8)" in message(write(tmp_path, tensors))
    only = write(tmp_path, {"model.odd": torch.zeros(3, dtype=torch.uint8)})
    assert "holds 1 tensor of a dtype other than BF16, F16 and F32: model.odd (U8)" in message(only)


def test_a_file_that_became_shorter_is_told_by_name(tmp_path, is_nested):
    folder = write(tmp_path, as_published(random_weight(), is_nested=is_nested), with_norm=False)
    on_disk = open_base_on_disk(folder, quant="nf4").nf4[NAME]
    os.truncate(folder / "model.safetensors", on_disk.codes.start + 10)
    with pytest.raises(WeightsError, match="the file was truncated"):
        on_disk.read_rows(0, ROWS)
