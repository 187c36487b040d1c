"""Saving: all ranks together or not at all, at any instant of a kill; and which checkpoints stay."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dist_lora.base import safetensors as safetensors_module
from dist_lora.checkpoint import write as write_module
from dist_lora.checkpoint.folders import step_folders
from dist_lora.checkpoint.manifest import KINDS, Piece, TensorSpec, read_manifest
from dist_lora.checkpoint.read import load_pieces, newest_intact_here, verify
from dist_lora.checkpoint.write import rotate, set_aside
from dist_lora.errors import CheckpointError, RankError, SaveError
from tests import ROOT
from tests.unit.checkpoint.thread_ranks import SPECS, Killed, cut, flat_share, on_ranks, save, saved, whole_state

Usage = namedtuple("Usage", "total used free")


def saved_state(folder: Path) -> dict[Piece, torch.Tensor]:
    return load_pieces(folder, read_manifest(folder), list(whole_state(0)))


def assert_same(found: dict[Piece, torch.Tensor], expected: dict[Piece, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for piece, values in expected.items():
        assert torch.equal(found[piece], values), piece


def try_to_save(root: Path, *, step: int, world_size: int = 2) -> list[object]:
    whole = whole_state(step)
    return on_ranks(
        world_size,
        lambda world: save(root, world, step=step, share=cut(whole, flat_share(world.world_rank, world_size))),
    )


def target_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def failing(function: str, number: int, *, at: str):
    """``os.<function>`` that fails on files whose path contains ``at``."""
    real = getattr(os, function)

    def wrapped(fd: int, *arguments: object) -> object:
        if at in target_of(fd):
            raise OSError(number, os.strerror(number))
        return real(fd, *arguments)

    return wrapped


# What is written


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_of_each_rank_come_back_bit_for_bit_and_the_whole_has_all(tmp_path: Path, world_size: int) -> None:
    """Each rank fills its rows with a constant of its own; 3 and 5 rows are cut unevenly."""

    def rows_of(world_rank: int) -> dict[Piece, torch.Tensor]:
        share = {}
        for spec in SPECS:
            rows, width = spec.shape
            each = -(-rows // world_size)  # as FSDP2 does: equal rows, the last ranks get fewer or none
            first, last = min(each * world_rank, rows), min(each * (world_rank + 1), rows)
            constant = (0.03 if spec.name.endswith("A") else 0.01) + 0.01 * world_rank
            for i, kind in enumerate(KINDS):
                share[Piece(spec.name, kind, first * width, last * width)] = torch.full(
                    ((last - first) * width,), constant + i
                )
        return share

    path, *_ = on_ranks(world_size, lambda w: save(tmp_path, w, step=1, share=rows_of(w.world_rank)))
    manifest = read_manifest(path)
    for world_rank in range(world_size):
        mine = rows_of(world_rank)
        assert_same(load_pieces(path, manifest, list(mine)), mine)
    whole = saved_state(path)
    for spec in SPECS:
        values = whole[Piece(spec.name, "adapter", 0, spec.num_elements)]
        first = 0.03 if spec.name.endswith("A") else 0.01
        expected = {round(first + 0.01 * rank, 2) for rank in range(world_size)}
        assert {round(float(value), 2) for value in values} == expected
        assert (values.view(spec.shape) == values.view(spec.shape)[:, :1]).all()


def test_four_ranks_then_three_then_one_hold_the_same_bytes(tmp_path: Path) -> None:
    whole, folders = whole_state(7), [saved(tmp_path / "4", step=7, world_size=4)]
    for world_size in (3, 1):
        former = folders[-1]
        manifest = read_manifest(former)

        def go_on(world, former=former, manifest=manifest, world_size=world_size):
            mine = load_pieces(former, manifest, flat_share(world.world_rank, world_size))
            return save(tmp_path / str(world_size), world, step=8, share=mine)

        folders.append(on_ranks(world_size, go_on)[0])
    for folder, num_files in zip(folders, (4, 3, 1), strict=True):
        verify(folder)
        assert len(list(folder.glob("rank-*"))) == num_files
        assert_same(saved_state(folder), whole)


def test_the_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    folder, whole = saved(tmp_path, step=3), whole_state(3)
    keys = set()
    for rank, entry in enumerate(read_manifest(folder).files):
        with safe_open(folder / entry.name, framework="pt") as file:
            assert file.metadata() == {
                "format": "pt",
                "step": "3",
                "file": f"rank-0000{rank}-of-00002.safetensors",
            }
            for piece, values in cut(whole, entry.pieces).items():
                assert torch.equal(file.get_tensor(piece.key), values)
            assert set(file.keys()) == {piece.key for piece in entry.pieces}
            keys |= set(file.keys())
    assert "exp_avg_sq/model.layers.0.self_attn.q_proj.lora_A/0-21" in keys


def test_a_checkpoint_is_hardly_larger_than_the_adapter_and_its_two_moments(tmp_path: Path) -> None:
    specs = [TensorSpec(f"model.layers.{i}.self_attn.q_proj.lora_{h}", (8, 576)) for i in range(30) for h in "AB"]
    whole = whole_state(0, specs)
    share = [cut(whole, flat_share(rank, 2, specs)) for rank in range(2)]
    folder, *_ = on_ranks(2, lambda w: save(tmp_path, w, step=1, share=share[w.world_rank], specs=specs))
    state_bytes = sum(values.numel() * 4 for values in whole.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.1 * state_bytes


def test_a_rank_without_a_share_writes_an_empty_file_that_loads(tmp_path: Path) -> None:
    whole = whole_state(4)
    folder, *_ = on_ranks(2, lambda w: save(tmp_path, w, step=4, share={} if w.world_rank else whole))
    verify(folder)
    assert_same(saved_state(folder), whole)


def test_a_disk_that_takes_three_bytes_a_write_gets_the_whole_file(tmp_path, monkeypatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3]) if len(data) < 4096 else data))
    folder = saved(tmp_path, step=2)
    verify(folder)
    assert_same(saved_state(folder), whole_state(2))


def test_shares_that_leave_an_element_out_are_not_published(tmp_path: Path) -> None:
    saved(tmp_path, step=1)
    whole = whole_state(2)
    share = cut(whole, [p for p in flat_share(0, 1) if not (p.kind == "exp_avg" and p.name == SPECS[2].name)])
    (error,) = on_ranks(1, lambda world: save(tmp_path, world, step=2, share=share))
    assert isinstance(error, CheckpointError)
    assert f"exp_avg of {SPECS[2].name} is missing: no file holds any of its 21 elements" in str(error)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_tensor_of_another_type_is_our_mistake_and_ends_all_ranks(tmp_path: Path) -> None:
    whole = {piece: values.double() for piece, values in whole_state(1).items()}
    shares = [{}, whole]
    errors = on_ranks(2, lambda world: save(tmp_path, world, step=1, share=shares[world.world_rank]))
    assert isinstance(errors[0], RankError) and isinstance(errors[1], AssertionError)
    assert os.listdir(tmp_path) == []


def test_the_same_step_saved_again_replaces_the_former(tmp_path: Path) -> None:
    saved(tmp_path, step=5, seed=1)
    folder = saved(tmp_path, step=5, seed=2, world_size=3)
    verify(folder)
    assert_same(saved_state(folder), whole_state(2))
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_checkpoints_of_later_steps_are_set_aside_and_not_deleted(tmp_path: Path, caplog) -> None:
    later = [saved(tmp_path, step=step) for step in (900, 1000)]
    for seed in (1, 2):
        saved(tmp_path, step=10, seed=seed)
        if seed == 1:
            saved(tmp_path, step=900)
            saved(tmp_path, step=10)
    assert list(step_folders(tmp_path)) == [10]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000010", *(f"aside-{path.name}" for path in later), "aside-step-00000900.2"}
    assert (
        f"{later[1]} is of a later step than 10, from which this run resumes: renamed to aside-step-00001000"
        in caplog.text
    )
    shutil.move(tmp_path / "aside-step-00001000", later[1])
    verify(later[1])


def test_a_run_that_begins_anew_sets_all_former_checkpoints_aside(tmp_path: Path) -> None:
    for step in (0, 7):
        saved(tmp_path, step=step)
    aside = [tmp_path / "aside-step-00000007", tmp_path / "aside-step-00000000"]
    assert set_aside(tmp_path, above=-1) == aside
    assert newest_intact_here(tmp_path) is None
    assert rotate(tmp_path, keep=1, best=None) == [] and all(path.is_dir() for path in aside)


def test_a_later_step_that_can_not_be_set_aside_is_said(tmp_path: Path, caplog, monkeypatch) -> None:
    saved(tmp_path, step=20)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "aside" in target.name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    saved(tmp_path, step=10)
    assert "is of a later step than 10 and can't be renamed" in caplog.text


# When the disk refuses


@pytest.mark.parametrize("world_rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("function", "number", "name"), [("write", errno.ENOSPC, "ENOSPC"), ("fsync", errno.EIO, "EIO")]
)
def test_a_disk_error_on_one_rank_ends_all_and_publishes_nothing(
    tmp_path: Path, monkeypatch, world_rank: int, function: str, number: int, name: str
) -> None:
    saved(tmp_path, step=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    file = f"rank-0000{world_rank}-of-00003"
    monkeypatch.setattr(os, function, failing(function, number, at=file))
    errors = try_to_save(tmp_path, step=2, world_size=3)
    for rank, error in enumerate(errors):
        assert isinstance(error, SaveError if rank == world_rank else RankError), error
        assert error.exit_code == 1
        for part in (
            file,
            os.strerror(number),
            f"({name})",
            "step 2",
            "bytes are free",
            "former checkpoints",
        ):
            assert part in str(error)
        assert re.search(r"needs [\d,]+ bytes in total; [\d,]+ bytes are free", str(error))
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "step-00000001").iterdir()}
    monkeypatch.undo()
    saved(tmp_path, step=2, world_size=3)
    assert newest_intact_here(tmp_path) == tmp_path / "step-00000002"


def test_a_failed_save_may_be_tried_again_in_the_same_world(tmp_path: Path, monkeypatch) -> None:
    whole, real = whole_state(2), os.fsync
    monkeypatch.setattr(os, "fsync", failing("fsync", errno.EIO, at="rank-00001"))

    def save_twice(world):
        share = cut(whole, flat_share(world.world_rank, 2))
        with pytest.raises((SaveError, RankError)):
            save(tmp_path, world, step=2, share=share)
        world.agree("mended", None)
        monkeypatch.setattr(os, "fsync", real)
        return save(tmp_path, world, step=2, share=share)

    assert on_ranks(2, save_twice) == [tmp_path / "step-00000002"] * 2
    verify(tmp_path / "step-00000002")


@pytest.mark.parametrize("at", ["manifest.json", ".step-00000002.partial", "checkpoints"])
def test_an_error_of_the_first_rank_at_the_very_end_leaves_the_former_checkpoints(
    tmp_path: Path, monkeypatch, at: str
) -> None:
    root = tmp_path / "checkpoints"
    saved(root, step=1)
    saved(root, step=2, seed=11)
    before = saved_state(root / "step-00000002")

    def fsync(fd: int, real=os.fsync) -> None:
        if target_of(fd).endswith(at):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    first, second = try_to_save(root, step=2)
    assert isinstance(first, SaveError) and isinstance(second, RankError)
    assert "Disk quota exceeded (EDQUOT)" in str(first) and "EDQUOT" in str(second)
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]
    verify(root / "step-00000002")
    assert_same(saved_state(root / "step-00000002"), before)


def test_a_folder_that_can_not_be_made_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    first, second = try_to_save(tmp_path / "runs" / "checkpoints", step=1)
    assert isinstance(first, SaveError) and "Not a directory (ENOTDIR)" in str(first)
    assert "an unknown number of bytes are free" in str(first)
    assert isinstance(second, RankError) and "Not a directory" in str(second)


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 900, 900))
    monkeypatch.setattr(os, "write", failing("write", errno.EIO, at=""))
    first, second = try_to_save(tmp_path, step=1)
    assert isinstance(first, SaveError) and isinstance(second, RankError)
    needed = int(re.search(r"needs ([\d,]+) bytes and 900 are free", str(first))[1].replace(",", ""))
    state_bytes = sum(values.numel() * 4 for values in whole_state(0).values())
    assert state_bytes < needed < state_bytes + 100_000
    assert os.listdir(tmp_path) == []


def test_what_is_said_to_be_needed_holds_a_real_checkpoint(tmp_path: Path, monkeypatch) -> None:
    sizes = []
    monkeypatch.setattr(
        write_module,
        "swap_in",
        lambda partial, *_, **__: sizes.append([path.stat().st_size for path in partial.iterdir()]),
    )
    try_to_save(tmp_path, step=1)
    (files,) = sizes
    assert 0 < sum(files) <= write_module.checkpoint_bytes(SPECS)


def test_a_file_that_the_first_rank_can_not_see_means_a_folder_that_is_not_shared(tmp_path, monkeypatch) -> None:
    real = write_module._publish

    def publish(folders, manifest):
        (folders.partial / "rank-00001-of-00002.safetensors").unlink()
        real(folders, manifest)

    monkeypatch.setattr(write_module, "_publish", publish)
    first, second = try_to_save(tmp_path, step=1)
    assert isinstance(first, SaveError) and isinstance(second, RankError)
    assert re.search(r"rank-00001\S+: its rank wrote \d+ bytes, and on the first rank it is missing", str(first))
    assert "file system that all nodes share" in str(second)
    assert os.listdir(tmp_path) == []


def test_a_file_that_the_first_rank_sees_shorter_is_not_published(tmp_path: Path, monkeypatch) -> None:
    real = write_module._publish

    def publish(folders, manifest):
        os.truncate(folders.partial / "rank-00001-of-00002.safetensors", 10)
        real(folders, manifest)

    monkeypatch.setattr(write_module, "_publish", publish)
    first, _ = try_to_save(tmp_path, step=1)
    assert isinstance(first, SaveError) and "it is 10 bytes long" in str(first)


# When a rank dies


@pytest.mark.parametrize("world_rank", [0, 1])
@pytest.mark.parametrize("stage", ["_begin", "_write_file", "bytes_of", "_publish", "write_manifest", "swap_in"])
def test_a_rank_that_dies_in_a_save_leaves_the_former_checkpoint_the_newest(
    tmp_path: Path, monkeypatch, stage: str, world_rank: int
) -> None:
    former = saved(tmp_path, step=1)
    module = safetensors_module if stage == "bytes_of" else write_module  # its file has been begun
    real, dying = getattr(module, stage), threading.local()

    def die(*arguments, **named):
        if getattr(dying, "is_chosen", False):
            raise Killed
        return real(*arguments, **named)

    def action(world):
        dying.is_chosen = world.world_rank == world_rank
        return save(tmp_path, world, step=2, share=cut(whole_state(2), flat_share(world.world_rank, 2)))

    monkeypatch.setattr(module, stage, die)
    results = on_ranks(2, action)
    monkeypatch.undo()
    is_first_only = stage in ("_begin", "_publish", "write_manifest", "swap_in")
    if not (is_first_only and world_rank == 1):
        assert isinstance(results[world_rank], Killed) and isinstance(results[1 - world_rank], RankError)
        assert newest_intact_here(tmp_path) == former
    newest = saved(tmp_path, step=2, seed=22)
    assert newest_intact_here(tmp_path) == newest
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    assert_same(saved_state(newest), whole_state(22))


KILLED_BY_THE_SYSTEM = """
import os, pathlib, shutil, sys
from tests.unit.checkpoint.thread_ranks import MemoryWorld, Store, save, whole_state
root = pathlib.Path({root!r})
calls = ["os.open", "os.write", "os.fsync", "os.close", "os.rename", "shutil.rmtree"]

def one_save(root, kill_at):
    count = 0
    def counting(function):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), 9)
            return function(*arguments, **named)
        return call
    for name in calls:
        module = sys.modules[name.split(".")[0]]
        setattr(module, name.split(".")[1], counting(getattr(module, name.split(".")[1])))
    save(root, MemoryWorld(0, 1, Store()), step=2, share=whole_state(2))
    os._exit(0)

for kill_at in range(1, 100):
    here = root / str(kill_at)
    save(here, MemoryWorld(0, 1, Store()), step=1, share=whole_state(1))
    child = os.fork()
    if child == 0:
        one_save(here, kill_at)
    status = os.waitpid(child, 0)[1]
    print(kill_at, status)
    if status == 0:
        break
    assert status == 9, status
"""


@pytest.mark.slow
def test_a_save_killed_before_any_of_its_system_calls_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = KILLED_BY_THE_SYSTEM.format(root=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(outcomes) > 12 and outcomes[-1][1] == 0
    steps = []
    for kill_at, _ in outcomes:
        root = tmp_path / str(kill_at)
        newest = newest_intact_here(root)
        steps.append(int(newest.name[-8:]))
        assert_same(saved_state(newest), whole_state(steps[-1]))
        saved(root, step=3)
        rotate(root, keep=2, best=None)
        assert sorted(os.listdir(root)) == [f"step-{s:08d}" for s in (steps[-1], 3)]
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2


# What stays


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = {step: saved(tmp_path, step=step) for step in (1, 2, 3, 4, 5)}
    assert rotate(tmp_path, keep=2, best=2) == [folders[3], folders[1]]
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert rotate(tmp_path, keep=2, best=2) == []
    assert rotate(tmp_path, keep=1, best=None) == [folders[4], folders[2]]
    verify(folders[5])


def test_rotation_counts_whole_ones_only_and_never_deletes_the_last(tmp_path: Path) -> None:
    folders = {step: saved(tmp_path, step=step) for step in (1, 2, 3, 4)}
    (folders[4] / "manifest.json").unlink()
    os.truncate(folders[3] / "rank-00001-of-00002.safetensors", 100)
    assert rotate(tmp_path, keep=1, best=None) == [folders[1]]
    assert newest_intact_here(tmp_path) == folders[2]
    (folders[2] / "rank-00000-of-00002.safetensors").unlink()
    assert rotate(tmp_path, keep=1, best=None) == []
    assert len(names(tmp_path)) == 3


def test_rotation_removes_damaged_ones_once_enough_newer_whole_ones_are_there(tmp_path: Path) -> None:
    folders = {step: saved(tmp_path, step=step) for step in (1, 2, 3)}
    (folders[1] / "manifest.json").unlink()
    assert rotate(tmp_path, keep=2, best=None) == [folders[1]]


def test_rotation_clears_what_killed_saves_left(tmp_path: Path) -> None:
    saved(tmp_path, step=2)
    for leftover in (".step-00000003.partial", ".step-00000001.deleted"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / leftover)
    (tmp_path / "notes").mkdir()
    assert rotate(tmp_path, keep=1, best=None) == []
    assert names(tmp_path) == ["notes", "step-00000002"]


def test_a_checkpoint_that_can_not_be_deleted_is_a_warning_and_stays(tmp_path: Path, caplog, monkeypatch) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step=step)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        assert rotate(tmp_path, keep=2, best=None) == []
    assert "step-00000001 can't be deleted: Read-only file system. It is kept" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.EBUSY, "Device busy")))
        assert rotate(tmp_path, keep=2, best=None) == [tmp_path / "step-00000001"]
    assert "can't be deleted: Device busy. It takes disk space until it is deleted" in caplog.text
    assert list(step_folders(tmp_path)) == [3, 2]


def test_a_folder_that_can_not_be_listed_after_a_save_is_a_warning(tmp_path: Path, caplog, monkeypatch) -> None:
    def stale(self):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", stale)
    assert rotate(tmp_path, keep=1, best=None) == set_aside(tmp_path, above=3) == []
    assert (
        caplog.text.count("can't be listed for checkpoints: Stale file handle. Nothing is deleted or renamed there")
        == 2
    )


def test_rotating_nothing_removes_nothing(tmp_path: Path) -> None:
    assert rotate(tmp_path / "absent", keep=2, best=None) == []
