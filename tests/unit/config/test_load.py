"""Reading settings: every fault at once, where it is, what was found, what was expected, what to write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_lora.config.load import dump_config, json_schema, load_config
from dist_lora.config.schema import Config, DataSection, LoraSection, ModelSection
from dist_lora.errors import ConfigError
from tests import ROOT

SHORTEST = "run: a\nmodel: {name: 3.1-8b}\ndata: {train: t.jsonl}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    """The error's text, with the file's folder cut away."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


def complaint_about(tmp_path: Path, section: str, **settings: object) -> str:
    """The one fault that a section's settings have, without the file's name and line."""
    text = complaint(tmp_path, SHORTEST, *(f"{section}.{key}={json.dumps(v)}" for key, v in settings.items()))
    head, *faults = text.split("\n")
    assert head == "1 setting of c.yaml is wrong:"
    (fault,) = faults
    return fault.partition("(argument): ")[2]


def test_the_shortest_config_has_every_default(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, SHORTEST))
    assert config == Config(run="a", model=ModelSection(name="3.1-8b"), data=DataSection(train="t.jsonl"))
    assert config.runs_dir == Path("runs")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets, config.lora.layers) == (
        16,
        32.0,
        "all",
        "all",
    )
    assert (config.train.steps, config.train.epochs) == (None, 1.0)
    assert (config.optim.lr, config.checkpoint.resume, config.log.trackers) == (2e-4, "auto", ["tensorboard"])


def test_all_faults_come_in_one_error_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "run: a/b\n"
        "model: {name: 3.1-8b, quant: fp4}\n"
        "lora:\n"
        "  rank: 0\n"
        "  targets: [q_proj, v_porj]\n"
        "optim:\n"
        "  warmup_step: 3\n"
        "train:\n"
        "  steps: 10\n"
        "  epochs: 2\n"
        "  packing: 'yes'\n"
    )
    assert complaint(tmp_path, text, "train.step=10").split("\n") == [
        "9 settings of c.yaml are wrong:",
        "  c.yaml: data.train: is missing. Training data: a file (jsonl, json, csv, parquet, arrow), "
        "a folder of save_to_disk, a hub id, or a list of them, or of sets like {path: a.jsonl, weight: 0.7, format: text, "
        "columns: {text: story}}.",
        "  c.yaml:1: run: 'a/b' is not a valid run name: letters, digits, '.', '_' and '-' only "
        "(its parent folder is set by runs_dir)",
        "  c.yaml:2: model.quant: found 'fp4', expected none, nf4 or int8 (nearest: nf4)",
        "  c.yaml:4: lora.rank: found 0, expected a whole number of at least 1",
        "  c.yaml:5: lora.targets[1]: 'v_porj' is not a linear of Llama "
        "(q_proj k_proj v_proj o_proj gate_proj up_proj down_proj); did you mean v_proj?",
        "  c.yaml:7: optim.warmup_step: no such setting (nearest: warmup_steps)",
        "  c.yaml:10: train.epochs: found epochs 2 and steps 10, expected one of the two; "
        "remove one (or set it to null)",
        "  c.yaml:11: train.packing: found 'yes', expected true or false",
        "  train.step=10 (argument): no such setting (nearest: steps)",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lora.rank", True, "found true, expected a whole number of at least 1"),
        ("lora.rank", "16", "found '16', expected a whole number of at least 1"),
        ("lora.rank", 1.5, "found 1.5, expected a whole number of at least 1"),
        ("lora.alpha", True, "found true, expected a number above 0"),
        ("lora.alpha", 0, "found 0, expected a number above 0"),
        ("lora.dropout", 1, "found 1, expected a number of at least 0 and below 1"),
        ("lora.targets", [], "the list is empty, expected at least one"),
        ("lora.targets", ["q_proj", "q_proj"], "q_proj: named more than once"),
        (
            "lora.targets",
            "q_proj",
            "found 'q_proj', expected all or a list of q_proj k_proj v_proj o_proj gate_proj up_proj "
            "down_proj "
            "(a list: [q_proj])",
        ),
        ("lora.layers", [], "the list is empty, expected at least one"),
        ("lora.layers", [1, 1], "1: named more than once"),
        ("lora.layers", "15-8", "'15-8' runs backwards; write 8-15"),
        (
            "lora.layers",
            "8..15",
            "found '8..15', expected all, a range of layers like 8-15 or a list of whole numbers of at least 0",
        ),
        (
            "lora.layers",
            [-1],
            "found [-1], expected all, a range of layers like 8-15 or a list of whole numbers of at least 0",
        ),
        ("model.dtype", "fp16", "found 'fp16', expected auto, bf16 or fp32 (nearest: bf16)"),
        ("parallel.engine", "zero2", "found 'zero2', expected auto, fsdp2, zero3 or none (nearest: zero3)"),
        ("parallel.adapters", "split", "found 'split', expected auto, replicate or shard"),
        ("parallel.hang_timeout", "10m", "found '10m', expected a number above 0"),
        ("data.train", [], "the list is empty, expected at least one"),
        ("data.train", " ", "is empty"),
        (
            "data.eval",
            1.5,
            "found 1.5, expected a path, a fraction between 0 and 1, named sets like {gsm8k: FILE}, or null",
        ),
        ("data.eval", {}, "has no set, expected at least one, like {gsm8k: FILE}"),
        ("data.eval", {"a b": "x"}, "'a b' is not a valid name of a set: letters, digits, '.', '_' and '-' only"),
        (
            "data.eval",
            {"a": 0.5},
            "found {'a': 0.5}, expected a path, a fraction between 0 and 1, named sets like {gsm8k: FILE}, or null",
        ),
        ("optim.lr", "fast", "found 'fast', expected auto or a number above 0"),
        ("optim.lr", "Auto", "found 'Auto', expected auto or a number above 0 (nearest: auto)"),
        ("eval.command", "judge 'x", "\"judge 'x\" can't be split into words as a shell would: No closing quotation"),
        ("eval.patience", 0, "found 0, expected a whole number of at least 1 or null"),
        ("eval.answer", "a", "has no effect without eval.exact_match: set eval.exact_match to true, or remove it"),
        ("optim.max_grad_norm", 0, "found 0, expected a number above 0 or null"),
        ("checkpoint.resume", 5, "found 5, expected auto, never or a path"),
        ("checkpoint.keep_best", 1, "found 1, expected true or false"),
        (
            "train.activation_checkpointing",
            "on",
            "found 'on', expected auto, none, all, true, false or a whole number of at least 0 (nearest: all)",
        ),
        (
            "train.activation_checkpointing",
            -1,
            "found -1, expected auto, none, all, true, false or a whole number of at least 0",
        ),
        (
            "train.micro_batch",
            32,
            "found 32 sequences per micro-batch, more than the 16 of a step (train.global_batch); "
            "set train.micro_batch to 16 or less",
        ),
        (
            "log.trackers",
            "wandb",
            "found 'wandb', expected a list of tensorboard wandb mlflow trackio comet_ml aim clearml "
            "dvclive swanlab (a list: [wandb])",
        ),
        ("log.trackers", ["wandb", "wandb"], "wandb: named more than once"),
        (
            "model.name",
            31,
            'found 31, expected text (YAML doesn\'t read it as text: put it in quotes, "...")',
        ),
    ],
)
def test_a_wrong_value_says_what_was_found_and_what_is_expected(
    tmp_path: Path, setting: str, value: object, message: str
) -> None:
    section, _, name = setting.partition(".")
    assert complaint_about(tmp_path, section, **{name: value}) == message


@pytest.mark.parametrize("frozen", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_head_and_embeddings_are_refused_as_targets(tmp_path: Path, frozen: str) -> None:
    assert complaint(tmp_path, SHORTEST + f"lora: {{targets: [q_proj, {frozen}]}}\n").endswith(
        f"c.yaml:4: lora.targets[1]: {frozen!r} stays frozen: only the seven linears of a layer are adapted "
        "(q_proj k_proj v_proj o_proj gate_proj up_proj down_proj), never the embeddings or the head (where they are "
        "tied, both are one matrix, and an adapter on one would have to change the other); lora.train_tokens trains the "
        "rows of some tokens"
    )


def test_infinity_and_nan_are_no_numbers_here(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "optim: {lr: .inf, weight_decay: .nan}\n")
    assert "c.yaml:4: optim.lr: found inf, expected auto or a number above 0" in text
    assert "c.yaml:4: optim.weight_decay: found nan, expected a number of at least 0" in text


def test_settings_that_clash_are_told_though_another_of_their_section_is_wrong(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "train:\n  steps: 1\n  epochs: 1\n  micro_batch: 99\n  seed: x\n")
    assert text.startswith("3 settings")
    assert "c.yaml:6: train.epochs: found epochs 1 and steps 1, expected one of the two" in text
    assert "c.yaml:7: train.micro_batch: found 99 sequences per micro-batch, more than the 16 of a step" in text
    assert "c.yaml:8: train.seed: found 'x', expected a whole number of at least 0" in text


def test_a_wrong_setting_is_not_taken_for_its_default_when_settings_are_compared(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "train: {global_batch: many, micro_batch: 99}\n")
    assert text.startswith("1 setting") and "train.global_batch: found 'many'" in text


def test_only_the_setting_that_was_written_is_blamed(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "train:\n  global_batch: 1\n")
    assert "c.yaml:5: train.global_batch: found 2 sequences per micro-batch, more than the 1 of a step" in text


def test_an_unknown_section_and_a_setting_in_the_wrong_place_are_told_apart(tmp_path: Path) -> None:
    text = complaint(
        tmp_path, SHORTEST + "optm: {}\nlr: 1\nlora: {seed: 1}\nzzz: 1\neval: {zzz: 1}\nsequence_lenght: 4\n"
    )
    assert "c.yaml:4: optm: no such setting (nearest: optim)" in text
    assert "c.yaml:5: lr: no such setting (did you mean optim.lr?)" in text
    assert "c.yaml:6: lora.seed: no such setting (did you mean train.seed?)" in text
    assert "c.yaml:7: zzz: no such setting (there are run, runs_dir, model, lora, data, train" in text
    assert (
        "c.yaml:8: eval.zzz: no such setting (eval has every, at_start, patience, best_set, exact_match, tool_calls, "
        in text
    )
    assert "c.yaml:9: sequence_lenght: no such setting (nearest: train.sequence_length)" in text


def test_a_key_given_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "optim:\n  lr: 1e-4\n  lr: 2e-4\nrun: b\n")
    assert "c.yaml:6: optim.lr: set twice (first in line 5)" in text
    assert "c.yaml:7: run: set twice (first in line 1)" in text
    text = complaint(tmp_path, SHORTEST, "optim={lr: 1, lr: 2}")
    assert "optim={lr: 1, lr: 2} (argument): lr: set twice" in text


def test_a_section_that_is_no_mapping_says_what_belongs_there(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "lora: 16\n", "lora.rank=8")
    assert text.split("\n")[1] == "  lora.rank=8 (argument): no such setting: lora is not a section"
    assert text.split("\n")[2] == (
        "  c.yaml:4: lora: found 16, expected settings, like lora: {...} with rank, alpha, scaling, ranks, "
        "alphas, dropout, targets, layers, modules, train_tokens, start_from"
    )


def test_keys_that_yaml_reads_as_something_else_are_unknown_settings(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "on: 1\nlora: {1: 2}\n")
    assert "True: no such setting" in text
    assert "c.yaml:5: lora.1: no such setting (lora has rank" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: has no settings; expected at least run, model.name and data.train"),
        ("# nothing\n", "c.yaml: has no settings; expected at least run, model.name and data.train"),
        ("- a\n- b\n", "c.yaml: found ['a', 'b'], expected settings with names, like"),
        ("just words\n", "c.yaml: found 'just words', expected settings with names, like"),
        ("run: a\nlora: [1\n", "c.yaml:3: not YAML: while parsing a flow sequence"),
        ("run: a\n\tlora: 1\n", "c.yaml:2: not YAML: "),
        ("run: a\n---\nrun: b\n", "c.yaml:2: not YAML: expected a single document"),
        (
            "run: !!python/object/apply:os.system [ls]\n",
            "c.yaml:1: not YAML: could not determine a constructor",
        ),
        ("run: 2024-13-45\n", "c.yaml: not YAML: month must be in 1..12"),
        ("run: \x00\n", "c.yaml: not YAML: unacceptable character"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text).startswith(message)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: no such file\. Give the path of a YAML file"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory; expected a YAML file"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match=r"b\.yaml: not text in UTF-8 \(byte 5\)"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "0.0001", "1.0e-4", "+1e-4", ".1e-3"])
def test_every_spelling_of_a_small_number_is_a_number(tmp_path: Path, number: str) -> None:
    assert load_config(written(tmp_path, SHORTEST + f"optim: {{lr: {number}}}\n")).optim.lr == 1e-4
    assert load_config(written(tmp_path, SHORTEST), overrides=[f"optim.lr={number}"]).optim.lr == 1e-4


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SHORTEST + "optim:\n")) == load_config(written(tmp_path, SHORTEST))


def test_anchors_and_merges_work_and_faults_in_them_have_their_line(tmp_path: Path) -> None:
    shared = "run: a\nmodel: {name: x/y}\ndata: {train: t}\nlora: &l\n  rank: 4\n"
    assert load_config(written(tmp_path, shared)).lora.rank == 4
    text = complaint(tmp_path, "run: a\nmodel: &m\n  name: 3.1-8b\n  every: x\ndata: {train: t}\neval:\n  <<: *m\n")
    assert "c.yaml:4: eval.every: found 'x', expected a whole number of at least 1" in text
    assert "c.yaml:3: eval.name: no such setting (did you mean model.name?)" in text


def test_a_setting_that_contains_itself_is_told_not_followed(tmp_path: Path) -> None:
    assert "lora.rank: found {'rank': {...}}, expected" in complaint(tmp_path, SHORTEST + "lora: &a {rank: *a}\n")


def test_arguments_stand_over_the_file_and_the_last_wins(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, SHORTEST + "optim: {lr: 1}\n"),
        overrides=["optim.lr=2", "optim.lr=3e-4", "lora.targets=[q_proj,v_proj]", "data.eval=", "run=b"],
    )
    assert (config.optim.lr, config.lora.targets, config.data.eval, config.run) == (
        3e-4,
        ["q_proj", "v_proj"],
        None,
        "b",
    )


def test_an_argument_mends_a_fault_of_the_file(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SHORTEST + "lora: {rank: x}\n"), overrides=["lora.rank=8"]).lora.rank == 8


@pytest.mark.parametrize(("given_key", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_steps_as_an_argument_take_the_place_of_the_files_epochs(tmp_path: Path, given_key: str, other: str) -> None:
    path = written(tmp_path, SHORTEST + f"train: {{{other}: 3}}\n")
    train = load_config(path, overrides=[f"train.{given_key}=7"]).train
    assert (getattr(train, given_key), getattr(train, other)) == (7, None)
    both = complaint(tmp_path, SHORTEST, "train.steps=7", "train.epochs=1")
    assert "train.epochs=1 (argument): found epochs 1 and steps 7, expected one of the two" in both


@pytest.mark.parametrize("argument", ["--train.steps=1", "train.steps", "=1", "train..steps=1"])
def test_an_argument_of_another_form_says_the_form(tmp_path: Path, argument: str) -> None:
    text = complaint(tmp_path, SHORTEST, argument)
    assert text.split("\n")[1] == f"  {argument} (argument): expected setting=value, like train.steps=10"


def test_an_argument_that_is_not_yaml_is_told_with_the_others(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST, "lora.targets=[q_proj", "model.nam=x", "optim={lr: x}")
    assert text.startswith("3 settings of c.yaml are wrong:")
    assert "lora.targets=[q_proj (argument): not YAML: while parsing a flow sequence" in text
    assert "model.nam=x (argument): no such setting (nearest: name)" in text
    assert "optim={lr: x} (argument): optim.lr: found 'x', expected auto or a number above 0" in text


def test_an_argument_below_a_setting_is_told_not_dropped(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "lora: {rank: 8}\n", "lora.rank.x=1", "run.x=1")
    assert "lora.rank.x=1 (argument): no such setting: lora.rank is not a section" in text
    assert "run.x=1 (argument): no such setting: run is not a section" in text


def test_paths_are_kept_as_typed(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, SHORTEST), overrides=["checkpoint.resume=runs/a", "data.train=../t.csv"])
    assert (config.checkpoint.resume, config.data.train) == (Path("runs/a"), "../t.csv")


@settings(deadline=None)
@given(
    run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    name=st.one_of(
        st.sampled_from(["1e5", "on", "null", "2024-01-01", "0x10", "a: b", "é#", "3.1"]),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    ),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    resume=st.sampled_from(["auto", "never", Path("auto"), Path("runs/x"), Path("/a b")]),
    layers=st.sampled_from(["all", "0-3", [3, 1]]),
    evaluated=st.one_of(st.none(), st.just("e.jsonl"), st.floats(min_value=0.01, max_value=0.99)),
    train=st.sampled_from([{}, {"steps": 3}, {"epochs": 0.5}, {"activation_checkpointing": False}]),
)
@example(run="r", name="0\x85", lr=1.0, resume="auto", layers="all", evaluated=None, train={})
@example(run="r", name="a\u2028b\nc", lr=1.0, resume="auto", layers="all", evaluated=None, train={})
def test_a_dumped_config_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory,
    run: str,
    name: str,
    lr: float,
    resume: str | Path,
    layers: object,
    evaluated: object,
    train: dict[str, object],
) -> None:
    if not name.strip():
        name = "x"
    settings = {
        "run": run,
        "model": {"name": name},
        "data": {"train": [name], "eval": evaluated},
        "optim": {"lr": lr},
        "lora": {"layers": layers, "start_from": Path("1e5")},
        "checkpoint": {"resume": resume},
        "train": train,
    }
    config = Config.model_validate(settings)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_targets_are_in_canonical_order_and_layers_ascend() -> None:
    section = LoraSection(targets=["down_proj", "q_proj"], layers=[3, 0])
    assert section.target_names() == ("q_proj", "down_proj")
    assert section.layer_indices(4) == (0, 3)
    assert LoraSection(layers="1-3").layer_indices(4) == (1, 2, 3)
    assert LoraSection().layer_indices(3) == (0, 1, 2)
    assert len(LoraSection().target_names()) == 7


def module(name: str = "model.layers.1.self_attn.q_proj", **changes: object) -> dict[str, object]:
    return {"name": name, "rank": 4, "alpha": 8.0, **changes}


@pytest.mark.parametrize("lora", ["null", "{modules: []}"])
def test_a_run_without_adapters_trains_something_else(tmp_path: Path, lora: str) -> None:
    told = "there is no adapter (lora is null), and train.unfreeze unfreezes nothing: nothing is trained"
    assert told in complaint(tmp_path, SHORTEST + f"lora: {lora}\n")
    (tmp_path / "c.yaml").write_text(SHORTEST + f"lora: {lora}\ntrain: {{unfreeze: {{norms: true}}}}\n")
    assert load_config(tmp_path / "c.yaml").lora.modules == []
    assert "train.unfreeze: unfreezes nothing" in complaint(tmp_path, SHORTEST + "train: {unfreeze: {}}\n")


def test_a_section_of_lora_that_is_only_commented_out_has_its_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, SHORTEST + "lora:\n  # rank: 8\n")).lora.rank == 16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"modules": [module(), module()]}, "model.layers.1.self_attn.q_proj: named more than once"),
        ({"modules": [module("q_proj")]}, "expected a list of linears like {name: model.layers.0.self_attn.q_proj, rank: 8, alpha: 16}, or null"),
        ({"modules": [module(rank=0)]}, "expected a list of linears like {name:"),
        ({"modules": [{"name": "model.layers.1.self_attn.q_proj"}]}, "expected a list of linears like {name:"),
        ({"modules": [module()], "targets": ["v_proj"]}, "lora.modules names q_proj: leave lora.targets out, or name the same"),
        ({"modules": [module()], "layers": "1-9999999999"}, "lora.modules names layers 1: leave lora.layers out, or name the same"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_are_told(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    assert told in complaint_about(tmp_path, "lora", **settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "b: without a weight, and other sets have one"),
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "b: without a weight"),
        ({"train": [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]}, "all weights are 0, expected at least one above 0"),
        ({"train": [{"path": "a"}, "a"]}, "a: named more than once"),
        (
            {"train": ["b", {"weight": -1, "wieght": 2, "format": "txt", "columns": {"text": 1}}]},
            "data.train[1]: wieght: no such setting of a set (nearest: weight); path is None; expected a file, a folder or a hub id; "
            "weight is -1; expected a number of at least 0, like 0.7; format is 'txt'; expected one of auto, messages, alpaca, "
            "prompt-completion, text, tokens, guard; columns is {'text': 1}; expected our names with yours",
        ),
        ({"train": 3}, "found 3, expected a path, a list of paths, or a list of sets like {path: a.jsonl, weight: 0.7"),
        ({"train": "a", "columns": {}}, "{}; expected our names with yours, like {prompt: question"),
        ({"train": "a", "mix": "target_tokens"}, "has no effect, since no set of data.train has a weight"),
    ],
)  # fmt: skip
def test_sets_that_make_no_mixture_are_told(tmp_path: Path, settings: dict[str, object], told: str) -> None:
    assert told in complaint_about(tmp_path, "data", **settings)


def test_a_set_can_have_none_of_the_columns_that_hold_for_the_others() -> None:
    sets = [{"path": "a", "columns": {}}, {"path": "b"}, {"path": "c", "columns": {"text": "body"}}]
    section = DataSection.model_validate({"train": sets, "columns": {"text": "story"}})
    assert [one.columns for one in section.train_sets()] == [{}, {"text": "story"}, {"text": "body"}]


def test_modules_stand_for_targets_layers_and_ranks() -> None:
    section = LoraSection.model_validate({"modules": [module(), module("model.layers.3.mlp.up_proj", rank=2)]})
    assert (section.target_names(), section.layer_indices(4)) == (("q_proj", "up_proj"), (1, 3))
    assert (section.all_ranks(), section.all_alphas(), section.all_scales()) == ((2, 4), (8,), (2, 4))
    with pytest.raises(ConfigError, match=r"lora\.layers: found layer 3 in lora\.modules, expected 0-2"):
        section.layer_indices(3)


@pytest.mark.parametrize(("layers", "found"), [([0, 99], "99"), ("8-16", "8-16"), ([16, 17], "16, 17")])
def test_layers_that_the_model_lacks_are_named_with_the_range(layers: object, found: str) -> None:
    section = LoraSection.model_validate({"layers": layers})
    with pytest.raises(ConfigError) as caught:
        section.layer_indices(16)
    assert str(caught.value) == f"lora.layers: found {found}, expected 0-15 (the model has 16 layers)"


def test_the_stored_json_schema_is_current() -> None:
    stored = json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8"))
    assert stored == json_schema(), "run: python -m dist_lora.config.load > configs/schema.json"


def test_the_command_that_rewrites_the_schema_prints_it() -> None:
    command = [sys.executable, "-m", "dist_lora.config.load"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == json_schema()


def test_every_setting_of_the_schema_has_a_description_of_one_line() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, setting in section["properties"].items():
            if "$ref" in setting:
                setting = schema["$defs"][setting["$ref"].rpartition("/")[2]]
            assert setting.get("description") and "\n" not in setting["description"], name


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, dist_lora.config.load, dist_lora.herd.shape;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"], ids=("NUL", "an unpaired surrogate"))
def test_a_config_with_a_text_that_no_file_can_hold_can_not_be_built(name: str) -> None:
    with pytest.raises(ValueError, match="contains NUL or an unpaired surrogate"):
        Config.model_validate({"run": "r", "model": {"name": name}, "data": {"train": "x"}})


@pytest.mark.parametrize(
    "quant, meant",
    [("int4", "nf4"), ("INT4", "nf4"), ("4bit", "nf4"), ("4-bit", "nf4"), ("load_in_4bit", "nf4"), ("qlora", "nf4"),
     ("8bit", "int8"), ("load_in_8bit", "int8"), ("llm.int8", "int8")],
)  # fmt: skip
def test_a_quantization_by_another_name_is_told_ours(tmp_path: Path, quant: str, meant: str) -> None:
    assert complaint_about(tmp_path, "model", quant=quant).endswith(f"expected none, nf4 or int8 (nearest: {meant})")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"wandb": {"team": "x"}}, "wandb.team: no such option; wandb takes project, entity, group, tags"),
        ({"wandb": {"projct": "x"}}, "wandb.projct: no such option (nearest: project)"),
        ({"wandb": {"id": "x"}}, "wandb.id: no such option"),
        ({"wandb": {"tags": "x"}}, "wandb.tags: found 'x', expected a list, like [nlp, test]"),
        ({"wandb": {"notes": [[1]]}}, "wandb.notes: expected a text, a number, true or false, or a list of them"),
        ({"wanbd": {}}, "'wanbd' is not a tracker (nearest: wandb)"),
        ({"mlflow": {"run_name": "x"}}, "has options of mlflow, which log.trackers doesn't name; set log.trackers to "
                                        "[wandb, mlflow], or remove them"),
        ({"wandb": "x"}, "expected options by tracker, like {wandb: {project: llama"),
    ],
)  # fmt: skip
def test_options_of_trackers_are_checked(tmp_path: Path, options: object, told: str) -> None:
    complaint = complaint_about(tmp_path, "log", trackers=["wandb"], tracker_options=options)
    assert told in complaint


def test_an_expression_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    text = complaint(tmp_path, SHORTEST + "eval: {exact_match: true, answer: '([0-9]+'}\n")
    assert "c.yaml:4: eval.answer: '([0-9]+' is not a regular expression of Python: missing ), unterminated" in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("eval: {patience: 2}\n", ["c.yaml:4: eval.patience: counts evaluations of data.eval, which isn't set"]),
        ("eval: {best_set: a}\n", ["c.yaml:4: eval.best_set: found 'a', and data.eval has no named sets"]),
        (
            "eval: {\n  patience: 2,\n  best_set: a}\n",
            ["2 settings", "c.yaml:5: eval.patience: counts", "c.yaml:6: eval.best_set: found 'a'"],
        ),
    ],
)
def test_what_contradicts_another_section_is_told_with_its_line(tmp_path: Path, settings: str, told: list[str]) -> None:
    text = complaint(tmp_path, SHORTEST + settings)
    assert all(each in text for each in told), text
    valid = SHORTEST.replace("{train: t.jsonl}", "{train: t.jsonl, eval: {a: a.jsonl, b: b.jsonl}}")
    assert load_config(written(tmp_path, valid + settings)).data.eval_files() == {"a": "a.jsonl", "b": "b.jsonl"}


def test_a_fault_in_a_list_that_an_argument_made_longer_than_the_files_is_told(tmp_path: Path) -> None:
    text = SHORTEST.replace("{train: t.jsonl}", "{train: [t.jsonl]}")
    told = complaint(tmp_path, text, "data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: -1}]")
    assert (
        "data.train=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: -1}] (argument): data.train[1]: weight is -1"
        in told
    )


def test_paths_may_begin_with_a_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(written(tmp_path, SHORTEST), overrides=["runs_dir=~/runs", "data.cache_dir=~/cache"])
    assert config.runs_dir == tmp_path / "runs"
    assert config.data.cache_dir == Path("~/cache"), "each node may have a home of its own"
    assert "runs_dir=~nobody-here/x (argument): is ~nobody-here/x:" in complaint(
        tmp_path, SHORTEST, "runs_dir=~nobody-here/x"
    )


def test_named_sets_are_read_back_and_one_of_them_may_be_replaced(tmp_path: Path) -> None:
    overrides = ["data.eval={a: a.jsonl, b: b.jsonl}", "data.eval.b=c.jsonl", "eval.best_set=b", "optim.lr=auto"]
    config = load_config(written(tmp_path, SHORTEST), overrides=overrides)
    assert config.data.eval_files() == {"a": "a.jsonl", "b": "c.jsonl"} and config.optim.lr == "auto"
    assert load_config(written(tmp_path, dump_config(config))) == config
