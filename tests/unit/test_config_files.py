"""The configs that are shipped: each loads, its model is of the herd, and its comments' numbers are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dist_lora.config.load import load_config
from dist_lora.herd.facts import resolve_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HERD_CONFIGS = [path for path in CONFIGS if re.match(r"\d+b_", path.name)]


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_a_shipped_config_loads_and_names_the_schema(path: Path) -> None:
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def test_each_size_has_a_config_for_one_node_and_for_several() -> None:
    sizes = ("8b", "70b", "405b")
    assert {path.stem for path in HERD_CONFIGS} == {f"{s}_{n}" for s in sizes for n in ("one_node", "four_nodes")}


@pytest.mark.parametrize("path", HERD_CONFIGS, ids=by_name)
def test_every_setting_of_a_herd_config_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if ": " in line and "#" not in line]
    assert not bare and len(lines) <= 32 and max(map(len, lines)) <= 116


@pytest.mark.parametrize("path", HERD_CONFIGS, ids=by_name)
def test_the_comments_bytes_and_batches_are_what_arithmetic_gives(path: Path) -> None:
    config, text = load_config(path), path.read_text(encoding="utf-8")
    member = resolve_model(config.model.name).member
    assert member is not None
    num_gpus = 8 if path.stem.endswith("one_node") else 32
    base_gb = member.shape.num_parameters() * 2 / 1e9
    shards = 8 if config.parallel.base_shard == "node" else num_gpus
    assert f"{base_gb:.1f} GB in bf16" in text
    assert f"{base_gb / shards:.1f} GB" in text
    assert config.train.global_batch % (num_gpus * config.train.micro_batch) == 0
    passes = config.train.global_batch // (num_gpus * config.train.micro_batch)
    said = f"{num_gpus} GPUs x {config.train.micro_batch}" + (f" x {passes} passes" if passes > 1 else "")
    assert f"{said} = {config.train.global_batch}" in text


def test_the_config_that_the_readme_reads_line_by_line_is_the_one_it_names() -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "configs" / "70b_one_node.yaml").read_text())
    assert "dist-lora train configs/70b_one_node.yaml" in readme
