"""A merged model is the base plus what was trained, tensor by tensor; or there is an error and no folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_lora.base.index import open_index
from dist_lora.errors import AdapterError, ConfigError, SaveError, WeightsError
from dist_lora.herd.shape import Shape
from dist_lora.lora.merge import merge_adapter
from dist_lora.lora.origin import identify_base
from tests import ROOT
from tests.unit.lora.test_adapter_files import LINEARS, random_adapter, rewrite_config, rewrite_keys, tiny_llama, write

TARGET = "model.layers.1.mlp.up_proj"


def make_base(folder: Path, *, dtype: torch.dtype = torch.float32, num_shards: int = 1, **changes: Any) -> Path:
    model = tiny_llama(**changes).to(dtype)
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=num_bytes + 1 if num_shards == 1 else num_bytes // num_shards)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    write(tmp_path / "adapter", random_adapter(tiny_llama()), base=identify_base(base))
    return tmp_path / "adapter"


def refused(kind: type[Exception], **arguments: Any) -> str:
    """The message of a merge that fails and leaves nothing behind."""
    before = sorted(arguments["out"].parent.iterdir())
    with pytest.raises(kind) as raised:
        merge_adapter(arguments.pop("adapter"), **arguments)
    assert sorted(arguments["out"].parent.iterdir()) == before
    return str(raised.value)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_merged_logits_are_those_of_peft_with_the_adapter_beside_the_base(tmp_path, is_tied, num_shards):
    base = make_base(tmp_path / "base", is_tied=is_tied, num_shards=num_shards)
    assert (len(list(base.glob("*.safetensors"))) >= 4) == (num_shards == 4)
    write(tmp_path / "adapter", random_adapter(tiny_llama()), base=identify_base(base))
    report = merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "new" / "merged")
    ids = torch.arange(40)[None]
    stock = AutoModelForCausalLM.from_pretrained(base)
    expected = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()(ids).logits
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(merged.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.model.embed_tokens.weight, tiny_llama(is_tied=is_tied).model.embed_tokens.weight)
    assert (report.changed_tensors, report.bytes_written) == (14, open_index(base).num_bytes)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_are_summed_in_fp32_and_rounded_once_and_nothing_else_changes(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=dtype)
    tensors = random_adapter(tiny_llama(), targets=("q_proj", "up_proj"), layers=(1,))
    write(tmp_path / "adapter", tensors, targets=("q_proj", "up_proj"), layers=(1,), base=identify_base(base))
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged")
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    targets = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert set(before) == set(after)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        assert after[name].dtype == dtype
        if module not in targets:
            assert torch.equal(after[name], tensor), name
            continue
        b, a = (tensors[f"{module}.lora_{half}"].double() for half in "BA")
        exact = tensor.double() + 2 * b @ a
        # Half a unit in the last place is what one rounding costs. The fp32 sum before it has up to six roundings of a
        # term: a product, three additions within B A, the scale, and the base. They count where the sum nearly cancels.
        terms = tensor.double().abs() + 2 * b.abs() @ a.abs()
        unit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
        unit = unit.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        assert ((after[name].double() - exact).abs() <= 0.5 * unit + 6 * 2**-24 * terms).all()


def test_files_tensors_and_index_mirror_the_base(tmp_path):
    base = make_base(tmp_path / "base", num_shards=4)
    write(tmp_path / "adapter", random_adapter(tiny_llama()))
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged", force=True)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == files
    for file in files:
        with safe_open(base / file, "pt") as before, safe_open(tmp_path / "merged" / file, "pt") as after:
            assert after.metadata() == {"format": "pt"}
            assert list(after.keys()) == list(before.keys())
    indexes = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "merged")]
    assert indexes[0] == indexes[1]
    assert [t.name for t in open_index(tmp_path / "merged").tensors.values()] == list(open_index(base).tensors)


def test_a_slice_boundary_within_a_tensor_changes_nothing(tmp_path, base, adapter, monkeypatch):
    merge_adapter(adapter, base=base, out=tmp_path / "whole")
    monkeypatch.setattr("dist_lora.lora.merge._SLICE_BYTES", 1000)
    told: list[tuple[int, int]] = []
    merge_adapter(adapter, base=base, out=tmp_path / "sliced", on_progress=lambda *a: told.append(a))
    whole, sliced = weights_of(tmp_path / "whole"), weights_of(tmp_path / "sliced")
    for name, tensor in whole.items():
        torch.testing.assert_close(sliced[name], tensor, atol=1e-6, rtol=1e-6)
    total = open_index(base).num_bytes
    assert told[-1] == (total, total) and len(told) > 100 and told == sorted(told)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("on_disk", [torch.bfloat16, torch.float32])
def test_the_type_of_the_result_can_be_chosen(tmp_path, dtype, stored, on_disk):
    base = make_base(tmp_path / "base", dtype=on_disk, num_shards=4)
    write(tmp_path / "adapter", random_adapter(tiny_llama()), base=identify_base(base))
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged", dtype=dtype)
    after = weights_of(tmp_path / "merged")
    assert {tensor.dtype for tensor in after.values()} == {stored}
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[norm], weights_of(base)[norm].to(stored))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == stored
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def test_an_rslora_adapter_that_peft_made_is_merged_with_its_own_scale(tmp_path, base):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(LINEARS), use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged")
    ids = torch.arange(40)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


# What must not be merged


def test_a_renamed_key_is_named_and_nothing_is_left(tmp_path, base, adapter):
    key = f"base_model.model.{TARGET}.lora_A.weight"
    rewrite_keys(adapter, lambda t: {k.replace("up_proj", "up") if k == key else k: v for k, v in t.items()})
    text = refused(AdapterError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert (
        f"missing: {key}" in text and f"unexpected, on none of Llama's linears: {key.replace('up_proj', 'up')}" in text
    )


def test_layers_that_the_base_does_not_have_are_named(tmp_path, base):
    write(tmp_path / "adapter", random_adapter(tiny_llama(num_layers=3)))
    text = refused(ConfigError, adapter=tmp_path / "adapter", base=base, out=tmp_path / "merged", force=True)
    assert "doesn't fit" in text
    assert "no such weight in the base: base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in text


def test_an_adapter_for_all_layers_that_lacks_the_last_one(tmp_path, base):
    write(tmp_path / "adapter", random_adapter(tiny_llama(num_layers=1)))
    text = refused(AdapterError, adapter=tmp_path / "adapter", base=base, out=tmp_path / "merged", force=True)
    assert "its config names 7 linears that it has no tensors for: model.layers.1." in text and "and 2 more" in text


def test_another_width_is_named_with_both_shapes(tmp_path, base, adapter):
    key = f"base_model.model.{TARGET}.lora_B.weight"
    rewrite_keys(adapter, lambda t: {**t, key: torch.ones(95, 4)})
    text = refused(ConfigError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert f"of another shape: {TARGET}.weight is (96, 64) and the adapter's B A (95, 64)" in text


@pytest.mark.parametrize("half", ["A", "B"])
def test_an_untrained_adapter_is_refused(tmp_path, base, half):
    tensors = random_adapter(tiny_llama())
    zeroed = {key: tensor * 0 if key.endswith(half) else tensor for key, tensor in tensors.items()}
    write(tmp_path / "adapter", zeroed)
    text = refused(AdapterError, adapter=tmp_path / "adapter", base=base, out=tmp_path / "merged", force=True)
    assert "adds nothing to 14 of its 14 targets because their A or B is zero: model.layers.0.self_attn.q_proj," in text
    assert "no weight would change there. It was never trained" in text


def test_a_change_that_rounding_swallows_is_named_and_shows_in_fp32(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    tensors = random_adapter(tiny_llama())
    tensors[f"{TARGET}.lora_B"] *= 1e-9
    write(tmp_path / "adapter", tensors, base=identify_base(base))
    text = refused(AdapterError, adapter=tmp_path / "adapter", base=base, out=tmp_path / "merged")
    assert f"would not change 1 of the 14 weights that it targets: {TARGET}.weight. Its update is lost" in text
    tensors[f"{TARGET}.lora_B"] *= 1e5
    write(tmp_path / "adapter", tensors, base=identify_base(base))
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged", dtype="fp32")


def test_a_sum_beyond_fp16_is_named(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.float16)
    tensors = random_adapter(tiny_llama())
    tensors[f"{TARGET}.lora_B"] *= 1e7
    write(tmp_path / "adapter", tensors, base=identify_base(base))
    text = refused(AdapterError, adapter=tmp_path / "adapter", base=base, out=tmp_path / "merged")
    assert f"turns 1 weights into NaN or infinity: {TARGET}.weight. If the base is in fp16, merge to bf16" in text


def test_another_base_of_the_same_shapes_is_refused_unless_forced(tmp_path, base, adapter):
    other = make_base(tmp_path / "other", seed=1)
    text = refused(ConfigError, adapter=adapter, base=other, out=tmp_path / "merged")
    there, here = open_index(base).content_hash(), open_index(other).content_hash()
    assert f"was trained on base, and {other} differs from it (weights {there}, here {here})." in text
    assert "Merge it into the model that it was trained on, or use --force." in text
    rewritten = json.loads((base / "config.json").read_text()) | {"rope_theta": 5.0}
    (base / "config.json").write_text(json.dumps(rewritten))
    text = refused(ConfigError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert "(config.json " in text and "weights" not in text
    merge_adapter(adapter, base=other, out=tmp_path / "merged", force=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_base_may_lie_elsewhere(tmp_path, base, adapter):
    base.rename(tmp_path / "moved")
    assert merge_adapter(adapter, base=tmp_path / "moved", out=tmp_path / "merged").changed_tensors == 14


def test_a_folder_that_exists_is_never_touched(tmp_path, base, adapter):
    (tmp_path / "merged").mkdir()
    text = refused(ConfigError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert "merged exists already. Name a new folder for the merged model, or remove that one." in text
    assert list((tmp_path / "merged").iterdir()) == []


def test_damaged_input_keeps_its_own_errors(tmp_path, base, adapter):
    rewrite_config(adapter, use_dora=True)
    assert "use_dora" in refused(ConfigError, adapter=adapter, base=base, out=tmp_path / "merged")
    rewrite_config(adapter, use_dora=False)
    (base / "tokenizer.json").write_text("{")
    text = refused(WeightsError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert "tokenizer.json is damaged: it is not JSON" in text
    (base / "config.json").unlink()
    text = refused(WeightsError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert "config.json can't be read" in text


def test_a_base_that_becomes_shorter_while_it_is_read(tmp_path, base, adapter):
    def cut(done: int, total: int) -> None:
        os.truncate(base / "model.safetensors", 100_000)

    text = refused(WeightsError, adapter=adapter, base=base, out=tmp_path / "merged", on_progress=cut)
    assert "the file was truncated" in text


# The disk


def test_too_little_space_is_told_before_anything_is_written(tmp_path, base, adapter, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    text = refused(SaveError, adapter=adapter, base=base, out=tmp_path / "merged")
    assert "The merged model needs 0.00 GiB, and 0.00 GiB are free in" in text and "Free some space" in text


def test_a_disk_that_refuses_in_the_middle_leaves_nothing(tmp_path, base, adapter):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        text = refused(SaveError, adapter=adapter, base=base, out=tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"can't be written to {tmp_path / 'merged'}: {os.strerror(errno.EFBIG)}." in text


def test_a_place_that_cannot_be_made(tmp_path, base, adapter):
    with pytest.raises(SaveError, match="The merged model can't be written to"):
        merge_adapter(adapter, base=base, out=base / "config.json" / "merged")


def test_two_merges_into_one_folder_do_not_mix(tmp_path, base, adapter):
    def second(done: int, total: int) -> None:
        with pytest.raises(ConfigError, match=r"merged is being written by another process. Wait for it, or stop it"):
            merge_adapter(adapter, base=base, out=tmp_path / "merged")

    merge_adapter(adapter, base=base, out=tmp_path / "merged", on_progress=second)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_merge_that_lost_the_race_does_not_touch_the_winners_folder(tmp_path, base, adapter, monkeypatch):
    real_flock = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        real_flock(descriptor, operation)
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "config.json").write_text("the winner's")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="merged exists already"):
        merge_adapter(adapter, base=base, out=tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_text() == "the winner's"


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, base, adapter, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert merge_adapter(adapter, base=base, out=tmp_path / "merged").changed_tensors == 14


KILLED = """
import os, sys
from pathlib import Path
from dist_lora.lora.merge import merge_adapter
adapter, base, out = map(Path, sys.argv[1:4])
stop_at = float(sys.argv[4])
merge_adapter(adapter, base=base, out=out, on_progress=lambda done, total: done >= stop_at * total and os._exit(137))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0.3, 1.0])
def test_a_killed_merge_leaves_nothing_that_loads_and_the_next_one_finishes(tmp_path, stop_at):
    base = make_base(tmp_path / "base", num_shards=4)
    write(tmp_path / "adapter", random_adapter(tiny_llama()), base=identify_base(base))
    places = [str(tmp_path / name) for name in ("adapter", "base", "merged")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *places, str(stop_at)], cwd=ROOT, check=False)
    assert killed.returncode == 137
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("merged")]
    assert left == ["merged.partial"] and list((tmp_path / "merged.partial").iterdir())
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged.partial")
    (tmp_path / "merged.partial" / "sub").mkdir()
    (tmp_path / "merged.partial" / "junk.safetensors").write_text("x")
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", base=base, out=tmp_path / "again")
    assert not (tmp_path / "merged.partial").exists()
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from dist_lora.lora.merge import merge_adapter
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
torch.addmm(torch.ones(512, 512), torch.ones(512, 8), torch.ones(8, 512)).bfloat16()
before = peak()
report = merge_adapter(Path(sys.argv[1]), base=Path(sys.argv[2]), out=Path(sys.argv[3]), force=True)
print(json.dumps({"growth": peak() - before, "written": report.bytes_written}))
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_slices_whatever_the_models_size(tmp_path):
    settings = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=48_000, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    base = tmp_path / "base"
    settings.save_pretrained(base)
    shape = Shape.from_config(json.loads((base / "config.json").read_text()), where="here")
    write_sparse(base, shape.tensor_shapes(), num_files=4)
    tensors = {}
    for layer in range(2):
        for name, (width_out, width_in) in shape.linear_shapes().items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            path = f"model.layers.{layer}.{part}.{name}"
            tensors |= {f"{path}.lora_A": torch.ones(8, width_in), f"{path}.lora_B": torch.ones(width_out, 8)}
    write(tmp_path / "adapter", tensors, rank=8)
    places = [str(tmp_path / name) for name in ("adapter", "base", "merged")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *places], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    # 440 MB of weights, of which the largest tensor is 197 MB.
    assert measured["written"] > 430_000_000
    assert measured["growth"] < 100 * 2**20
    up = load_file(next(path for path in (tmp_path / "merged").glob("*2-of*")))
    assert all(tensor.eq(8).all() for name, tensor in up.items() if "proj" in name)  # 0 + (8 / 8) * 8 * 1 * 1


def write_sparse(folder: Path, shapes: dict[str, tuple[int, ...]], *, num_files: int) -> None:
    """A bf16 checkpoint of zeros that takes no space on the disk."""
    places, names = {}, list(shapes)
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        entries, offset = {}, 0
        for name in names[number::num_files]:
            end = offset + 2 * torch.Size(shapes[name]).numel()
            entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
            places[name], offset = file, end
        header = json.dumps(entries).encode()
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / file, 8 + len(header) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


# What lies beside the weights


def test_all_that_a_model_folder_needs_is_copied_and_no_other_weights(tmp_path, base, adapter):
    copied = {
        "tokenizer.json": "{}", "tokenizer_config.json": '{"x": 1}', "special_tokens_map.json": "{}", "tokenizer.model": "m",
        "merges.txt": "a b", "chat_template.jinja": "{{ x }}", "LICENSE": "l", "USE_POLICY.md": "p",
        "additional_chat_templates/tools.jinja": "t",
    }  # fmt: skip
    left = {
        "pytorch_model.bin": "x", "consolidated.00.pth": "x", "model.gguf": "x", "pytorch_model.bin.index.json": "{}",
        "training_args.bin": "x", "adapter_config.json": "{}", "learned.json": "{}", "README.md": "the base's card", "modeling.py": "x",
        "original/consolidated.00.pth": "x", ".gitattributes": "x",
    }  # fmt: skip
    for name, content in {**copied, **left}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    merge_adapter(adapter, base=base, out=tmp_path / "merged")
    found = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert found == {*copied, "config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert "the base's card" not in (tmp_path / "merged" / "README.md").read_text()
    for name, content in copied.items():
        assert (tmp_path / "merged" / name).read_text() == content
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads((base / name).read_text())


def test_a_companion_that_is_a_link_out_of_the_base_is_not_copied(tmp_path, base, adapter):
    (tmp_path / "secret").write_text("of this machine")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsError, match=r"has links that point outside of it: LICENSE \(to .*secret\)"):
        merge_adapter(adapter, base=base, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


ADDED = [{"id": 100, "content": "<|end_of_text|>"}, {"id": 109, "content": "<|eot_id|>"}]
EOM = {"id": 108, "content": "<|eom_id|>"}


@pytest.mark.parametrize(
    ("generation", "in_config", "template", "added", "expected"),
    [
        # A chat model of Llama 3 whose configs know only the end of text
        ({"eos_token_id": 100, "top_p": 0.9}, 100, "<|eot_id|>", ADDED, {"eos_token_id": [100, 109], "top_p": 0.9}),
        ({"eos_token_id": [100, 109]}, 100, "<|eot_id|>", [*ADDED, EOM], {"eos_token_id": [100, 109, 108]}),
        ({"eos_token_id": [109, 100]}, 100, "<|eot_id|>", ADDED, {"eos_token_id": [109, 100]}),
        ({"top_p": 0.9}, [100], "<|eot_id|>", ADDED, {"eos_token_id": [100, 109], "top_p": 0.9}),
        (None, 100, "<|eot_id|>", [*ADDED, EOM], {"bos_token_id": 1, "eos_token_id": [100, 108, 109]}),
        (None, None, "<|eot_id|>", ADDED, {"bos_token_id": 1, "eos_token_id": [100, 109]}),
        # A base model has the tokens and no use for them; other templates end turns otherwise
        ({"eos_token_id": 100}, 100, "", ADDED, {"eos_token_id": 100}),
        ({"top_p": 0.9}, 7, "<|im_end|>", [], {"top_p": 0.9, "eos_token_id": 7}),
        ({"top_p": 0.9}, None, "", [], {"top_p": 0.9}),
        (None, 100, "", ADDED, None),
    ],
)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_merged_model_stops_at_every_token_that_ends_a_turn(
    tmp_path, base, adapter, generation, in_config, template, added, expected, place
):
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": in_config, "bos_token_id": 1}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    if place == "tokenizer_config.json":
        listed = {str(token["id"]): {"content": token["content"]} for token in added}
        content = {"chat_template": template, "added_tokens_decoder": listed}
        (base / place).write_text(json.dumps(content))
    else:
        (base / place).write_text(template)
        (base / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    merge_adapter(adapter, base=base, out=tmp_path / "merged", force=True)
    file = tmp_path / "merged" / "generation_config.json"
    assert (json.loads(file.read_text()) if file.exists() else None) == expected


def test_a_single_file_that_counts_does_not_bring_the_index_beside_it(tmp_path, base, adapter):
    save_file({"x": torch.ones(1)}, base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    merge_adapter(adapter, base=base, out=tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
