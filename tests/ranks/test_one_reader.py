"""The headers of a model's files are read by one rank of each node; the others are told."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from dist_lora.base import index
from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.config.schema import Config
from dist_lora.errors import DistLoraError, exit_code_of
from dist_lora.herd.models import ResolvedModel
from dist_lora.train import build
from dist_lora.train.build import open_base
from dist_lora.world.world import World
from tests.ranks.runs import chats_settings


def open_counting(world: World, settings: dict) -> tuple[int, object]:
    """How many headers this rank has read, and what it knows of the base or why it doesn't."""
    with mock.patch.object(index, "read_header", wraps=index.read_header) as read:
        try:
            known: object = open_base(Config.model_validate(settings), world).on_disk
        except DistLoraError as error:
            known = (type(error).__name__, str(error), exit_code_of(error))
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


def test_an_unsupported_model_is_told_as_such_before_its_files_are_read(ranks, tiny_llama, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama("llama31"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}, base / "model.safetensors")
    settings = chats_settings(base, tmp_path, num_steps=1)
    _, told = zip(*ranks(4).run(open_counting, settings, node_size=2), strict=True)
    assert all(code == 2 and "gptq" in text for _, text, code in told), told


def open_where_some_nodes_refuse(world: World, settings: dict) -> tuple[int, object]:
    """The base's folder can't be looked at by the second node."""
    refused = PermissionError(13, "Permission denied", "/models")
    with mock.patch.object(build, "read_config", side_effect=refused) if world.world_rank == 2 else nullcontext():
        return open_counting(world, settings)


def test_a_folder_that_one_rank_cannot_look_into_ends_all_with_one_message(ranks, tiny_llama, tmp_path) -> None:
    settings = chats_settings(tiny_llama("llama31"), tmp_path, num_steps=1)
    _, told = zip(*ranks(4).run(open_where_some_nodes_refuse, settings, node_size=2), strict=True)
    assert [kind for kind, _, _ in told] == ["RankError", "RankError", "WeightsError", "RankError"]
    assert all("can't be opened: [Errno 13] Permission denied: '/models'" in text for _, text, _ in told), told
    assert {code for *_, code in told} == {2}  # a folder that this user may not read is no damaged one


def open_where_one_node_asks_the_hub(world: World, settings: dict, base: Path) -> tuple[int, object]:
    """The name is a folder on the first node; on the second it is a model of the hub."""
    resolved = ResolvedModel("org/model", folder=None, hub_id="org/model", member=None)
    with (
        mock.patch.object(build, "fetch_model", return_value=base),
        mock.patch.object(build, "resolve_model", return_value=resolved) if world.world_rank >= 2 else nullcontext(),
    ):
        return open_counting(world, settings)


def test_a_name_may_be_a_folder_on_one_node_and_the_hubs_on_another(ranks, tiny_llama, tmp_path) -> None:
    base = tiny_llama("llama31")
    settings = chats_settings(base, tmp_path, num_steps=1)
    _, known = zip(*ranks(4).run(open_where_one_node_asks_the_hub, settings, base, node_size=2), strict=True)
    assert all(each == open_base_on_disk(base, quant="none") for each in known)
