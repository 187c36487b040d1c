"""Nodes that don't come, or come otherwise than the first: all ranks end in time, before anything is loaded, and one tells."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests import ROOT
from tests.e2e.runs import Done, free_port, run_processes, write_config

HOST = socket.gethostname()


def ranks_of(rendezvous: Mapping[str, str], *, ranks: int, of: int, per_node: int) -> list[dict[str, str]]:
    """What a launcher says to each of the first ``ranks`` of ``of``."""
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(of),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
        }
        | rendezvous
        for rank in range(ranks)
    ]


@pytest.fixture
def rendezvous() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.mark.turn(of=2, among="whole runs")
def test_one_node_of_two_ends_in_time_and_names_the_other(config, rendezvous) -> None:
    arguments = ("train", config, "run=half", "parallel.join_timeout=10")
    codes, done = run_processes([(arguments, rank) for rank in ranks_of(rendezvous, ranks=2, of=4, per_node=2)])
    assert codes == [1, 1], done.stderr
    told = (
        "error: 1 of 2 nodes joined within 10 s: missing ranks 2, 3 (node 1). "
        f"Joined: ranks 0, 1 on {HOST}. Is every node started, "
    )
    assert done.stderr.count("error: ") == done.stderr.count(told) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_without_its_first_is_told_where_it_looked(config, rendezvous) -> None:
    arguments = ("train", config, "run=half", "parallel.join_timeout=3")
    codes, done = run_processes([(arguments, rank) for rank in ranks_of(rendezvous, ranks=4, of=4, per_node=2)[2:]])
    assert codes == [1, 1], done.stderr
    told = f"error: rank 2 of 4 on {HOST}: rank 0 doesn't answer at 127.0.0.1:{rendezvous['MASTER_PORT']} within 3 s: "
    assert done.stderr.count("error: ") == done.stderr.count(told) == 1, done.stderr


def run_two_nodes(rendezvous: Mapping[str, str], *configs: Path, of_second: Mapping[str, str] | None = None) -> Done:
    """``train`` with a config a node, to its refusal by both."""
    first, second = ranks_of(rendezvous, ranks=2, of=2, per_node=1)
    codes, done = run_processes(
        [(("train", configs[0]), first), (("train", configs[-1]), second | dict(of_second or {}))]
    )
    assert codes == [2, 2], done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "loaded base" not in done.stderr
    return done


def changed(config: Path, path: Path, **changes: object) -> Path:
    return write_config(path, **yaml.safe_load(config.read_text()) | changes)


def test_nodes_of_other_configs_are_told_setting_by_setting(config, rendezvous, tmp_path) -> None:
    done = run_two_nodes(rendezvous, config, changed(config, tmp_path / "config.yaml", lora={"rank": 8}, run="other"))
    told = (
        f"error: the processes of this run don't match. Different from {HOST} (rank 0):\n"
        f"  {HOST} (rank 1): lora.rank is 8, not 4; run is other, not whole\n"
        "Give every node the same installation, config and arguments"
    )
    assert told in done.stderr, done.stderr


@pytest.mark.turn(of=2, among="whole runs")
def test_nodes_of_other_versions_are_told(config, rendezvous, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import dist_lora\ndist_lora.__version__ = '0.0.1'\n")
    done = run_two_nodes(rendezvous, config, of_second={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert f"{HOST} (rank 1): dist_lora is 0.0.1, not " in done.stderr, done.stderr


@pytest.mark.turn(of=2, among="whole runs")
def test_nodes_of_other_data_are_told(config, rendezvous, tmp_path) -> None:
    settings = yaml.safe_load(config.read_text())
    lines = Path(settings["data"]["train"]).read_text().splitlines(keepends=True)
    # One path, which leads each node to a file of its own, as a path on a node's own disk does.
    for node, kept in enumerate((lines, lines[:-1])):
        (tmp_path / f"node-{node}").mkdir()
        (tmp_path / f"node-{node}" / "train.jsonl").write_text("".join(kept))
    path = changed(config, tmp_path / "config.yaml", data=settings["data"] | {"train": "/proc/self/cwd/train.jsonl"})
    done = run_two_nodes_in(rendezvous, path, tmp_path)
    assert "data.train: " in done.stderr and "differ between this node, that of rank 1, and the first" in done.stderr


@pytest.mark.turn(of=2, among="whole runs")
def test_nodes_of_other_weights_are_told(config, tiny_llama, rendezvous, tmp_path) -> None:
    for node in range(2):
        shutil.copytree(tiny_llama("llama31", seed=node), tmp_path / f"node-{node}" / "base")
    path = changed(
        config, tmp_path / "config.yaml", model={"name": "/proc/self/cwd/base"}, runs_dir=str(tmp_path / "runs")
    )
    done = run_two_nodes_in(rendezvous, path, tmp_path)
    told = f"model.name: /proc/self/cwd/base on {HOST} (rank 1) differs from rank 0's base: weights "
    assert told in done.stderr, done.stderr


def run_two_nodes_in(rendezvous: Mapping[str, str], path: Path, folder: Path) -> Done:
    """As ``run_two_nodes``, each in a folder ``node-0`` or ``node-1``."""
    (folder / "sitecustomize.py").write_text("import os\nos.chdir(os.environ['NODES_FOLDER'])\n")
    search = {"PYTHONPATH": f"{folder}:{ROOT}"}
    first = dict(rendezvous) | search | {"NODES_FOLDER": str(folder / "node-0")}
    return run_two_nodes(first, path, of_second={"NODES_FOLDER": str(folder / "node-1")})
