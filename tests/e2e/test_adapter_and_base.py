"""An adapter knows its base, and every command that takes an adapter says what is wrong with one, by its keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_lora.base.attention import Documents
from dist_lora.base.index import hash_config, open_index
from dist_lora.chat.command import open_for_answers
from dist_lora.data.chat import encode_prompt, load_tokenizer
from dist_lora.lora.origin import facts_of, origin_of
from dist_lora.lora.run_facts import SetFacts
from dist_lora.world.world import World
from tests.e2e.conftest import learn

RECORDS = [{"prompt": f"{i}", "completion": f"{i}"} for i in range(8)]
KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def base(make_base) -> Path:
    return make_base()


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """The folder of a config whose run has trained two steps."""
    folder = tmp_path_factory.mktemp("trained")
    learn(folder, base, RECORDS, "train.steps=2", f"data.eval={folder}/data.jsonl")
    return folder


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy of the trained adapter, to be damaged."""
    return Path(shutil.copytree(trained / "runs" / "learnt" / "adapter", tmp_path / "adapter"))


def rewrite(adapter: Path, change: Change) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def set_rank(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))


DAMAGES = {
    "a key dropped": (lambda t: {k: v for k, v in t.items() if k != KEY}, f"missing: {KEY}"),
    "a key added": (
        lambda t: t | {"base_model.model.head.lora_A.weight": t[KEY].clone()},
        "unexpected, on none of Llama's linears: base_model.model.head.lora_A.weight",
    ),
    "a prefix renamed": (
        lambda t: {k.replace("base_model.model.model.layers.0", "base_model.model.layers.0"): v for k, v in t.items()},
        "unexpected, on none of Llama's linears: base_model.model.layers.0.mlp.down_proj.lora_A.weight",
    ),
    "another rank in the config": (None, "wrong rank: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has rank 16"),
}  # fmt: skip


def arguments(command: str, *, trained: Path, base: Path, adapter: Path) -> list[object]:
    """A command that takes the adapter; what it would make is beside it."""
    config, evaluated = trained / "config.yaml", f"data.eval={trained}/data.jsonl"
    return {
        "train": ["train", config, f"lora.start_from={adapter}", "run=anew", f"runs_dir={adapter.parent}/runs"],
        "eval": ["eval", config, evaluated, "--adapter", adapter],
        "generate": ["generate", adapter, "--prompt", "1", "--base", base, "--max-new-tokens", 2],
        "merge": ["merge", adapter, "--out", adapter.parent / "merged", "--base", base],
    }[command]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge"])
def test_a_damaged_adapter_is_told_by_its_keys_before_anything_is_loaded(
    here, trained, base, adapter, command, damage
) -> None:
    change, told = DAMAGES[damage]
    if change is None:
        set_rank(adapter)
    else:
        rewrite(adapter, change)
    code, out, err, _ = here(*arguments(command, trained=trained, base=base, adapter=adapter))
    assert (code, out) == (4, "")
    assert err.count("error:") == 1 and told in err, err
    assert "loaded base" not in err
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda k: k.replace("lora_B.weight", "lora_B.default.weight"), "keys with the adapter's name in them"),
        (lambda k: k.replace("base_model.model.model", "base_model.model"), "it is another model's adapter"),
        (lambda k: k.replace("model.layers.0.mlp.down_proj", "lm_head"), "adapters on the embeddings or the head"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge"])
def test_an_adapter_of_a_kind_that_is_not_supported_is_the_users_mistake(
    here, trained, base, adapter, command, change, told
) -> None:
    rewrite(adapter, lambda tensors: {change(name): tensor for name, tensor in tensors.items()})
    code, out, err, _ = here(*arguments(command, trained=trained, base=base, adapter=adapter))
    assert (code, out) == (2, "")
    assert err.count("error:") == 1 and told in err and "loaded base" not in err, err


@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge"])
def test_a_bit_that_is_turned_in_the_weights_is_told_before_anything_is_loaded(
    here, trained, base, adapter, command
) -> None:
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err, _ = here(*arguments(command, trained=trained, base=base, adapter=adapter))
    assert (code, out) == (4, "")
    assert err.count("error:") == 1 and f"{file} is damaged: its tensors have checksum xxh3_128:" in err, err
    assert "loaded base" not in err
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("lora.rank=8", "lora.rank: 8 in the config, 16 in the adapter"),
        ("lora.layers=[0]", "lora.layers: 0 in the config, 0-1 in the adapter"),
        ("lora.alpha=16", "lora.alpha: 16 in the config, 32 in the adapter"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_adapter_that_the_config_does_not_describe_is_told(
    here, trained, base, adapter, command, setting, told
) -> None:
    code, _, err, _ = here(*arguments(command, trained=trained, base=base, adapter=adapter), setting)
    assert code == 2 and told in err, err
    assert f"{adapter} is not the adapter that the config defines" in err
    assert "Leave these settings out, and they are taken from the adapter." in err
    assert "loaded base" not in err


def test_an_adapter_of_fewer_layers_is_told_what_it_lacks(here, trained, base, adapter) -> None:
    rewrite(adapter, lambda t: {k: v for k, v in t.items() if ".layers.0." in k})
    code, _, err, _ = here(*arguments("eval", trained=trained, base=base, adapter=adapter))
    assert code == 4
    assert "its config names 7 linears that it has no tensors for, model.layers.1.self_attn.q_proj, " in err
    assert "and 2 more. Copy it again; or it belongs to a model of fewer layers than 2." in err


def test_the_adapter_tells_which_base_it_is_of_and_where_that_lies_and_nothing_else_of_this_machine(
    trained, base, adapter
) -> None:
    origin = json.loads((adapter / "dist_lora.json").read_text())
    assert origin["base"] == {
        "name": base.name,
        "revision": None,
        "content_hash": open_index(base).content_hash(),
        "config_hash": hash_config(base),
    }
    assert origin["run"]["model"] == str(base.resolve()) and origin["run"]["quant"] == "none"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    for file in adapter.iterdir():
        assert str(trained).encode() not in file.read_bytes()


def test_a_copied_adapter_is_answered_as_it_was_trained_though_its_format_was_found_by_itself(here, adapter) -> None:
    """Its data were prompts and completions, which ``data.format: auto`` found; beside it lies nothing of its run."""
    assert origin_of(adapter).kinds == ("text",)
    (adapter.parent / "config.yaml").write_text(
        "model: {name: org/other, quant: nf4}\ndata: {train: a, format: messages}\n"
    )
    asked = ["generate", adapter, "--prompt", "3 + ", "--max-new-tokens", 8]
    code, answer, err, _ = here(*asked)
    assert code == 0, err
    assert answer == here(*asked, "--plain")[1]
    code, _, err, _ = here(*asked, "--system", "Be brief.")
    assert code == 2 and "plain text is continued here" in err


def test_peft_and_transformers_load_the_folder_alone_with_our_logits(adapter, tmp_path, monkeypatch) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    ours = open_for_answers(adapter, base=None, world=World.alone(torch.device("cpu")))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.get_vocab() == ours.base.tokenizer.get_vocab()
    assert tokenizer.chat_template == ours.base.tokenizer.chat_template is not None
    ids = torch.tensor(tokenizer.encode("3 + 4 = 7"))
    with torch.no_grad():
        logits = ours.model(
            ids, positions=torch.arange(len(ids)), attention=Documents((0, len(ids))), rows=torch.arange(len(ids))
        )
        torch.testing.assert_close(theirs(ids[None]).logits[0], logits, atol=1e-4, rtol=1e-4)


def test_template_tokenizer_and_quantization_of_the_run_go_with_the_adapter_and_the_merge(here, base, tmp_path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>{% endfor %}[assistant]")
    chats = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(8)
    ]
    run = learn(tmp_path, base, chats, "train.steps=2", "model.quant=nf4", f"data.chat_template={template}")
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "elsewhere"))
    gathered = tmp_path / "gathered"
    assert here("gather", run, "--out", gathered)[0] == 0
    template.unlink()
    shutil.rmtree(run)
    for folder in (adapter, gathered):
        trainee = open_for_answers(folder, base=None, world=World.alone(torch.device("cpu")))
        assert trainee.precision.fmt.name == "nf4"
        asked = encode_prompt([{"role": "user", "content": "1"}], tokenizer=trainee.base.tokenizer)
        assert trainee.base.tokenizer.decode(asked) == "<|begin_of_text|>[user]1<|eot_id|>[assistant]"
        assert origin_of(folder) == origin_of(adapter)
    code, _, err, _ = here("merge", adapter, "--out", tmp_path / "merged", "--quant", "nf4")
    assert code == 0, err
    merged = load_tokenizer(tmp_path / "merged", chat_template=None)
    assert merged.chat_template == trainee.base.tokenizer.chat_template


def test_the_card_tells_what_all_attempts_have_done_and_goes_with_gather_and_merge(here, base, tmp_path) -> None:
    settings = [f"data.eval={tmp_path}/data.jsonl", "eval.exact_match=true", "eval.max_new_tokens=2", "eval.every=1"]
    run = learn(tmp_path, base, RECORDS, "train.steps=1", *settings)
    code, _, err, _ = here("train", tmp_path / "config.yaml", "train.steps=2", *settings)
    assert code == 0 and "resumed" in err, err
    facts = facts_of(run / "adapter")
    lines, evaluations = (
        [json.loads(line) for line in (run / name).read_text().splitlines()] for name in ("metrics.jsonl", "evaluations.jsonl")
    )  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2] and evaluations[-1].pop("step") == 2
    assert (facts.tokens, facts.target_tokens) == tuple(
        sum(line[n] for line in lines) for n in ("tokens", "target_tokens")
    )
    assert (facts.step, facts.num_steps, facts.num_layers, facts.evaluated_step) == (2, 2, 2, 2)
    assert dict(facts.evaluation) == evaluations[-1] and "eval_exact_match" in facts.evaluation
    # The eight records are one sequence's documents each, and a step has all of them.
    assert (
        facts.train == SetFacts(("data.jsonl",), (), 8, lines[0]["tokens"], lines[0]["target_tokens"]) == facts.held_out
    )
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.license == "unknown" and f"| {evaluations[-1]['eval_loss']:.4g} |" in card.text
    gathered, merged = tmp_path / "gathered", tmp_path / "merged"
    told = json.loads(here("gather", run, "--out", gathered, "--json")[1])
    assert (told["folder"], told["pushed"]) == (str(gathered), None)
    assert {each["server"]: each["verdict"] for each in told["servers"]} == dict.fromkeys(
        ["vLLM", "TGI", "llama.cpp", "Ollama"], "yes"
    )
    assert facts_of(gathered) == facts
    code, out, err, _ = here("merge", gathered, "--out", merged)
    assert code == 0 and out.splitlines()[0].startswith(f"{merged}: 14 of the base's matrices changed"), err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["vLLM", "TGI", "llama.cpp", "Ollama"]
    assert "Ollama would load this" in err  # transformers 5 wrote the base's config.json, without rope_theta
    assert f"| {evaluations[-1]['eval_loss']:.4g} |" in ModelCard.load(merged / "README.md").text


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_another_base_of_the_same_shapes_is_a_warning_that_names_both(
    here, trained, make_base, adapter, command
) -> None:
    other = make_base(seed=1)
    there = json.loads((adapter / "dist_lora.json").read_text())["base"]["content_hash"]
    given = arguments(command, trained=trained, base=other, adapter=adapter)
    given += [f"model.name={other}", "train.steps=1"] if command != "generate" else []
    code, _, err, _ = here(*given)
    assert code == 0, err
    assert err.count("was trained on") == 1
    assert (
        f"{adapter} was trained on base, and {other} (base) differs from it: weights {there}, "
        f"here {open_index(other).content_hash()}. Its answers may be meaningless here." in err
    )


def test_its_own_base_is_no_warning_wherever_it_lies(here, trained, base, adapter, tmp_path) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    given = arguments("eval", trained=trained, base=base, adapter=adapter)
    assert "was trained on" not in here(*given, f"model.name={moved}")[2]
    code, out, err, _ = here(*arguments("merge", trained=trained, base=moved, adapter=adapter))
    assert code == 0 and "14 of the base's matrices changed" in out, err


def test_merging_refuses_another_base_unless_it_is_forced(here, trained, make_base, adapter) -> None:
    given = arguments("merge", trained=trained, base=make_base(seed=1), adapter=adapter)
    code, _, err, _ = here(*given)
    assert code == 2 and "was trained on base, and" in err and "differs from it (weights" in err
    assert not (adapter.parent / "merged").exists()
    assert here(*given, "--force")[0] == 0
    assert (adapter.parent / "merged" / "config.json").exists()


def test_eval_prints_the_bases_loss_beside_and_says_so_where_an_adapter_changes_nothing(
    here, trained, base, adapter
) -> None:
    given = arguments("eval", trained=trained, base=base, adapter=adapter)
    code, out, err, _ = here(*given, "--json")
    found = json.loads(out)
    assert code == 0 and found["loss"] < found["base_loss"] and "changes nothing" not in err
    alone = json.loads(here(*given[:-2], "--json")[1])
    assert alone["loss"] == found["base_loss"] and "base_loss" not in alone
    rewrite(adapter, lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()})
    code, out, err, _ = here(*given)
    assert code == 0
    said = dict(line.split(None, 1) for line in out.splitlines())
    assert said["loss"] == said["base_loss"]
    assert f"{adapter}: the loss equals the base's, bit for bit: this adapter changes nothing" in err


def test_training_starts_from_the_adapter_and_not_from_nothing(here, trained, base, adapter) -> None:
    first = {}
    for name, start in {"taken": f"lora.start_from={adapter}", "anew": "lora.start_from=null"}.items():
        given = [
            "train",
            trained / "config.yaml",
            start,
            f"run={name}",
            f"runs_dir={adapter.parent}/runs",
            "train.steps=1",
        ]
        code, _, err, _ = here(*given)
        assert code == 0, err
        first[name] = json.loads((adapter.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    # After two steps the third begins lower than the first.
    assert first["taken"] < first["anew"] - 0.1
