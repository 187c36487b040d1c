"""The hub is asked once a node and told plainly when it refuses; with everything at hand nothing is asked at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fake_hub import SHA, Hub, serving
from tests.e2e.runs import ROOT, Done, run, run_processes


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config without a model."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "train.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "{i}"}}\n' for i in range(8)))
    path = folder / "config.yaml"
    path.write_text(
        f"run: a\nruns_dir: {folder}/runs\nmodel: {{name: org/tiny}}\nlora: {{rank: 4}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/train.jsonl, cache_dir: {folder}/cache}}\n"
        "train: {steps: 2, global_batch: 6, micro_batch: 2, sequence_length: 64}\nlog: {trackers: []}\n"
    )
    return path


@pytest.fixture(scope="module")
def repository(tiny_llama, tmp_path_factory) -> Path:
    """A model as it is published: with a second copy in the maker's own format, and what nobody needs."""
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    shutil.copytree(tiny_llama("llama31", shard_size="60KB"), folder)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / "consolidated.00.pth").write_text("pickled")
    (folder / "pytorch_model.bin").write_text("pickled")
    (folder / "README.md").write_text("A model")
    return folder


@pytest.fixture(scope="module")
def dataset(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    shutil.copy(config.parent / "train.jsonl", folder)
    return folder


@pytest.mark.turn(of=4, among="hub")
def test_model_and_data_are_fetched_by_one_rank_of_a_node(config, repository, dataset, tmp_path) -> None:
    with serving(Hub({"org/tiny": repository, "datasets/org/data": dataset})) as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        done = run("train", config, "data.train=org/data", "data.eval=null", "--nproc", 3, env=environment)
        assert done.returncode == 0, done.stderr
        assert "data.train: 8 samples" in done.stderr
        needed = sorted(p.name for p in repository.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
        assert hub.fetched(hub.requests) == sorted([*needed, "train.jsonl"])
        assert len([name for name in needed if name.endswith(".safetensors")]) > 3
        assert len(hub.requests) == len(set(hub.requests))  # nothing is asked twice
        # A second start asks whether there is a newer one, and fetches nothing.
        hub.requests.clear()
        folder = fetch(environment, "org/tiny")
        assert folder.endswith(SHA) and hub.fetched(hub.requests) == []
        assert len([path for _, path in hub.requests if "org/tiny" in path]) == 1
    assert fetch(environment, "org/tiny") == folder  # the hub is gone: the cache does
    origin = json.loads((config.parent / "runs" / "a" / "adapter" / "dist_lora.json").read_text())
    assert (origin["base"]["name"], origin["base"]["revision"]) == ("org/tiny", SHA)


@pytest.mark.turn(of=4, among="hub")
def test_data_fetches_no_weights(config, repository, tmp_path) -> None:
    with serving(Hub({"org/tiny": repository})) as hub:
        done = run("data", config, "--json", env={**os.environ, **hub.environment(tmp_path)})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sets"]["data.eval"]["in_train"]["samples"] == 8
        needed = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
        assert hub.fetched(hub.requests) == needed


class TwoNodes:
    """Runs of four ranks on two nodes, each of which has a disk of its own for what it fetches."""

    def __init__(self, config: Path, hub: Hub, folder: Path) -> None:
        self.hub, self._folder = hub, folder
        self._arguments = ("train", config, "data.train=org/data", "data.eval=null", "train.global_batch=8",
                           f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache")  # fmt: skip

    def train(self, name: str) -> Done:
        launcher = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "DIST_LORA_RENDEZVOUS": f"{self._folder}/store-{name}"}
        ranks = [
            launcher
            | self.hub.environment(self._folder / f"home-{rank // 2}")
            | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
            for rank in range(4)
        ]
        codes, done = run_processes([((*self._arguments, f"run={name}"), rank) for rank in ranks])
        assert codes == [0] * 4, done.stderr
        return done


@pytest.fixture(scope="module")
def two_nodes(config, repository, dataset, tmp_path_factory) -> Iterator[tuple[TwoNodes, list[tuple[str, str]]]]:
    """Two nodes that have trained once, and what the hub was asked by that."""
    with serving(Hub({"org/tiny": repository, "datasets/org/data": dataset})) as hub:
        nodes = TwoNodes(config, hub, tmp_path_factory.mktemp("nodes"))
        nodes.train("first")
        yield nodes, hub.requests[:]


@pytest.mark.turn(of=4, among="hub")
def test_one_rank_of_each_node_asks_the_hub(two_nodes, repository) -> None:
    nodes, asked = two_nodes
    needed = [p.name for p in repository.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")]
    assert nodes.hub.fetched(asked) == sorted([*needed, "train.jsonl"] * 2)
    assert set(Counter(asked).values()) == {2}  # each question once by each of the nodes


@pytest.mark.turn(of=4, among="hub")
def test_a_hub_that_answers_too_many_requests_stops_nobody_who_has_it_all(two_nodes) -> None:
    nodes, _ = two_nodes
    nodes.hub.requests.clear()
    nodes.hub.is_busy = True
    done = nodes.train("again")
    assert "Traceback" not in done.stderr, done.stderr
    counts = set(Counter(nodes.hub.requests).values())
    assert (
        counts and max(counts) <= 2 * 7 and all(count % 2 == 0 for count in counts)
    )  # the library's own further tries


REFUSALS = {
    "without a token": (
        (401, "GatedRepo", "Access to model org/tiny is restricted. You must be authenticated."),
        "gated: you need access to download it (Access to model org/tiny is restricted. You must be "
        "authenticated.). Request it on https://huggingface.co/org/tiny (accept the licence), then log in with "
        "`hf auth login` or set HF_TOKEN, on every node; the token must be allowed to read gated models.",
    ),
    "not yet granted": ((403, "GatedRepo", "Your request is awaiting a review."), "(Your request is awaiting a review.)"),
    "a token without the right": ((403, "", "Your token may not read gated models."), "https://huggingface.co/org/tiny"),
    "a hub that fails": ((400, "", "Out of order"), "incomplete in the local cache, and can't be downloaded ("),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_says_how_to_get_access(repository, tmp_path, kind) -> None:
    refusal, told = REFUSALS[kind]
    text = fetched(Hub({"org/tiny": repository}, refusals={"org/tiny": refusal}), "org/tiny", tmp_path)
    assert text.startswith("model.name: org/tiny: ") and told in text
    assert ("gated" in text) == (refusal[0] != 400)


def test_a_model_that_is_no_llama_is_refused_by_its_config_alone(repository, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(settings | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    with serving(Hub({"org/tiny": other})) as hub:
        text = fetch({**os.environ, **hub.environment(tmp_path)}, "org/tiny")
        assert "qwen3" in text and hub.fetched(hub.requests) == ["config.json"]


def test_a_name_that_the_hub_does_not_know_is_told_as_that(repository, tmp_path) -> None:
    text = fetched(Hub({"org/tiny": repository}), "org/tyni", tmp_path)
    assert text.startswith(
        "model.name: org/tyni: the hub has no such model, or you have no access to it. Check the name;"
    )


@pytest.mark.turn(of=2, among="whole runs")
def test_a_hub_that_does_not_answer_says_what_to_do(tmp_path) -> None:
    environment = {**os.environ, **Hub({}, url="http://127.0.0.1:9").environment(tmp_path)}
    text = fetch(environment, "org/tiny")
    assert (
        "can't be downloaded (" in text
        and "Download it on a machine with a network, and set model.name to the folder" in text
    )


def fetched(hub: Hub, name: str, home: Path) -> str:
    """The error of fetching a model from a hub, in a process whose library looks there."""
    with serving(hub):
        return fetch({**os.environ, **hub.environment(home)}, name)


def fetch(environment: dict[str, str], name: str) -> str:
    """The folder of a model, or the error of fetching it."""
    program = f"""
from dist_lora.base.hub import fetch_model
from dist_lora.errors import ConfigError
try:
    print(fetch_model({name!r}))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stdout.strip()


@pytest.mark.turn(of=2, among="whole runs")
def test_a_refusal_ends_all_ranks_and_is_told_once(config, repository, tmp_path) -> None:
    with serving(Hub({"org/tiny": repository}, refusals={"org/tiny": REFUSALS["without a token"][0]})) as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        done = run("train", config, "run=refused", "--nproc", 2, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1 and "org/tiny: gated: " in done.stderr and "Traceback" not in done.stderr


# With everything on this machine

WATCH = """
import os, socket
def _note(what):
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(f"{what}\\n")
    raise OSError(f"no network in this test: {what}")
def _is_here(host):
    return host in (None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1")
def _watched(connect):
    def watching(self, address):
        if self.family != socket.AF_UNIX and not _is_here(address[0]):
            _note(f"connect {address}")
        return connect(self, address)
    return watching
def _resolve(host, *more, **named):
    if not _is_here(host):
        _note(f"resolve {host}")
    return _getaddrinfo(host, *more, **named)
_getaddrinfo, socket.getaddrinfo = socket.getaddrinfo, _resolve
socket.socket.connect = _watched(socket.socket.connect)
socket.socket.connect_ex = _watched(socket.socket.connect_ex)
"""


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """An environment whose processes write down each attempt to reach another machine in CONNECTIONS, and fail at it."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "connections").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "watch"), str(ROOT)])
    return environment | {"CONNECTIONS": str(tmp_path / "connections"), "HF_HOME": str(tmp_path / "hf")}


@pytest.mark.turn(of=2, among="whole runs")
def test_the_watch_sees_what_the_hubs_library_does(watched) -> None:
    text = fetch(watched, "org/tiny")
    assert "can't be downloaded" in text
    assert Path(watched["CONNECTIONS"]).read_text().startswith("resolve huggingface.co")


@pytest.mark.turn(of=4, among="hub")
def test_with_local_files_no_other_machine_is_asked_for_anything(config, tiny_llama, tmp_path, watched) -> None:
    base, runs = tiny_llama("llama31"), tmp_path / "runs"
    settings = [f"model.name={base}", f"runs_dir={runs}", "log.trackers=[tensorboard]", "eval.exact_match=true"]
    done = run("train", config, *settings, "--nproc", 2, env=watched)
    assert done.returncode == 0, done.stderr
    gathered = tmp_path / "gathered"
    commands = [
        ["gather", str(runs / "a"), "--out", str(gathered)],
        ["merge", str(gathered), "--out", str(tmp_path / "merged"), "--base", str(base)],
        ["eval", str(config), *settings, "--adapter", str(gathered)],
        ["generate", str(gathered), "--base", str(base), "--prompt", "1", "--max-new-tokens", "2"],
        ["train", str(config), *settings, "--dry-run"],
    ]
    program = f"""
import sys
from dist_lora.cli import main
for arguments in {commands!r}:
    sys.argv = ["dist-lora", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
"""
    done = subprocess.run([sys.executable, "-c", program], env=watched, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "config.json").exists() and "base_loss" in done.stdout
    assert Path(watched["CONNECTIONS"]).read_text() == ""


@pytest.mark.turn(of=4, among="hub")
def test_what_fetch_has_fetched_is_all_that_a_run_needs(config, repository, dataset, tmp_path) -> None:
    settings = ("data.train=org/data", "data.eval=null", f"data.cache_dir={tmp_path}/cache", "run=fetched")
    with serving(Hub({"org/tiny": repository, "datasets/org/data": dataset})) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "my home")}
        done = run("fetch", config, *settings, env=environment)
        assert done.returncode == 0, done.stderr
    assert f"model      org/tiny: org/tiny at {SHA[:12]}, " in done.stdout
    assert f"data       data.train: org/data: 8 records, in {tmp_path}/my home/" in done.stdout
    assert f"export HF_HUB_OFFLINE=1 HF_HOME='{tmp_path}/my home'" in done.stdout
    offline = {**environment, "HF_HUB_OFFLINE": "1"}  # and the hub is gone
    trained = run("train", config, *settings, "--nproc", 1, env=offline)
    assert trained.returncode == 0, trained.stderr
