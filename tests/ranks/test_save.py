"""A save moves the adapters and their moments from where they lie to the disk, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.checkpoint.manifest import KINDS, read_manifest
from dist_lora.train.loop import Run
from dist_lora.world.world import World
from tests.ranks.test_whole_runs import remembering
from tests.ranks.tiny import config_of, documents, trainee_of

SENTINEL = np.float32(-1234.5677)  # no adapter has it
COLLECTIVES = [
    name
    for name in dir(dist)
    if name != "reduce_op"
    and name.startswith(("all_", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv", "monitored"))
]


class OnlyTrained(TorchDispatchMode):
    """Raises where an operation reads or writes a frozen parameter, or is a collective."""

    def __init__(self, frozen: list[torch.Tensor]) -> None:
        super().__init__()
        self.frozen = {local(tensor).untyped_storage().data_ptr() for tensor in frozen}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        assert "c10d" not in func.namespace, f"a collective: {func}"
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                assert local(leaf).untyped_storage().data_ptr() not in self.frozen, f"a frozen parameter: {func}"
        return func(*args, **kwargs or {})


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def forbidden(*arguments: Any, **keywords: Any) -> None:
    raise AssertionError("a collective in a save")


def save_beside_a_sentinel(world: World, model: str, folder: str) -> tuple[str, int, int]:
    """Save with a sentinel in all of the base; returns the checkpoint, the trained weights, sentinels in the base."""
    config = config_of(Path(model), lora={"rank": 64}, optim={"warmup_steps": 0})
    trainee = trainee_of(config, world)
    loader = remembering(documents(seed=0, lengths=[9, 12, 15, 18]), world)
    run = Run(config, trainee, loader=loader, held_out=None, num_steps=2, folder=Path(folder), world=world)
    frozen = [parameter.data for parameter in trainee.model.base_parameters().values()]
    with torch.no_grad():
        trainee.adapters.gradient.fill_(0.5)
        trainee.adapters.step(1e-3)  # so that the moments hold something
        for tensor in frozen:
            local(tensor).fill_(float(SENTINEL))
    num_sentinels = sum(local(tensor).numpy().tobytes().count(SENTINEL.tobytes()) for tensor in frozen)
    with OnlyTrained(frozen):
        for touch in (lambda: frozen[0] + 1, lambda: dist.all_reduce(torch.zeros(1))):
            with pytest.raises(AssertionError):  # the guard does see what it is there for
                touch()
    with mock.patch.multiple(dist, **dict.fromkeys(COLLECTIVES, forbidden)), OnlyTrained(frozen):
        run.progress.step = 2
        run.save()
        run.saver.wait()
    return str(run.saver.last), trainee.adapters.parameter.numel(), num_sentinels


def test_a_save_holds_what_is_trained_touches_no_frozen_weight_and_calls_no_collective(
    ranks, tiny_llama, tmp_path
) -> None:
    found = ranks(2).run(save_beside_a_sentinel, str(tiny_llama("llama31")), str(tmp_path))
    assert all(num_sentinels > 30_000 for _, _, num_sentinels in found)
    path, num_trained = Path(found[0][0]), found[0][1]
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"manifest.json", *(entry.name for entry in read_manifest(path).files)}
    assert not [file.name for file in files if SENTINEL.tobytes() in file.read_bytes()]
    num_bytes = sum(file.stat().st_size for file in files)
    assert len(KINDS) * 4 * num_trained < num_bytes <= 1.1 * len(KINDS) * 4 * num_trained
