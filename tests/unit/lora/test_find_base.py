"""What an adapter's own folder says of its run, and the base that is loaded with it: nothing beside the folder is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lora.errors import AdapterError, ConfigError
from dist_lora.lora.adapter_writer import write_adapter
from dist_lora.lora.find_base import base_name
from dist_lora.lora.origin import BaseIdentity, RunOrigin, origin_of, own_checksum

RUN = RunOrigin("/models/x", None, "nf4", ("chat",), "{{ messages }}", "xxh3_128:0", "xxh3_128:1")


def written(folder: Path, run: RunOrigin | None, *, base: str | None = "org/x") -> Path:
    module = "model.layers.0.mlp.up_proj"
    tensors = {f"{module}.lora_A": torch.ones(2, 4), f"{module}.lora_B": torch.ones(4, 2)}
    write_adapter(
        folder, tensors=tensors, rank=2, alpha=4, dropout=0.0, targets=["up_proj"], base=BaseIdentity(base), run=run
    )
    return folder


def test_what_its_run_decided_is_in_the_folder_and_a_config_beside_it_is_not_believed(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: org/other, quant: int8}\ndata: {train: a, format: text}\n")
    assert origin_of(written(tmp_path / "a", RUN)) == RUN
    assert origin_of(written(tmp_path / "b", None)) == origin_of(tmp_path / "none") == RunOrigin()
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("/models/x", None)


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "int3"},
        {"kinds": "chat"},
        {"kinds": [1]},
        {"model": 7},
        {"chat_template": ["a"]},
        {"guard_categories": [["a"]]},
    ],
    ids=str,
)
def test_a_damaged_origin_is_refused(tmp_path, change: dict[str, Any]) -> None:
    file = written(tmp_path / "a", RUN) / "dist_lora.json"
    origin = json.loads(file.read_text())
    origin.pop("checksum")
    origin["run"] |= change
    file.write_text(json.dumps(origin | {"checksum": own_checksum(origin)}))
    with pytest.raises(
        AdapterError,
        match=rf"dist_lora.json: run: {next(iter(change))}.*: .*. The file is damaged",
    ):
        origin_of(tmp_path / "a")
    del origin["run"]["kinds"]
    file.write_text(json.dumps(origin | {"checksum": own_checksum(origin)}))
    with pytest.raises(
        AdapterError, match=r"run: found .*, expected kinds and what else a run records. The file is damaged"
    ):
        origin_of(tmp_path / "a")
    file.write_text(json.dumps(origin | {"checksum": "xxh3_128:0"}))
    with pytest.raises(AdapterError, match="doesn't match its own checksum"):
        origin_of(tmp_path / "a")


def test_the_base_is_the_one_that_is_named_else_the_runs_else_the_identitys(tmp_path) -> None:
    here = tmp_path / "model"
    here.mkdir()
    adapter = written(tmp_path / "a", RunOrigin(str(here)))
    assert base_name(adapter, "org/y") == "org/y" and base_name(adapter, None) == str(here)
    here.rmdir()
    with pytest.raises(
        ConfigError, match=f"was trained on the model in {here}, which isn't here; name where it is now"
    ):
        base_name(adapter, None)
    assert base_name(written(tmp_path / "b", None), None) == "org/x"
    with pytest.raises(ConfigError, match="doesn't say which model it was trained on"):
        base_name(written(tmp_path / "c", None, base=None), None)
    config = tmp_path / "c" / "adapter_config.json"
    (tmp_path / "c" / "dist_lora.json").unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}))
    with pytest.raises(ConfigError, match="doesn't say which model it was trained on"):
        base_name(tmp_path / "c", None)


@pytest.mark.parametrize(
    "template", ["{{ a }}", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ a }}"}]]
)
def test_a_template_of_another_trainers_tokenizer_is_the_adapters(tmp_path, template: object) -> None:
    folder = written(tmp_path / "a", None)
    (folder / "dist_lora.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert origin_of(folder).chat_template == "{{ a }}"
    (folder / "chat_template.jinja").write_text("{{ b }}")
    assert origin_of(folder).chat_template == "{{ b }}"
