"""The scripts and lists that set the project up agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"])
SHELL = sorted({*SCRIPTS, *(path for suffix in ("sh", "sbatch") for path in (ROOT / "launch").rglob(f"*.{suffix}"))})


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_tested_version_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(constraints()[canonicalize_name(requirement.name)])


def test_constraints_name_no_index_and_no_local_build() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"https?://|--index|--find-links|file:| @ ", text)
    assert not [version for version in constraints().values() if "+" in version]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_executable_bash_that_stops_at_the_first_error(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert re.search(r"^set -E?euo pipefail$", text, re.MULTILINE)
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SHELL, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", script], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_set_up_without_a_python_says_what_to_install(tmp_path: Path) -> None:
    project = copy_of_set_up(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "cut", "dirname", "grep", "rm", "sha256sum", "tr"):
        found = next(Path(folder, tool) for folder in os.defpath.split(":") if Path(folder, tool).exists())
        (tools / tool).symlink_to(found)
    done = run_set_up(project, path=str(tools))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "set-up failed: no Python 3.11 or newer with the modules venv and ensurepip on the PATH; "
        "install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv) and run this again"
    )


def test_set_up_that_fails_leaves_no_mark_and_a_last_line_that_says_where(tmp_path: Path) -> None:
    project = copy_of_set_up(tmp_path)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "set-up-done").write_text("of an older pyproject.toml\n", encoding="utf-8")
    python = project / ".venv" / "bin" / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) exit 0;; esac\necho no index >&2\nexit 1\n', encoding="utf-8"
    )
    python.chmod(0o755)
    done = run_set_up(project, path=os.environ["PATH"])
    assert done.returncode == 1
    assert "no index" in done.stderr
    assert re.match(r"set-up failed: line \d+ of launch/setup\.sh: .*pip install", done.stderr.splitlines()[-1])
    assert not (project / ".venv" / "set-up-done").exists()


def copy_of_set_up(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    for file in ("pyproject.toml", "constraints.txt", "launch/setup.sh"):
        (project / file).write_bytes((ROOT / file).read_bytes())
    return project


def run_set_up(project: Path, *, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path}
    command = ["/bin/bash", project / "launch" / "setup.sh"]
    return subprocess.run(
        command,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_quickstarts_config_reads_the_files_that_the_script_makes() -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    script = (ROOT / "launch" / "quickstart.sh").read_text(encoding="utf-8")
    help_of_model = subprocess.run(
        [sys.executable, ROOT / "launch" / "smollm2.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(config["model"]["name"]).name in help_of_model
    assert config["data"]["train"] == ".cache/quickstart/train.jsonl"
    assert "results=.cache/quickstart\n" in script
    assert f"run=runs/{config['run']}\n" in script
