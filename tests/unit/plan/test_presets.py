"""The configs that are shipped: each is what the table writes, loads, fits its machine, and tells true numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_lora.config.load import load_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.plan.command import MachineRequest
from dist_lora.plan.plan import make_plan
from dist_lora.plan.presets import (
    MACHINES,
    SCHEMA_LINE,
    SENSIBLE,
    SHIPPED,
    Method,
    Preset,
    find_preset,
    presets,
    size_of,
    text_of,
    write_configs,
)
from tests import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PRESETS = presets()
WRITE = "run: python -m dist_lora.plan.presets --write"


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_a_shipped_config_loads_and_names_the_schema(path: Path) -> None:
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith(SCHEMA_LINE)
    assert config.run == path.stem


def test_the_files_are_those_of_the_table() -> None:
    assert {path.stem for path in CONFIGS} == {*SHIPPED, "quickstart"}, WRITE
    assert len(CONFIGS) <= 12


@pytest.mark.parametrize("size", [size for size in SENSIBLE if size != "3b"])  # its files would be those of 1b
def test_each_size_is_shipped_with_lora_and_qlora_and_the_large_ones_over_several_nodes(size: str) -> None:
    shipped = [PRESETS[name] for name in SHIPPED if PRESETS[name].size == size]
    assert {preset.method for preset in shipped} == {"lora", "qlora"}
    assert any(preset.machine.num_nodes > 1 for preset in shipped) == (size in ("70b", "405b"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_as_it_is_printed_loads(name: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(text_of(PRESETS[name]), encoding="utf-8")
    assert load_config(tmp_path / "it.yaml") == PRESETS[name].config


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_without_options_is_for_the_machine_in_the_name(name: str) -> None:
    preset = PRESETS[name]
    found = make_plan(preset.config, MachineRequest.of(preset.config, None, None, None, None, None, None).single())
    assert found.machines == preset.plan.machines and found.device_bytes == preset.plan.device_bytes and found.fits


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_is_what_the_table_writes_with_its_costs_of_today(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    assert path.read_text(encoding="utf-8") == SCHEMA_LINE + text_of(PRESETS[name]), WRITE
    assert load_config(path) == PRESETS[name].config


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_has_a_comment_and_a_file_is_short(name: str) -> None:
    lines = text_of(PRESETS[name]).splitlines()
    bare = [line for line in lines if ": " in line and "#" not in line]
    assert not bare and len(lines) <= 44 and max(map(len, lines)) <= 118


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_config_needs_is_there_on_its_machine(name: str) -> None:
    assert PRESETS[name].plan.device_bytes <= PRESETS[name].machine.gpu.memory_bytes


def preset_of(size: str, method: Method, machine: str) -> Preset:
    member = next(member for member in MEMBERS.values() if size_of(member) == size)
    return Preset(member, method, MACHINES[machine])


def test_every_member_has_a_config_of_each_method() -> None:
    made = {(preset.member.name, preset.method) for preset in PRESETS.values()}
    assert made == {(name, method) for name in MEMBERS for method in ("lora", "qlora")}


@pytest.mark.slow
@pytest.mark.parametrize("size", SENSIBLE)
def test_where_a_machine_is_left_out_the_base_in_bf16_does_not_fit(size: str) -> None:
    for machine in ("1x24gb", "2x24gb", "8x80gb", "4x8x80gb"):
        preset = preset_of(size, "lora", machine)
        is_told = machine in SENSIBLE[size]["lora"] or (size in ("1b", "3b") and machine == "4x8x80gb")
        assert is_told == (preset.plan.fits), machine


def test_a_70b_in_nf4_needs_the_hosts_memory_on_two_small_cards() -> None:
    preset = preset_of("70b", "qlora", "2x24gb")
    assert preset.config.parallel.offload == "base"
    assert preset.plan.fits and preset.plan.memory.base == 0 and preset.plan.host_bytes > 40e9
    tree = preset.config.model_dump(mode="json")
    tree["parallel"]["offload"] = "none"
    assert not make_plan(Config.model_validate(tree), preset.plan.machines).fits


# The numbers in the comments, by hand


@pytest.mark.parametrize("name", PRESETS)
def test_the_bytes_of_the_base_and_the_batches_are_right(name: str) -> None:
    preset, text = PRESETS[name], text_of(PRESETS[name])
    config, gpus = preset.config, preset.machine.num_gpus
    assert f"{preset.member.shape.num_parameters() * 2 / 1e9:.1f} GB in bf16" in text
    assert config.train.global_batch % (gpus * config.train.micro_batch) == 0
    passes = config.train.global_batch // (gpus * config.train.micro_batch)
    said = f"{gpus} GPU{'s' if gpus > 1 else ''} x {config.train.micro_batch}"
    assert f"{said}{f' x {passes} accumulation steps' if passes > 1 else ''} = {config.train.global_batch}" in text


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_a_second_are_those_of_a_step_by_its_seconds(name: str) -> None:
    preset = PRESETS[name]
    best, worst, low, high = (
        float(number.replace(",", ""))
        for number in re.findall(
            r"A step on \S+: ([\d.,]+) to ([\d.,]+) s, ([\d,]+) to ([\d,]+) tokens", text_of(preset)
        )[0]
    )
    tokens = preset.config.train.global_batch * preset.config.train.sequence_length
    assert low < high
    assert best * high == pytest.approx(tokens, rel=0.12) and worst * low == pytest.approx(tokens, rel=0.12)


def test_the_costs_of_the_8b_on_eight_gpus_by_hand() -> None:
    text = " ".join(text_of(PRESETS["3.1-8b-instruct_lora_8x80gb"]).replace("#", " ").split())
    trained = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)  # r (in + out) of q o, k v, gate up down
    assert trained == 41_943_040
    assert f"base {2 * 8_030_261_248 / 2**30:.2f}, adapters {4 * trained / 2**30:.2f}" in text
    assert f"AdamW {8 * trained / 2**30:.2f}" in text
    assert (
        f"Disk: {12 * trained / 1e6:.0f} MB per checkpoint" in text
        and f"the adapter {4 * trained / 1e6:.0f} MB" in text
    )
    assert "whole on each of 8 GPUs, which exchange only the adapters' gradients" in text
    sharded = " ".join(text_of(PRESETS["3.1-70b-instruct_lora_8x80gb"]).replace("#", " ").split())
    assert f"sharded over 8 GPUs, {2 * 70_553_706_496 / 8 / 1e9:.1f} GB on each" in sharded


def test_the_bytes_of_the_8b_in_nf4_by_hand() -> None:
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rest = 2 * 128_256 * 4096 + 65 * 4096
    assert linears + rest == 8_030_261_248
    in_nf4 = linears * (0.5 + 4 / 64) + 2 * rest
    text = " ".join(text_of(PRESETS["3.1-8b_qlora_1x24gb"]).replace("#", " ").split())
    assert f"and {in_nf4 / 1e9:.1f} GB with its layers in NF4" in text and f"base {in_nf4 / 2**30:.2f}," in text


def test_a_base_learns_from_texts_and_a_guard_from_verdicts() -> None:
    assert '{"text": ...}' in text_of(PRESETS["3-8b_lora_8x80gb"])
    assert '{"messages": [...]}\n' in text_of(PRESETS["3-8b-instruct_lora_8x80gb"])
    for name in ("guard-3-8b_lora_8x80gb", "guard-3-1b_lora_1x24gb", "guard-3-1b_qlora_1x24gb"):
        assert '"verdict": "unsafe"' in text_of(PRESETS[name]) and PRESETS[name].config.data.format == "guard"


# The command that writes them


def test_writing_makes_all_and_takes_away_what_the_table_has_no_more(tmp_path: Path) -> None:
    (tmp_path / "2-7b_lora_1x24gb.yaml").write_text("run: old\n")
    (tmp_path / "quickstart.yaml").write_text("run: mine\n")
    assert len(write_configs(tmp_path)) == len(SHIPPED)
    assert {path.stem for path in tmp_path.iterdir()} == {*SHIPPED, "quickstart"}
    assert (tmp_path / "quickstart.yaml").read_text() == "run: mine\n"


def test_the_writer_without_its_word_says_how_and_writes_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "dist_lora.plan.presets"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "usage: python -m dist_lora.plan.presets --write\n"


@pytest.mark.parametrize("name", ["3.1-8b_lora_8x80gb", "configs/3.1-8b_lora_8x80gb.yaml", "3.1-8B_LoRA_8x80gb"])
def test_a_config_is_found_by_its_name_and_by_its_file(name: str) -> None:
    assert find_preset(name).name == "3.1-8b_lora_8x80gb"


def test_an_unknown_config_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        find_preset("3.1-8b_lora_8x80")
    assert str(caught.value).startswith(
        "configs show: no config is called 3.1-8b_lora_8x80 (nearest: 3.1-8b_lora_8x80gb, 3.1-8b_lora_4x8x80gb,"
    )
    with pytest.raises(ConfigError) as caught:
        find_preset("?")
    assert str(caught.value) == f"configs show: no config is called ? (`dist-lora configs` lists all {len(PRESETS)})"


def test_the_config_that_the_readme_reads_line_by_line_is_the_one_it_names() -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    path = "configs/3.1-70b-instruct_lora_8x80gb.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / path).read_text())
    assert f"dist-lora train {path}" in readme
