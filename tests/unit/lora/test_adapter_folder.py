"""What a user hears who gives something else than an adapter's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lora.errors import ConfigError
from dist_lora.lora.adapter_folder import check_adapter_folder, check_out
from dist_lora.lora.adapter_reader import open_adapter


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    step = tmp_path / "run" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    for name in ("done/checkpoints/step-00000010", "done/adapter", "model", "empty", "other", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("done/adapter/adapter_model.safetensors", "model/config.json", "other/notes.txt", "file"):
        (tmp_path / name).touch()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path, told",
    [
        ("adaptr", "adaptr: no such folder; expected an adapter's folder, with adapter_config.json and "
                   "adapter_model.safetensors (nearest: adapter)"),
        ("org/adapter", "org/adapter: no such folder. If it is an adapter on the hub, download it first, and name the "
                        "folder: hf download org/adapter --local-dir adapter"),
        ("done/adaptr", "done/adaptr: no such folder; expected an adapter's folder"),
        ("file", "file: is a file, not a folder"),
        ("file/adapter", "file/adapter: no such folder: a part of its path is a file"),
        ("empty", "empty: is empty; expected an adapter's folder"),
        ("other", "other: holds notes.txt; expected an adapter's folder"),
        ("model", "model: a model's folder, without an adapter in it: it can be the base (--base, model.name)"),
        ("run/checkpoints/step-00000010", "a checkpoint, not an adapter. Gather it first: dist-lora gather "
                                          "run/checkpoints/step-00000010 --out DIR, then name DIR"),
        ("run/checkpoints", "Gather the newest first: dist-lora gather run/checkpoints --out DIR"),
        ("run", "run: a folder of checkpoints, not an adapter. Gather the newest first: dist-lora gather run --out DIR"),
        ("done", "done: a run's folder. Its adapter is done/adapter"),
        ("n" * 300, "can't be opened: File name too long"),
        ("a\0b", "can't be opened: "),
    ],
)  # fmt: skip
def test_a_path_that_is_no_adapter_is_told_what_it_is_and_what_to_do(here: Path, path: str, told: str) -> None:
    for check in (check_adapter_folder, open_adapter):
        with pytest.raises(ConfigError) as raised:
            check(Path(path))
        assert told in str(raised.value)


def test_a_folder_that_lacks_a_part_of_an_adapter_is_left_to_the_reader(here: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "dist_lora.json", "adapter_model.bin"):
        (here / name.replace(".", "-")).mkdir()
        (here / name.replace(".", "-") / name).touch()
        check_adapter_folder(Path(name.replace(".", "-")))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "optimizer.pt", "checkpoint-5"])
def test_a_folder_with_more_than_an_adapter_in_it_is_not_gathered_into(here: Path, name: str) -> None:
    for harmless in (".cache", "additional_chat_templates"):
        (here / "adapter" / harmless).mkdir()
    for harmless in ("adapter_model.safetensors", "tokenizer.json", "notes.txt"):
        (here / "adapter" / harmless).touch()
    for path in ("adapter", "nothing", "file", "n" * 300, "a\0b"):
        check_out(Path(path))
    (here / "adapter" / name).mkdir() if name == "checkpoint-5" else (here / "adapter" / name).touch()
    with pytest.raises(ConfigError, match=f"--out: adapter has more than an adapter in it, .* deleted: {name}"):
        check_out(Path("adapter"))
    for here_too in (".", str(here), "adapter/.."):
        with pytest.raises(ConfigError, match="is the folder that this runs in"):
            check_out(Path(here_too))
