"""Files of every kind with anything in them: a clean load or one of our errors, and nothing else.

The targets are those of tests/fuzz, which a coverage-guided fuzzer takes too (``python -m tests.fuzz.run``). What it and
these tests once found is kept below as cases.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lora.config.schema import Config
from dist_lora.errors import DistLoraError
from tests.fuzz.targets import CHAT, CONFIG, RECORDS, SPLIT, TARGETS, Ground, make_ground, mend

# The same examples at every run; the fuzzer is what looks for new ones.
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = [
    "..",
    "/etc/passwd",
    "\0",
    "\ud800",
    "model.layers.999999.mlp.up_proj.lora_A",
    "F32",
    "q_proj",
    "1e999",
    "x" * 5000,
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*WORDS, 10**15, 10**400, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OF_JSON = ["manifest", "rank_file", "base_header", "base_index", "nf4_state", "model_config", "adapter_config",
           "learned", "adapter_header", "tokenizer_config", "tokenizer_file", "record"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return make_ground(tmp_path_factory.mktemp("ground") / "ground")


@pytest.fixture
def ground(made: Ground) -> Ground:
    """All files sound."""
    mend(made)
    return made


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested JSON."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def edited(value: Any, data: st.DataObject) -> Any:
    """``value`` with some parts replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        where = places(value)
        if not where:
            return value
        container, key = data.draw(st.sampled_from(where))
        what = data.draw(st.sampled_from(["replace", "replace", "remove", "double", "nest"]))
        if what == "remove":
            del container[key]
        elif what == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif what == "nest":
            container[key] = [container[key]]
        else:
            container[key] = data.draw(JSON)
    return value


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_sound_loads(ground: Ground, name: str) -> None:
    seed = TARGETS[name].seeds(ground)[0]
    assert TARGETS[name].outcome(ground, seed) is None


@pytest.mark.parametrize("name", OF_JSON)
@FUZZ
@given(data=st.data())
def test_json_of_another_form_is_a_clean_load_or_our_error(ground: Ground, name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(TARGETS[name].seeds(ground)))
    if seed.startswith(SPLIT):
        return
    parts = seed.split(SPLIT)
    number = data.draw(st.integers(0, len(parts) - 1))
    parts[number] = json.dumps(edited(json.loads(parts[number]), data)).encode()
    TARGETS[name].outcome(ground, SPLIT.join(parts))


@pytest.mark.parametrize("name", TARGETS)
@FUZZ
@given(data=st.data())
def test_turned_bytes_are_a_clean_load_or_our_error(ground: Ground, name: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(TARGETS[name].seeds(ground))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        until = data.draw(st.sampled_from([at, at + 1, at + 8, len(content)]))
        content[at:until] = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b"[" * 2000, b"9" * 5000, b"null", b"\xff", b'"', b"{{", b"%}", b"*a"])
        )
    TARGETS[name].outcome(ground, bytes(content))


SETTINGS = [
    f"{section}.{name}" if hasattr(field.annotation, "model_fields") else section
    for section, field in Config.model_fields.items()
    for name in getattr(field.annotation, "model_fields", [section])
]


@FUZZ
@given(
    tree=st.dictionaries(st.sampled_from([*SETTINGS, *Config.model_fields, "lora.rnak", "odd"]), JSON, max_size=6),
    overrides=st.lists(st.tuples(st.sampled_from([*SETTINGS, "lora.x.y", ""]), JSON | st.text()), max_size=3),
)
def test_settings_of_any_type_are_a_config_or_our_error(ground: Ground, tree: dict[str, Any], overrides: list) -> None:
    content = yaml.safe_load(CONFIG)
    for name, value in tree.items():
        section, _, setting = name.partition(".")
        if setting and isinstance(content.get(section), dict):
            content[section][setting] = value
        else:
            content[section] = value
    arguments = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in overrides]
    told = [argument.encode(errors="surrogatepass").replace(SPLIT, b"") for argument in arguments]
    TARGETS["config"].outcome(ground, SPLIT.join([json.dumps(content).encode(), *told]))


@FUZZ
@given(messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]),
                         "content": JSON | st.text() | st.sampled_from(["<|eot_id|>", "<|start_header_id|>"])},
                         optional={"tool_calls": JSON, "weight": JSON, "train": JSON, "from": JSON, "value": JSON}),
                         max_size=4), tools=JSON)  # fmt: skip
def test_messages_of_any_content_are_encoded_or_our_error(ground: Ground, messages: list, tools: Any) -> None:
    record = {"messages": messages} | ({} if tools is None else {"tools": tools})
    TARGETS["record"].outcome(ground, json.dumps(record).encode())


# Found once, by the fuzzer, by the tests above or by reading; each is our error now, and says what is wrong.


def of(name: str, **changes: Any) -> Any:
    """A sound file of a target with these keys changed."""
    return lambda ground: json.dumps(json.loads(TARGETS[name].seeds(ground)[0].split(SPLIT)[0]) | changes).encode()


def header(name: str, tensor: str = "w", **entry: Any) -> Any:
    """A header of one tensor of 512 bytes, in a file that is as long as it says."""
    whole = {"dtype": "F32", "shape": [2, 64], "data_offsets": [0, 512]} | entry

    def make(ground: Ground) -> bytes:
        text = json.dumps({tensor: whole}).encode()
        return SPLIT + len(text).to_bytes(8, "little") + text + bytes(512)

    return make


ROPE = {"rope_type": "llama3", "factor": 10**400, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192}  # fmt: skip
LAYER = "base_model.model.model.layers.99999999999.self_attn.q_proj.lora_A.weight"
PRIVATE = "".join(map(chr, range(0xE000, 0xF8FF)))
ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(20))

CASES = {
    "a config of nested lists": ("config", b"lora: " + b"[" * 5000, "not YAML: nested too deeply"),
    "aliases of aliases": ("config", ALIASES.encode(), "more than 10,000 values with its aliases expanded"),
    "a rank of 7,000 digits": ("config", CONFIG.replace("rank: 16", "rank: 0x" + "f" * 6000).encode(), "a number of more than 64 bits"),
    "a folder with NUL": ("config", CONFIG.encode() + b'runs_dir: "a\\0b"\n', "a text with NUL or an unpaired surrogate"),
    "a folder with half a character": ("config", CONFIG.encode() + b'runs_dir: "a\\ud800b"\n', "a text with NUL or an unpaired"),
    "a config of a megabyte": ("config", b"#" * (2**20 + 1), "is longer than 1,048,576 bytes; expected a YAML file"),
    "an argument that is no UTF-8": ("config", SPLIT.join([CONFIG.encode(), b"lora\xd2.k=4"]), "(argument): not text in UTF-8"),
    "an argument of nested lists": ("config", SPLIT.join([CONFIG.encode(), b"lora.rank=" + b"[" * 5000]), "nested too deeply"),
    "ten to the 15 layers": ("model_config", of("model_config", num_hidden_layers=10**15), "expected at most 1,000"),
    "a vocabulary of a terabyte": ("model_config", of("model_config", vocab_size=2**40), "expected at most 2,147,483,648"),
    "architectures that are a number": ("model_config", of("model_config", architectures=7), "architectures: found 7"),
    "a factor beyond floats": ("model_config", of("model_config", rope_parameters=ROPE), "rope factor: found 1000"),
    "a nested config.json": ("model_config", b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    "a config.json of a megabyte": ("model_config", b" " * (2**20 + 1), "longer than 1,048,576 bytes"),
    "an adapter on a far layer": ("adapter_header", header("adapter_header", LAYER), f"unexpected, on none of Llama's linears: {LAYER}"),
    "a size of 4,000 digits": ("adapter_header", header("adapter_header", shape=[int("9" * 4000)] * 3), "in its header is invalid"),
    "a base's size of 4,000 digits": ("base_header", header("base_header", shape=[int("9" * 4000)] * 3), "in its header is invalid"),
    "more dims than torch has": ("base_header", header("base_header", shape=[1] * 65), "in its header is invalid"),
    "a file's name of 5,000 letters": (
        "base_index", json.dumps({"weight_map": {"w": "x" * 5000 + ".safetensors"}}).encode(), "lacks 1 of the 1 file"),
    "layers of mixed types": ("adapter_config", of("adapter_config", layers_to_transform=["a", 1]), "a list of layer numbers"),
    "an alpha of nothing": ("adapter_config", of("adapter_config", lora_alpha=0), "a number above 0 and one from 0 to 1"),
    "an alpha beyond floats": ("adapter_config", of("adapter_config", lora_alpha=10**400), "a number above 0"),
    "a base whose name is a number": (
        "adapter_config",
        lambda ground: TARGETS["adapter_config"].seeds(ground)[0].split(SPLIT)[0] + SPLIT + b'{"format": 1, "base": {"name": 7}}',
        "dist_lora.json: base: found [7, None, None, None], expected strings or null"),
    "a tokenizer that panics": (
        "tokenizer_file", of("tokenizer_file", normalizer={"type": "Prepend", "prepend": ""}), "index out of bounds"),
    "a template that is a number": ("tokenizer_config", of("tokenizer_config", chat_template=7), "the tokenizer can't be loaded"),
    "a record of huge numbers": ("record", b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits)"),
    "a list of huge numbers": ("data_file", b"\1[" + b"9" * 5000 + b"]", ":1: not JSON: Exceeds the limit"),
    "a list of nested lists": ("data_file", b"\1[" + b"[" * 100_000, ":1: the JSON is nested too deeply"),
    "a template that is no UTF-8": ("chat_template", b"\xff", "template.jinja: not text in UTF-8 (byte 0)"),
    "a template that writes no answer": ("chat_template", b"{{ 1 }}", "the text of the user turn 0, the text of the assistant turn 1: lost"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_was_found_once_is_our_error(ground: Ground, case: str) -> None:
    name, data, told = CASES[case]
    error = TARGETS[name].outcome(ground, data(ground) if callable(data) else data)
    assert isinstance(error, DistLoraError) and told in str(error), error
    assert error.exit_code in (2, 4)


RECORD_CASES = {
    "a speaker that is a list": ({"conversations": [{"from": [], "value": "x"}]}, "conversations[0].from is []; one of"),
    "nothing but null": ({"messages": None}, "'messages': all values are null"),
    "messages nested in a text": ({"messages": "[" * 3000}, "which is not JSON"),
    "messages 150 levels deep": ({"messages": json.loads("[" * 150 + "]" * 150)}, "nested deeper than 100 levels"),
    "such messages in a text": ({"messages": "[" * 150 + "]" * 150}, "messages is nested deeper than 100 levels"),
    "half a character": ({"messages": [*CHAT, {"role": "user", "content": "\ud800"}]}, "U+D800, an unpaired surrogate"),
    "all characters for private use": ({"messages": [*CHAT, {"role": "user", "content": f"<|eot_id|>{PRIVATE}"}]}, "every private-use character"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORD_CASES)
def test_what_was_found_once_in_a_record_is_told(ground: Ground, case: str) -> None:
    from dist_lora.data.chat import encode_sample
    from dist_lora.errors import DataError

    record, told = RECORD_CASES[case]
    with pytest.raises(DataError) as caught:
        encode_sample(record, tokenizer=ground.tokenizer, fmt="messages", train_on="assistant")
    assert told in str(caught.value)


def test_every_record_of_the_seeds_has_a_format(ground: Ground) -> None:
    for record in RECORDS:
        assert TARGETS["record"].outcome(ground, json.dumps(record).encode()) is None


def test_the_fuzzer_says_how_it_is_installed_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    import sys

    from tests.fuzz import run

    monkeypatch.setitem(sys.modules, "atheris", None)
    monkeypatch.setattr(sys, "argv", ["run", "--findings", str(tmp_path)])
    assert run.main() == 2
    assert "pip install atheris" in capsys.readouterr().err
