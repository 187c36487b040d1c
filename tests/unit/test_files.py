"""Files are written completely or not at all, by several processes too, and what a killed writer left is removed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lora.errors import ConfigError
from dist_lora.files import refuse_file, sync_folder, write_output, write_whole

KILLED_IN_FSYNC = """
import os, signal, sys
from pathlib import Path
from dist_lora.files import write_whole
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), "new")
"""
WRITES_MANY = """
import sys
from pathlib import Path
from dist_lora.files import write_whole
for i in range(100):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "status"
    path.write_text("old")
    neighbour = tmp_path / ".status-of-another"
    neighbour.touch()
    done = subprocess.run([sys.executable, "-c", KILLED_IN_FSYNC, path], check=False)
    assert done.returncode < 0 and path.read_text() == "old"
    (left,) = tmp_path.glob(".status-*.partial")
    write_whole(path, "newer")
    assert path.read_text() == "newer" and not left.exists()
    assert {each.name for each in tmp_path.iterdir()} == {"status", neighbour.name}


def test_a_file_that_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    path, temporary = tmp_path / "status", tmp_path / ".status-0.partial"
    with temporary.open("xb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_whole(path, "new")
        assert temporary.exists()
    write_whole(path, "newer")
    assert not temporary.exists()


@pytest.mark.slow
def test_processes_that_write_one_file_each_write_it_completely(tmp_path: Path) -> None:
    path = tmp_path / "status"
    write_whole(path, "0" * 5000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITES_MANY, path, letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        assert content == content[0] * 5000
    assert [writer.returncode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["status"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "status"
    write_whole(path, "old")

    def fails(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["status"]


def test_a_folder_is_fsynced_with_all_that_lies_in_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("config.json", "additional_chat_templates/tools.jinja"):
        (tmp_path / name).write_text("{}")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_folder(tmp_path)
    assert sorted(synced) == sorted(str(path) for path in (tmp_path, *tmp_path.rglob("*")))


def test_a_file_that_will_be_replaced_is_refused_only_where_it_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    for path in (tmp_path / "old.json", tmp_path / "new.json", Path("/dev/null")):
        refuse_file(path, option="--out", is_replaced=True)
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.json", "its folder: no such folder")):
        with pytest.raises(ConfigError, match=f"--out: {path}:? {words}"):
            refuse_file(path, option="--out", is_replaced=True)


def test_what_a_user_names_may_be_a_link_or_a_device(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_output(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        write_output(pipe, "through it")
        assert reader.communicate()[0] == "through it" and pipe.is_fifo()
    write_output(Path("/dev/null"), "nowhere")
    assert Path("/dev/null").is_char_device()
