"""The headers of a model's files are read by one rank of each node; the others are told."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

from dist_lora.base import index
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.config.schema import Config
from dist_lora.errors import DistLoraError
from dist_lora.train.build import open_base
from dist_lora.world.world import World
from tests.ranks.runs import chats_settings


def open_counting(world: World, settings: dict) -> tuple[int, object]:
    """How many headers this rank has read, and what it knows of the base or why it doesn't."""
    with mock.patch.object(index, "read_header", wraps=index.read_header) as read:
        try:
            known: object = open_base(Config.model_validate(settings), world).on_disk
        except DistLoraError as error:
            known = (type(error).__name__, str(error), error.exit_code)
    return read.call_count, known


def test_one_rank_of_each_node_reads_the_headers(ranks, tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31", shard_size="60KB")
    settings = chats_settings(base, tmp_path, num_steps=1)
    counts, known = zip(*ranks(4).run(open_counting, settings, node_size=2), strict=True)
    num_files = len(list(base.glob("*.safetensors")))
    assert num_files > 3
    # The first of a node reads them again for the samples by which it compares its base with the first node's.
    assert counts == (2 * num_files, 0, 2 * num_files, 0)
    assert all(each == open_base_on_disk(base, quant="none") for each in known)


def test_what_one_rank_of_a_node_finds_wrong_is_told_once_and_ends_all(ranks, tiny_llama, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama("llama31", shard_size="60KB"), base)
    cut = sorted(base.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    settings = chats_settings(base, tmp_path, num_steps=1)
    _, told = zip(*ranks(4).run(open_counting, settings, node_size=2), strict=True)
    assert [kind for kind, _, _ in told] == ["WeightsError", "RankError", "RankError", "RankError"]
    assert all(Path(cut).name in text and code == 4 for _, text, code in told)
