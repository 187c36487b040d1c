"""The wheel: built, installed into an empty folder far from the sources, and used from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow
Installed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a folder build/ beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "dist_lora", folder / "src/dist_lora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "src")
    (built,) = folder.glob("dist_lora-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """``installed(*arguments)`` runs python with the wheel's package, from an empty folder."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        # -P: nothing but the wheel's package is found by that name.
        return subprocess.run(
            [sys.executable, "-P", *map(str, arguments)],
            cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    found = run("-c", "import dist_lora; print(dist_lora.__file__)")
    assert found.stdout.strip() == str(site / "dist_lora/__init__.py"), found.stderr
    return run


def pip(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_all_that_is_no_code_is_inside(wheel) -> None:
    """Every file of the package: what setuptools leaves out is found where it is opened, which is too late."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "dist_lora").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= inside
    assert any(name.endswith(".jinja") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "bench/"))]


def test_what_needs_no_model_answers(installed, tmp_path) -> None:
    config = tmp_path / "mine.yaml"
    shown = installed("-m", "dist_lora", "configs", "show", "3.1-8b-instruct_qlora_1x24gb")
    assert shown.returncode == 0, shown.stderr
    config.write_text(shown.stdout)
    plan = installed("-m", "dist_lora", "plan", config, "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["machines"] == "1 x rtx4090-24gb"
    explained = installed("-m", "dist_lora", "explain", config)
    assert explained.returncode == 0 and "frozen 8,030,261,248" in explained.stdout, explained.stderr
    schema = installed("-m", "dist_lora.config.load")
    assert json.loads(schema.stdout) == json.loads((ROOT / "configs/schema.json").read_text())
    script = installed("-m", "dist_lora", "slurm", config)
    assert script.returncode == 0 and "requeue" in script.stdout, script.stderr


def test_a_run_is_shown_before_it_is_started(installed, tiny_llama, tmp_path) -> None:
    data = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": "say it"}, {"role": "assistant", "content": f"it {i}"}] for i in range(4)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"run: it\nruns_dir: {tmp_path}/runs\nmodel: {{name: {tiny_llama('llama31')}}}\n"
        f"data: {{train: {data}, chat_template: llama3, cache_dir: {tmp_path}/cache, untrained_tokens: allow}}\n"
    )
    done = installed("-m", "dist_lora", "train", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4 samples" in done.stdout and "say it" in done.stdout
    assert not (tmp_path / "runs").exists()
