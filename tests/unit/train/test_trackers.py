"""One run in each tracker through all starts, with the options that the config gives it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dist_lora.run_folder.attempt import begin_attempt
from dist_lora.train.trackers import start_tracker


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What fakes of wandb and mlflow are asked to do."""
    asked: list[tuple[str, Any]] = []
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.init = lambda **given: asked.append(("wandb", given))
    wandb.config = SimpleNamespace(update=lambda values, **given: asked.append(("settings", values)))

    def start_run(**given: Any) -> Any:
        asked.append(("mlflow", given))
        return SimpleNamespace(info=SimpleNamespace(run_id=given["run_id"] or "chosen-by-the-server"))

    mlflow.start_run = start_run
    mlflow.search_experiments = lambda **given: [SimpleNamespace(experiment_id=7)]
    mlflow.log_params = lambda values: asked.append(("settings", values))
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
    for module in (wandb, mlflow):
        module.__spec__ = ModuleSpec(module.__name__, None)  # accelerate asks whether they are installed
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def start(name: str, folder: Path, **options: Any) -> None:
    start_tracker(name, folder, {"lora.rank": 4}, options=options, first_step=1)


def test_wandb_goes_on_with_the_same_run_and_has_its_options(calls, tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    start("wandb", folder)
    start("wandb", folder, project="llama", entity="team", group="a", tags=["x", "y"])
    first, second = (given for name, given in calls if name == "wandb")
    assert first == {"project": "my-run", "name": "my-run", "id": first["id"], "resume": "allow"}
    more = {"entity": "team", "group": "a", "tags": ["x", "y"]}
    assert second == {"project": "llama", "name": "my-run", "id": first["id"], "resume": "allow"} | more
    assert ("settings", {"lora.rank": 4}) in calls
    file = folder / "trackers.json"
    before = file.read_text()
    begin_attempt(
        folder, num_steps=3, is_new=True, began_s=1000.0, keeps_trackers=True
    )  # killed before its first checkpoint
    assert file.read_text() == before
    begin_attempt(folder, num_steps=3, is_new=True, began_s=1000.0)  # a run that starts over is another one there
    start("wandb", folder)
    assert calls[-2][1]["id"] != first["id"]


def test_mlflow_goes_on_with_the_run_that_its_server_has_named(calls, tmp_path: Path) -> None:
    start("mlflow", tmp_path)
    start("mlflow", tmp_path, experiment_name="llama", tags={"team": "x"})
    first, second = (given for name, given in calls if name == "mlflow")
    assert first["run_id"] is None and first["run_name"] == tmp_path.name
    assert second["run_id"] == "chosen-by-the-server" and second["tags"] == {"team": "x"}
    assert sum(name == "settings" for name, _ in calls) == 1, "MLflow refuses other parameters for a run that has some"
