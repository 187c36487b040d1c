"""Gathering: what several ranks saved is one adapter, made without a process group."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dist_lora.base.tokenizer_files import hash_tokenizer_files
from dist_lora.checkpoint.gather import gather_adapter, verify_checkpoints
from dist_lora.checkpoint.manifest import MANIFEST_FILE, Manifest, Piece, read_manifest, write_manifest
from dist_lora.errors import AdapterError, CheckpointError, ConfigError, exit_code_of
from dist_lora.lora.adapter_reader import read_adapter
from dist_lora.lora.learned import read_learned
from dist_lora.lora.origin import facts_of
from dist_lora.lora.run_facts import RunFacts, SetFacts
from tests import ROOT
from tests.unit.checkpoint.thread_ranks import ADAPTER, BASE, SPECS, saved, whole_state


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the file itself, by PEFT's names."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict


def expected(seed: int) -> dict[str, torch.Tensor]:
    whole = whole_state(seed)
    return {
        f"base_model.model.{spec.name}.weight": whole[Piece(spec.name, "adapter", 0, spec.num_elements)].view(
            spec.shape
        )
        for spec in SPECS
    }


def assert_holds(folder: Path, seed: int) -> None:
    found, wanted = adapter_of(folder), expected(seed)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].shape == values.shape and torch.equal(found[key], values), key


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_adapter_of_any_number_of_ranks_is_the_whole_one(tmp_path: Path, world_size: int) -> None:
    folder = saved(tmp_path / "checkpoints", step=10, world_size=world_size)
    assert gather_adapter(folder, out=tmp_path / "adapter") == tmp_path / "adapter"
    assert_holds(tmp_path / "adapter", seed=10)
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (3, 6.0, 0.0)
    assert adapter.targets == ("q_proj",) and vars(adapter.base) == BASE
    first = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    gather_adapter(saved(tmp_path / "again", step=10, world_size=4), out=tmp_path / "adapter")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


def test_the_tokenizer_of_a_base_of_the_hub_is_taken_from_the_hubs_cache_without_a_network(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = saved(tmp_path / "checkpoints", step=10)
    manifest = read_manifest(folder)
    origin = {"model": "org/base", "revision": commit, "kinds": [], "tokenizer": hash_tokenizer_files(snapshot)}
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, dataclasses.replace(manifest, progress=manifest.progress | {"origin": origin}))
    assert (gather_adapter(folder, out=tmp_path / "a") / "tokenizer.json").read_text() == "{}"
    assert "without its tokenizer" not in caplog.text
    (snapshot / "tokenizer.json").write_text("{ }")
    assert not (gather_adapter(folder, out=tmp_path / "b") / "tokenizer.json").exists()
    assert "the base's (org/base) is not in the hub's cache here, or has changed" in caplog.text
    shutil.rmtree(tmp_path / "hub")
    assert not (gather_adapter(folder, out=tmp_path / "c") / "tokenizer.json").exists()


def test_a_run_its_checkpoints_or_one_of_them_may_be_given(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    older, _ = (saved(run / "checkpoints", step=step) for step in (10, 20))
    for given, seed in ((run, 20), (run / "checkpoints", 20), (older, 10)):
        assert_holds(gather_adapter(given, out=tmp_path / f"adapter-{given.name}"), seed)
    moved = shutil.copytree(older, tmp_path / "the-good-one")
    assert_holds(gather_adapter(moved, out=tmp_path / "of-the-good-one"), seed=10)


def test_the_newest_of_a_run_is_passed_over_where_it_is_damaged(tmp_path: Path, caplog) -> None:
    for step in (10, 20):
        saved(tmp_path / "checkpoints", step=step)
    os.truncate(tmp_path / "checkpoints" / "step-00000020" / "rank-00001-of-00002.safetensors", 5)
    assert_holds(gather_adapter(tmp_path, out=tmp_path / "adapter"), seed=10)
    assert "rank-00001-of-00002.safetensors has 5 bytes" in caplog.text


def test_a_named_checkpoint_that_is_damaged_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = saved(tmp_path, step=10)
    file = folder / "rank-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors has the checksum"):
        gather_adapter(folder, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    # The bit is one of a moment: without the checksums the adapter itself is sound.
    assert_holds(gather_adapter(folder, out=tmp_path / "adapter", verify=False), seed=10)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors is missing"):
        gather_adapter(folder, out=tmp_path / "adapter", verify=False)


@pytest.mark.parametrize("given", ["", "checkpoints", "absent"])
def test_a_folder_without_a_checkpoint_is_told_what_is_expected(tmp_path: Path, given: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError) as caught:
        gather_adapter(tmp_path / given, out=tmp_path / "adapter")
    problem = ": no such folder" if given == "absent" else " holds no checkpoint"
    assert f"{tmp_path / given}{problem}. Give a run's folder" in str(caught.value)


def test_a_step_folder_without_its_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000010/manifest\.json is missing"):
        gather_adapter(tmp_path / "step-00000010", out=tmp_path / "adapter")


def rewrite(folder: Path, **changed: Any) -> None:
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder, Manifest(**{**vars(manifest), **changed}))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"adapter": {**ADAPTER, "rank": "3"}}, "adapter.rank: Input should be a valid integer"),
        ({"adapter": {**ADAPTER, "variant": "dora"}}, "adapter.variant: Unexpected keyword argument"),
        ({"adapter": {}}, "adapter.rank: Field required; adapter.alpha: Field required"),
        ({"base": {"name": 7}}, "base.name: Input should be a valid string"),
    ],
)
def test_facts_that_this_version_can_not_write_are_named(tmp_path: Path, changed: dict, told: str) -> None:
    folder = saved(tmp_path, step=10)
    rewrite(folder, **changed)
    with pytest.raises(CheckpointError) as caught:
        gather_adapter(folder, out=tmp_path / "adapter")
    assert told in str(caught.value) and "Use the version of dist_lora that wrote it, 0." in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_some_layers_of_more_are_written_as_such_and_all_as_all(tmp_path: Path) -> None:
    folder = saved(tmp_path, step=10)
    assert read_adapter(gather_adapter(folder, out=tmp_path / "all")).layers is None
    rewrite(folder, adapter={**ADAPTER, "num_layers": 4})
    assert read_adapter(gather_adapter(folder, out=tmp_path / "some")).layers == (0, 1)


WITHOUT_DISTRIBUTED = """
import sys
import torch
loaded = set(sys.modules)
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    sys.modules[name] = None
for name in ("deepspeed", "transformers", "peft", "datasets"):
    sys.modules[name] = None
from pathlib import Path
from dist_lora.checkpoint.gather import gather_adapter
from dist_lora.checkpoint.gather import verify_checkpoints
gather_adapter(Path(sys.argv[1]), out=Path(sys.argv[2]))
assert not [name for name in set(sys.modules) - loaded if name.startswith("torch.distributed")]
"""


@pytest.mark.slow
def test_gathering_needs_neither_torch_distributed_nor_deepspeed(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "checkpoints", step=10)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DISTRIBUTED, str(tmp_path / "run"), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "adapter", seed=10)


def test_no_file_of_the_adapter_tells_of_this_machine(tmp_path: Path) -> None:
    gather_adapter(saved(tmp_path / "run" / "checkpoints", step=10), out=tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3


# The model card


def test_what_the_manifest_knows_of_the_run_is_in_the_card_and_goes_with_the_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run" / "checkpoints", step=10)
    card = RunFacts(
        tokens=1234,
        target_tokens=321,
        train=SetFacts(("x.jsonl",), (), 8),
        evaluation={"eval_loss": 0.75},
        evaluated_step=10,
    )
    config = "run: a\ndata: {train: /home/me/x.jsonl}\noptim: {lr: 0.125}\n"
    rewrite(folder, progress={"num_steps": 20, "card": card.to_json()}, config=config)
    gather_adapter(folder, out=tmp_path / "adapter")
    versions = read_manifest(folder).versions
    assert facts_of(tmp_path / "adapter") == dataclasses.replace(
        card, step=10, num_steps=20, num_layers=2, settings={"optim.lr": 0.125}, versions=versions
    )
    text = (tmp_path / "adapter" / "README.md").read_text()
    for row in (
        "| steps | 10 of 20 |",
        "| learning rate | 0.125 |",
        "| held-out loss per trained token | 0.75 |",
        "| trained on | x.jsonl (8 samples) |",
    ):
        assert row in text
    assert f"| torch | {torch.__version__} |" in text


def test_a_manifest_of_an_older_version_tells_what_it_has(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run" / "checkpoints", step=10)
    config = "run: a\ndata: {train: [/home/me/x.jsonl, y.csv], eval: 0.1}\n"
    rewrite(folder, progress={"best_step": 10, "best_loss": 1.5}, config=config)
    gather_adapter(folder, out=tmp_path / "adapter")
    facts = facts_of(tmp_path / "adapter")
    assert (facts.train, facts.held_out, facts.tokens) == (SetFacts(("x.jsonl", "y.csv")), None, None)
    assert (dict(facts.evaluation), facts.evaluated_step) == ({"eval_loss": 1.5}, 10)
    rewrite(folder, progress={"best_step": 5, "best_loss": 1.5}, config="[]")
    gather_adapter(folder, out=tmp_path / "adapter")
    facts = facts_of(tmp_path / "adapter")
    assert (facts.train, dict(facts.evaluation), dict(facts.settings)) == (None, {}, {})


def test_a_damaged_record_for_the_card_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, step=10)
    rewrite(folder, progress={"card": {"tokens": "many"}})
    with pytest.raises(AdapterError, match=r"manifest\.json: progress\.card: tokens: Input should be a valid integer"):
        gather_adapter(folder, out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# What was learned


def test_the_norms_of_a_run_go_with_its_adapter(tmp_path: Path) -> None:
    folder, module = saved(tmp_path / "checkpoints", step=10), "model.layers.1.self_attn.q_proj"
    rewrite(folder, progress={"weight_norms": {module: 2.5}})
    record = read_learned(gather_adapter(folder, out=tmp_path / "adapter"))
    assert record is not None and [(one.name, one.weight_norm) for one in record.linears] == [
        ("model.layers.0.self_attn.q_proj", None), (module, 2.5),
    ]  # fmt: skip
    tensors = adapter_of(tmp_path / "adapter")
    for one in record.linears:
        first, second = (tensors[f"base_model.model.{one.name}.lora_{half}.weight"].double() for half in "AB")
        assert one.norm == pytest.approx(float((2.0 * second @ first).norm()), rel=1e-6)


def test_a_manifest_of_an_older_version_has_no_norms_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoints", step=10)
    record = read_learned(gather_adapter(folder, out=tmp_path / "adapter"))
    assert record is not None and not record.has_weight_norms
    assert read_learned(gather_adapter(folder, out=tmp_path / "judged", has_learned=False)) is None
    for value in (-1.0, "much"):
        rewrite(folder, progress={"weight_norms": {"model.layers.0.self_attn.q_proj": value}})
        with pytest.raises(AdapterError, match=r"manifest\.json: progress\.weight_norms: model.layers.0"):
            gather_adapter(folder, out=tmp_path / "other")
        assert not (tmp_path / "other").exists()


# Verifying


def told_of(given: Path) -> tuple[list[str], str]:
    """The lines, and what was raised at the end."""
    lines: list[str] = []
    try:
        verify_checkpoints(given, report=lines.append)
    except CheckpointError as error:
        assert error.exit_code == 4
        return lines, str(error)
    return lines, ""


def test_each_checkpoint_of_a_run_is_told_in_one_line_newest_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    older, newer = (saved(run / "checkpoints", step=step) for step in (10, 20))
    num_bytes = sum(path.stat().st_size for path in older.glob("rank-*"))
    whole = f"{older} is intact: step 10, 2 ranks' files, {num_bytes:,} bytes"
    assert told_of(older) == ([whole], "")
    for given in (run, run / "checkpoints"):
        lines, error = told_of(given)
        assert (len(lines), lines[1], error) == (2, whole, "")
        assert lines[0].startswith(f"{newer} is intact: step 20, ")
    file = newer / "rank-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    lines, error = told_of(run)
    assert lines[0].startswith(f"{newer} is damaged: {file.name} has the checksum xxh3_128:") and lines[1] == whole
    assert error == f"{run}: 1 of 2 checkpoints is damaged, see the lines above"
    (newer / "manifest.json").unlink()
    lines, error = told_of(newer)
    assert lines == [f"{newer} is damaged: {newer}/manifest.json is missing: {newer} is not a complete checkpoint"]
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path != newer / "manifest.json"]


def test_a_checkpoint_that_this_user_may_not_read_is_not_called_damaged(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    folder = saved(run / "checkpoints", step=10)

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dist_lora.checkpoint.read.checksum_of", denied)
    with pytest.raises(CheckpointError, match=f"{folder}/rank-.* can't be read by this user") as caught:
        verify_checkpoints(run, report=lambda line: None)
    assert exit_code_of(caught.value) == 2


def test_a_folder_without_a_checkpoint_has_nothing_to_verify(tmp_path: Path) -> None:
    expected = f"{tmp_path} holds no checkpoint. Give a run's folder, its checkpoints folder, or a folder step-########"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        verify_checkpoints(tmp_path, report=print)
