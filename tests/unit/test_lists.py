"""The commands that print what is known of the herd and its configs: tables, JSON, and a config to start from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lora.cli import app
from dist_lora.config.load import load_config
from dist_lora.errors import ConfigError
from dist_lora.herd.members import MEMBERS
from dist_lora.plan.presets import presets
from tests import ROOT


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_herd_is_listed_with_what_each_member_is_and_does() -> None:
    head, *rows = printed("herd").splitlines()
    assert head.split("  ")[0] == "name" and len(rows) == len(MEMBERS) == 17
    columns = [name.strip() for name in head.split("  ") if name.strip()]
    assert columns == [
        "name", "parameters", "finetuned", "multilingual", "long context", "tool use", "tokens", "release", "licence", "purpose",
    ]  # fmt: skip
    (row,) = (row for row in rows if row.startswith("3.1-70b-instruct "))
    assert row.split() == [
        "3.1-70b-instruct",
        "70.6",
        "B",
        "yes",
        "yes",
        "yes",
        "yes",
        "131,072",
        "2024-07-23",
        "Llama",
        "3.1",
        "Community",
        "License",
        "answers,",
        "in",
        "chats",
    ]
    (row,) = (row for row in rows if row.startswith("guard-3-8b "))
    assert row.split()[1:8] == ["8.0", "B", "yes", "yes", "yes", "no", "131,072"]
    (row,) = (row for row in rows if row.startswith("3-8b "))
    assert row.split()[1:8] == ["8.0", "B", "no", "no", "no", "no", "8,192"]


def test_the_herd_as_json_has_facts_and_no_words_for_them() -> None:
    members = {row["name"]: row for row in json.loads(printed("herd", "--json"))["members"]}
    assert list(members) == list(MEMBERS)
    guard = members["guard-3-1b"]
    assert (guard["finetuned"], guard["tool use"], guard["long context"], guard["context"]) == (
        True,
        False,
        True,
        131072,
    )
    assert guard["parameters"] == 1_235_814_400 and guard["licence"] == "Llama 3.2 Community License"
    assert guard["hub id"] == "meta-llama/Llama-Guard-3-1B" and "safe" in guard["purpose"]


def test_the_configs_are_listed_with_the_memory_of_a_gpu_that_their_files_tell() -> None:
    head, *rows = printed("configs").splitlines()
    assert head.split() == ["name", "model", "method", "machine", "memory", "per", "GPU"]
    assert [row.split()[0] for row in rows] == list(presets())
    (row,) = (row for row in rows if row.startswith("3.1-405b-instruct_qlora_8x80gb "))
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells[1:4] == ["3.1-405b-instruct", "qlora", "8 GPUs of 80 GB"]
    text = (ROOT / "configs/3.1-405b-instruct_qlora_8x80gb.yaml").read_text()
    assert f"Memory per GPU, by arithmetic: {cells[4]}," in text


def test_the_list_as_json_has_bytes() -> None:
    rows = json.loads(printed("configs", "--json"))["configs"]
    assert [row["name"] for row in rows] == list(presets())
    assert all(0 < row["needed_bytes"] <= row["gpu_bytes"] for row in rows)
    (row,) = (row for row in rows if row["name"] == "3-70b_qlora_2x24gb")
    assert row["host_bytes_a_node"] > 40e9


def test_a_config_that_is_shown_is_one_to_start_from(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(printed("configs", "show", "3.1-8b_qlora_1x24gb"))
    assert path.read_text().startswith("# Llama 3.1 8B with QLoRA")
    assert load_config(path) == presets()["3.1-8b_qlora_1x24gb"].config


def test_an_unknown_config_is_the_users_mistake() -> None:
    done = CliRunner().invoke(app, ["configs", "show", "8b_qlora"])
    assert isinstance(done.exception, ConfigError) and done.exception.exit_code == 2
    assert "(nearest: 3-8b_qlora_" in str(done.exception)


def test_a_config_is_explained_with_arguments_over_it() -> None:
    told = printed("explain", str(ROOT / "configs/3.1-8b-instruct_lora_8x80gb.yaml"), "lora.rank=5")
    assert "trained 13,107,200, frozen 8,030,261,248" in told


@pytest.mark.parametrize("arguments", [["configs", "show", "3.1-8b_lora_8x80gb"], ["herd"]], ids=" ".join)
def test_the_package_alone_knows_them_too(tmp_path: Path, arguments: list[str]) -> None:
    """As it is installed: without the folder configs/ beside it."""
    shutil.copytree(ROOT / "dist_lora", tmp_path / "site" / "dist_lora", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-m", "dist_lora", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == printed(*arguments)
