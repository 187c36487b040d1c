"""Reading back: damage of any kind to any file is found and named, and any range comes from any split."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lora.checkpoint import read as read_module
from dist_lora.checkpoint.folders import step_folders
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.manifest import KINDS, Piece, entry_to_bytes, read_manifest
from dist_lora.checkpoint.read import (
    checksum_of,
    load_pieces,
    newest_intact,
    newest_intact_here,
    verify,
)
from dist_lora.errors import EXIT_DAMAGED, EXIT_USER, CheckpointError, RankError, exit_code_of
from tests.unit.checkpoint.thread_ranks import SPECS, cut, flat_share, on_ranks, saved, whole_state

RANK_0, RANK_1 = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"
FILES = [RANK_0, RANK_1, "manifest.json"]


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def turn_a_bit(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "cut short by a byte": cut_short,
    "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a bit turned at the start": lambda file: turn_a_bit(file, 0.0),
    "a bit turned in the header": lambda file: turn_a_bit(file, 0.05),
    "a bit turned in the middle": turn_a_bit,
    "a bit turned at the end": lambda file: turn_a_bit(file, 0.99999),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": lambda file: file.unlink(),
    "a folder in its place": lambda file: (file.unlink(), file.mkdir()),
    "a link to nothing in its place": lambda file: (file.unlink(), file.symlink_to("nothing")),
    "a link to its copy elsewhere": lambda file: (
        file.rename(file.parent.parent / "copy"),
        file.symlink_to(file.parent.parent / "copy"),
    ),
    "longer by a byte": lambda file: file.write_bytes(file.read_bytes() + b"\n}"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    saved(root, step=100)
    saved(root, step=200)
    return root


@pytest.fixture
def root(two_steps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def assert_found(root: Path, file: str, caplog: pytest.LogCaptureFixture) -> str:
    """The newest is refused by name and the one before used, with one warning; without it all ranks end."""
    newest, former = root / "step-00000200", root / "step-00000100"
    with pytest.raises(CheckpointError) as caught:
        verify(newest)
    assert file in str(caught.value) and str(newest) in str(caught.value)
    with pytest.raises(CheckpointError, match=re.escape(file)):
        gather_adapter(newest, out=root / "adapter")
    assert not (root / "adapter").exists()
    caplog.clear()
    assert on_ranks(2, lambda world: newest_intact(root, world)) == [former, former]
    (warning,) = caplog.messages
    assert str(caught.value) in warning and f"Using the one before: {former}" in warning
    former.rename(root / "elsewhere")
    first, second = on_ranks(2, lambda world: newest_intact(root, world))
    assert isinstance(first, CheckpointError) and isinstance(second, RankError)
    assert first.exit_code == second.exit_code == EXIT_DAMAGED
    assert file in str(first) and "start over with checkpoint.resume=never" in str(second)
    return str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_any_one_bit_that_is_turned_in_a_file_is_found(root: Path, file: str) -> None:
    place = root / "step-00000200" / file
    data = place.read_bytes()
    whole = read_manifest(place.parent)
    for number in range(0, 8 * len(data), 97):  # 97 is prime: every bit of a byte has its turn
        turned = bytearray(data)
        turned[number // 8] ^= 1 << number % 8
        place.write_bytes(turned)
        try:
            found = verify(place.parent)
        except CheckpointError as error:
            assert file in str(error)
        else:  # a manifest's white space may change and its numbers be spelled otherwise
            assert file == "manifest.json" and found == whole, f"bit {number}"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(root, file, damage, caplog) -> None:
    DAMAGES[damage](root / "step-00000200" / file)
    assert_found(root, file, caplog)


def test_files_of_two_ranks_exchanged_are_both_named(root: Path, caplog) -> None:
    folder = root / "step-00000200"
    (folder / RANK_0).rename(folder / "aside")
    (folder / RANK_1).rename(folder / RANK_0)
    (folder / "aside").rename(folder / RANK_1)
    told = assert_found(root, RANK_0, caplog)
    assert RANK_1 in told


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_run_or_step_is_found(root: Path, tmp_path: Path, file: str, caplog) -> None:
    other = saved(tmp_path / "other", step=200, seed=99)
    # Another run's manifest is sound in itself: it is the rank files beside it that it does not fit.
    shutil.copy(other / file, root / "step-00000200" / file)
    assert_found(root, RANK_0 if file == "manifest.json" else file, caplog)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_step_of_the_same_run_is_found(root: Path, file: str, caplog) -> None:
    shutil.copy(root / "step-00000100" / file, root / "step-00000200" / file)
    assert_found(root, file, caplog)


def test_a_whole_checkpoint_under_the_name_of_another_step_is_refused(root: Path, caplog) -> None:
    shutil.rmtree(root / "step-00000200")
    shutil.copytree(root / "step-00000100", root / "step-00000200")
    assert "manifest.json is that of step 100" in assert_found(root, "manifest.json", caplog)


def test_a_whole_checkpoint_under_a_name_of_its_own_is_fine(root: Path) -> None:
    verify((root / "step-00000200").rename(root / "the-good-one"))


def test_a_file_that_can_not_be_read_is_named(root: Path, monkeypatch, caplog) -> None:
    def checksum(path: Path) -> str:
        if "00000200" in str(path):
            raise OSError(5, "Input/output error")
        return checksum_of(path)

    monkeypatch.setattr(read_module, "checksum_of", checksum)
    assert "can't be read: Input/output error" in assert_found(root, RANK_0, caplog)


def test_a_file_of_another_user_is_not_taken_for_damaged_nor_an_older_checkpoint_for_the_newest(
    root: Path, monkeypatch
) -> None:
    def checksum(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        read_module, "checksum_of", lambda path: (checksum if "00000200" in str(path) else checksum_of)(path)
    )
    with pytest.raises(
        CheckpointError, match=rf"step-00000200/{RANK_0} can't be read by this user: Permission denied"
    ) as e:
        newest_intact_here(root)
    assert exit_code_of(e.value) == EXIT_USER


# Which checkpoints there are


def test_no_checkpoint_at_all_is_no_error(tmp_path: Path) -> None:
    assert on_ranks(3, lambda world: newest_intact(tmp_path / "absent", world)) == [None] * 3
    assert step_folders(tmp_path) == {}


def test_only_folders_named_by_a_step_are_checkpoints(root: Path) -> None:
    for name in (
        "step-300",
        ".step-00000400.partial",
        "step-00000500x",
        "aside-step-00000600",
        "step-00000700",
    ):
        (root / name).mkdir()
    (root / "step-00000800").write_text("no folder")
    shutil.copy(root / "step-00000100" / "manifest.json", root / ".step-00000400.partial")
    assert list(step_folders(root)) == [700, 200, 100]


def test_the_newest_is_found_by_number_and_told_to_all(root: Path, caplog) -> None:
    saved(root, step=1000, world_size=1)
    assert on_ranks(3, lambda world: newest_intact(root, world)) == [root / "step-00001000"] * 3
    assert caplog.messages == []


def test_asking_twice_in_one_world_gives_the_newer_answer(root: Path) -> None:
    def ask(world):
        before = newest_intact(root, world)
        if world.is_first:
            shutil.rmtree(root / "step-00000200")
        world.agree("removed", None)
        return before.name, newest_intact(root, world).name

    assert on_ranks(2, ask) == [("step-00000200", "step-00000100")] * 2


def test_a_root_that_is_a_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints can't be listed for checkpoints: Not a directory"):
        step_folders(tmp_path / "checkpoints")


# Any range from any split

OFFSETS = st.integers(0, 21)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("splits")
    return {n: saved(root / str(n), step=1, seed=5, world_size=n) for n in (1, 2, 3, 5)}


@settings(deadline=None, max_examples=60)
@given(
    world_size=st.sampled_from([1, 2, 3, 5]),
    ranges=st.lists(
        st.tuples(st.sampled_from(SPECS), st.sampled_from(KINDS), OFFSETS, OFFSETS), min_size=1, max_size=6
    ),
)
def test_any_range_equals_that_of_the_whole(splits: dict[int, Path], world_size: int, ranges: list) -> None:
    wanted = []
    for spec, kind, one, other in ranges:
        start, stop = sorted((min(one, spec.num_elements), min(other, spec.num_elements)))
        wanted.append(Piece(spec.name, kind, start, stop))
    folder, whole = splits[world_size], cut(whole_state(5), wanted)
    loaded = load_pieces(folder, read_manifest(folder), wanted)
    assert loaded.keys() == set(wanted)
    for piece, values in loaded.items():
        assert values.dtype == torch.float32 and torch.equal(values, whole[piece])


def test_a_rank_reads_only_the_files_that_hold_its_share(root: Path) -> None:
    folder = root / "step-00000200"
    manifest = read_manifest(folder)
    (folder / RANK_1).unlink()
    mine = flat_share(0, 2)
    assert all(map(torch.equal, load_pieces(folder, manifest, mine).values(), cut(whole_state(200), mine).values()))
    with pytest.raises(CheckpointError, match=f"step-00000200 is damaged: {RANK_1} is missing"):
        load_pieces(folder, manifest, flat_share(0, 1))


@pytest.mark.parametrize(
    ("name", "start", "stop", "told"),
    [
        (SPECS[0].name, 0, 22, "elements 0-22: 21 elements are stored"),
        (SPECS[0].name, -1, 3, "elements -1-3: 21 elements are stored"),
        (SPECS[0].name, 5, 3, "elements 5-3: 21 elements are stored"),
        ("model.layers.9.self_attn.q_proj.lora_A", 0, 1, "elements 0-1: no file holds any of it"),
    ],
)
def test_a_range_that_is_not_there_is_named(root: Path, name: str, start: int, stop: int, told: str) -> None:
    folder = root / "step-00000200"
    with pytest.raises(CheckpointError) as caught:
        load_pieces(folder, read_manifest(folder), [Piece(name, "exp_avg", start, stop)])
    assert f"exp_avg of {name}, {told}" in str(caught.value)


def edit_header(file: Path, old: bytes, new: bytes) -> None:
    """Change a file's header in place and keep its length."""
    data = file.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    file.write_bytes(data.replace(old, new))


def test_a_moment_that_its_file_lacks_is_named(root: Path) -> None:
    folder = root / "step-00000200"
    key = f"exp_avg/{SPECS[1].name}/0-15".encode()
    edit_header(folder / RANK_0, key, key.replace(b"exp_avg", b"exp_abc"))
    with pytest.raises(CheckpointError) as caught:
        load_pieces(folder, read_manifest(folder), list(whole_state(0)))
    assert f"{RANK_0} lacks exp_avg of {SPECS[1].name}, elements 0-15, which the manifest lists" in str(caught.value)


def test_a_moment_of_another_type_is_named(root: Path) -> None:
    folder = root / "step-00000200"
    key = f'"exp_avg/{SPECS[1].name}/0-15":{{"dtype":"'.encode()
    edit_header(folder / RANK_0, key + b"F32", key + b"I32")
    with pytest.raises(CheckpointError, match=r"lora_B/0-15 is I32 \[15\], expected F32 \[15\]"):
        load_pieces(folder, read_manifest(folder), list(whole_state(0)))


def test_a_header_that_is_no_safetensors_is_an_error_of_ours(root: Path) -> None:
    folder = root / "step-00000200"
    manifest = read_manifest(folder)
    turn_a_bit(folder / RANK_0, 0.0)
    with pytest.raises(CheckpointError, match=f"{RANK_0} can't be read as safetensors"):
        load_pieces(folder, manifest, list(whole_state(0)))


# Trust nothing


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_any_bytes_changed_gives_ranges_of_the_right_size_or_our_error(two_steps, tmp_path, data) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_steps / "step-00000200", folder, dirs_exist_ok=True)
    content = bytearray((folder / RANK_0).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    (folder / RANK_0).write_bytes(content)
    wanted = list(whole_state(0))
    try:
        loaded = load_pieces(folder, read_manifest(folder), wanted)
    except CheckpointError as error:
        assert RANK_0 in str(error)
    else:
        assert [values.numel() for values in loaded.values()] == [piece.num_elements for piece in wanted]


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_here_imports_pickle_or_a_collective() -> None:
    refused = (
        "pickle",
        "cPickle",
        "dill",
        "marshal",
        "shelve",
        "joblib",
        "torch.load",
        "torch.save",
        "torch.distributed",
    )
    for file in Path(read_module.__file__).parent.glob("*.py"):
        assert not [name for name in imports_of(file) if name.startswith(refused)], file
        assert not [word for word in ("torch.load", "torch.save", "torch.distributed") if word in file.read_text()], (
            file
        )


def test_an_entry_is_plain_json_on_its_way_to_the_first_rank(root: Path) -> None:
    entry = read_manifest(root / "step-00000200").files[1]
    assert json.loads(entry_to_bytes(entry))["name"] == RANK_1


def test_newest_whole_here_needs_no_world(root: Path) -> None:
    assert newest_intact_here(root) == root / "step-00000200"
