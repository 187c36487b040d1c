"""A run's folder that not all nodes share is found at the start, not at the first checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_lora.run_folder.folder
from dist_lora.world.world import World
from tests.ranks.pool import RankFailed
from tests.ranks.tiny import config_of


def open_there(world: World, folder: str, is_shared: bool) -> list[str]:
    """Opens the run's folder; where it isn't shared, each node has a folder of its own under the same name."""
    dist_lora.run_folder.folder.SEEN_S = 0.3
    runs = Path(folder) / ("all" if is_shared else f"node-{world.world_rank // 2}")
    config = config_of("unused").model_copy(update={"runs_dir": runs})
    opened = dist_lora.run_folder.folder.open_run_folder(config, world)
    return sorted(path.name for path in opened.iterdir())


def test_a_shared_folder_is_opened_on_every_node_and_left_clean(ranks, tmp_path) -> None:
    assert ranks(4).run(open_there, str(tmp_path), True, node_size=2)[0] == ["lock", "log.txt", "status"]


def test_a_folder_of_each_node_is_refused_on_all_ranks(ranks, tmp_path) -> None:
    (tmp_path / "node-1").mkdir()
    with pytest.raises(RankFailed) as raised:
        ranks(4).run(open_there, str(tmp_path), False, node_size=2)
    assert raised.value.kinds == ["RankError", "RankError", "ConfigError", "RankError"]
    assert "is not shared by all nodes" in raised.value.texts[2]
    assert "Set runs_dir to a file system that all nodes share" in raised.value.texts[2]
    assert not list((tmp_path / "node-0" / "test").glob(".probe-*"))
