"""A folder comes to the hub in one commit and without paths of this machine; what prevents it is told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_lora.errors import ConfigError, SaveError
from dist_lora.lora.adapter_reader import read_adapter
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.origin import BaseIdentity, RunOrigin, origin_of
from dist_lora.lora.push import check_push, push
from tests.e2e.fake_hub import Hub, serving
from tests.unit.lora.test_adapter_files import LINEARS, random_adapter, tiny_llama

AGAIN = "do it again"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub that this process's library asks, with the token of somebody who may write."""
    with serving(Hub({}, token="hf_mine")) as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        yield served


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = tmp_path / "models" / "Llama-mine"
    write_adapter(
        tmp_path / "adapter", tensors=random_adapter(tiny_llama()), rank=4, alpha=8, dropout=0.0, targets=LINEARS,
        base=BaseIdentity(str(base)), run=RunOrigin(model=str(base), quant="nf4"),
    )  # fmt: skip
    return tmp_path / "adapter"


def push_to(folder: Path, name: str = "me/Llama-new", *, is_public: bool = False) -> str:
    check_push(name, is_public=is_public)
    return push(folder, repository=name, is_public=is_public, again=AGAIN)


def refused(kind: type[Exception], folder: Path, name: str = "me/Llama-new", **options: bool) -> str:
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(kind) as raised:
        push_to(folder, name, **options)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}
    return str(raised.value)


def test_what_is_pushed_is_the_folder_without_paths_of_this_machine_and_loads(hub, adapter, tmp_path) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    assert str(tmp_path).encode() in b"".join(before.values())
    assert push_to(adapter) == f"{hub.url}/me/Llama-new" and hub.private == {"me/Llama-new": True}
    found = hub.pushed["me/Llama-new"]
    assert found.keys() == before.keys()
    assert {name for name in before if before[name] != found[name]} == {"adapter_config.json", "dist_lora.json"}
    assert before == {file.name: file.read_bytes() for file in adapter.iterdir()}
    there = tmp_path / "there"
    there.mkdir()
    for name, content in found.items():
        assert str(tmp_path).encode() not in content, name
        (there / name).write_bytes(content)
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "Llama-mine"
    assert read_adapter(there).base == read_adapter(adapter).base
    assert origin_of(there) == RunOrigin(quant="nf4")


def test_a_model_is_pushed_without_the_folders_that_transformers_wrote_into_it(hub, tmp_path) -> None:
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        (tmp_path / name).write_text(json.dumps({key: "/home/someone/Llama-mine", "x": 1}))
    (tmp_path / "README.md").write_text("---\nbase_model: meta-llama/Llama-3.1-8B\n---\n")
    push_to(tmp_path)
    pushed = hub.pushed["me/Llama-new"]
    found = {name: json.loads(content) for name, content in pushed.items() if name.endswith(".json")}
    assert found == {
        "config.json": {"_name_or_path": "Llama-mine", "x": 1},
        "tokenizer_config.json": {"name_or_path": "Llama-mine", "x": 1},
    }


def test_a_public_repository_is_made_or_written_to_only_if_that_was_asked_for(hub, adapter) -> None:
    push_to(adapter, is_public=True)
    assert hub.private == {"me/Llama-new": False}
    pushed = dict(hub.pushed.pop("me/Llama-new"))
    told = refused(ConfigError, adapter)
    assert told.startswith("--push: me/Llama-new exists and is public: add --public, or name another one. ")
    assert not hub.pushed and "hf upload" not in told
    push_to(adapter, is_public=True)
    assert hub.pushed["me/Llama-new"] == pushed


def test_a_licence_that_asks_for_a_name_is_told(hub, tmp_path, caplog) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: meta-llama/Llama-3.1-8B\n---\n")
    push_to(tmp_path, "me/Llama-3.1-8B-mine")
    assert not caplog.text
    push_to(tmp_path, "me/mine")
    assert (
        "me/mine: the Llama 3.1 Community License (1.b.i) asks that the name of a model that is passed on begins"
        in caplog.text
    )


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/", "me/a b", "me/a--b", "me/a.git", "-/x", f"me/{'a' * 96}", ""])
def test_what_is_no_name_is_refused_before_anything_is_asked(hub, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--push: found '.*', expected ORG/NAME"):
        check_push(name, is_public=False)
    assert hub.requests == []


def test_what_can_be_known_before_is_told_before(hub, adapter, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="--public: it is about --push"):
        check_push(None, is_public=True)
    check_push(None, is_public=False)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    told = refused(ConfigError, adapter)
    assert told.startswith("--push: the hub doesn't know this token (") and "Invalid user token" in told
    assert [path for method, path in hub.requests if method == "POST"] == []
    monkeypatch.delenv("HF_TOKEN")
    assert refused(ConfigError, adapter).startswith("--push: no token of the hub is here. Set HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(ConfigError, adapter).startswith("--push: HF_HUB_OFFLINE is set")


def test_a_token_without_write_access_is_told_and_the_folder_stays(hub, adapter) -> None:
    hub.refusals["me/Llama-new"] = (403, "", "You don't have the rights to create a model under the namespace me")
    told = refused(ConfigError, adapter)
    assert told.startswith("--push: this token may not write to me/Llama-new (") and "You don't have the rights" in told
    assert told.endswith(f" {adapter} is complete; {AGAIN}")


def test_no_network_and_a_hub_that_fails_are_told(hub, adapter) -> None:
    hub.refusals["me/Llama-new"] = (500, "", "Internal error")
    assert refused(SaveError, adapter).startswith("--push: me/Llama-new can't be pushed (")


def test_a_hub_that_is_not_there_is_told(monkeypatch, hub, adapter) -> None:
    for name in ("constants.ENDPOINT", "hf_api.api.endpoint"):
        monkeypatch.setattr(f"huggingface_hub.{name}", "http://127.0.0.1:9")
    assert refused(ConfigError, adapter).startswith("--push: the hub can't be reached (")
