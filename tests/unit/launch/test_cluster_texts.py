"""The container, the Kubernetes and the SkyPilot examples say what the tool really takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dist_lora import __version__, errors
from dist_lora.cli import app
from dist_lora.run_folder.status import Status
from tests import ROOT

LAUNCH = ROOT / "launch"
JOB, PYTORCHJOB = LAUNCH / "kubernetes" / "job.yaml", LAUNCH / "kubernetes" / "pytorchjob.yaml"
SKYPILOT = LAUNCH / "skypilot.yaml"
DOCKERFILE = LAUNCH / "container" / "Dockerfile"
INSIDE = "/opt/dist-lora"  # where the image has the project
NEVER_AGAIN = [errors.EXIT_USER, errors.EXIT_PLAN, errors.EXIT_DAMAGED]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each on one line, without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def job() -> Any:
    return next(document for document in documents(JOB) if document["kind"] == "Job")


def pods() -> list[tuple[str, Any]]:
    """The pod templates of both Kubernetes examples, by name."""
    (pytorchjob,) = documents(PYTORCHJOB)
    replicas = pytorchjob["spec"]["pytorchReplicaSpecs"]
    return [("job", job()["spec"]["template"]["spec"])] + [
        (kind, replicas[kind]["template"]["spec"]) for kind in ("Master", "Worker")
    ]


def environment_of(pod: Any) -> dict[str, str | None]:
    container = pod["containers"][0]
    exported = re.findall(r'^export ([A-Z_]+)="([^"]*)"$', container["args"][0], re.MULTILINE)
    return {entry["name"]: entry.get("value") for entry in container["env"]} | dict(exported)


def words_of(pod: Any) -> list[str]:
    """The command that starts a pod's ranks: ``bash``, the script, its arguments."""
    container = pod["containers"][0]
    words = [*container["command"], *container["args"]]
    if words[:2] == ["bash", "-c"]:
        words = shlex.split(next(line for line in words[2].splitlines() if "torchrun.sh" in line).partition("&")[0])
    return words


def check_command(words: list[str]) -> None:
    """A script of launch/ with arguments that ``train`` takes."""
    program, script, *arguments = words
    assert program == "bash" and script.startswith(f"{INSIDE}/")
    assert (ROOT / script.removeprefix(f"{INSIDE}/")).is_file(), script
    check_arguments("train", arguments)


def check_arguments(command: str, arguments: list[str]) -> None:
    """A command of ours takes these arguments: an unknown option is an error here as it is there."""
    group = typer.main.get_command(app)
    found = group.commands[command]  # type: ignore[attr-defined]
    context = found.make_context(command, list(arguments))
    assert context.params.get("config") or context.params["configs"]


def variables_of(script: str) -> set[str]:
    """What a script of launch/ says in its head that it reads; it reads each of them."""
    text = (LAUNCH / script).read_text()
    names = set(re.findall(r"^#     ([A-Z_]+)  +\S", text, re.MULTILINE))
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert names and all(re.search(rf"\$\{{?{name}\b", body) for name in names)
    return names


# Variables that other programs read
OTHERS = {"HF_TOKEN", "HF_HOME", "DIST_LORA_CACHE"}


def test_variables_that_are_ours_are_read_somewhere() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "dist_lora").rglob("*.py"))
    assert "DIST_LORA_CACHE" in sources
    assert variables_of("deepspeed.sh") == {"NPROC", "HOSTFILE", "NODE_RANK", "HEAD", "PYTHON"}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_pod_starts_the_ranks_by_a_script_with_what_it_reads(name: str, pod: Any) -> None:
    check_command(words_of(pod))
    environment = environment_of(pod)
    assert environment.keys() <= variables_of("torchrun.sh") | OTHERS
    assert environment.keys() >= {"NNODES", "NPROC", "HEAD", "LOCAL_ADDR"}
    assert re.fullmatch(r"[^:\s]+:[1-9][0-9]*", environment["HEAD"] or "")
    # Kubernetes replaces $(NAME) by what stands before it, and what an operator adds stands behind.
    assert not any("$(" in (value or "") for value in environment.values())
    container = pod["containers"][0]
    assert container["image"].endswith(f"/dist-lora:{__version__}")
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == environment["NPROC"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/work", "/dev/shm"}
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["terminationGracePeriodSeconds"] > 600  # torchrun waits so long for its ranks


def test_the_job_has_a_pod_a_node_which_meet_at_the_first_and_no_mistake_is_tried_again() -> None:
    service, found = documents(JOB)
    spec = found["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == environment_of(pod)["NNODES"]
    name = found["metadata"]["name"]
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    head = environment_of(pod)["HEAD"]
    assert head is not None and head.startswith(f"{name}-0.{service['metadata']['name']}:")
    by_codes = {
        rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    }
    assert by_codes["FailJob"]["values"] == NEVER_AGAIN and by_codes["Ignore"]["values"] == [errors.EXIT_STOPPED]
    assert {rule["containerName"] for rule in by_codes.values()} == {pod["containers"][0]["name"]}
    assert {rule["operator"] for rule in by_codes.values()} == {"In"}
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes no podFailurePolicy with another


def test_the_pytorchjob_has_a_pod_a_node() -> None:
    (found,) = documents(PYTORCHJOB)
    replicas = found["spec"]["pytorchReplicaSpecs"]
    pod = replicas["Master"]["template"]["spec"]
    assert str(sum(each["replicas"] for each in replicas.values())) == environment_of(pod)["NNODES"]
    assert found["spec"]["nprocPerNode"] == environment_of(pod)["NPROC"]
    assert {each["restartPolicy"] for each in replicas.values()} == {"ExitCode"}
    assert pod["containers"][0]["name"] == "pytorch"


def code_of_pytorchjob(code: int, folder: Path) -> int:
    """What a pod's script ends with, in a folder of runs, where ``launch/torchrun.sh`` ends with ``code``."""
    (found,) = documents(PYTORCHJOB)
    script = found["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["args"][0]
    standing_in = script.replace(f"bash {INSIDE}/launch/torchrun.sh my-run.yaml", f"bash -c 'echo $HEAD; exit {code}'")
    assert standing_in != script
    environment = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin:/bin"]), "MASTER_ADDR": "head"}
    done = subprocess.run(
        ["bash", "-c", standing_in], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout == "head:29400\n", done.stderr
    return done.returncode


CODES = {0: 0, **{code: code for code in NEVER_AGAIN}, errors.EXIT_STOPPED: 143, errors.EXIT_FAILED: 143, 137: 143}


@pytest.mark.parametrize(("code", "told"), CODES.items())
def test_the_pytorchjob_tells_the_operator_what_to_start_again(tmp_path: Path, code: int, told: int) -> None:
    (tmp_path / "my-run.yaml").write_text("run: mine\nmodel: {name: 3.1-8b}\ndata: {train: x.jsonl}\n")
    assert code_of_pytorchjob(code, tmp_path) == told


@pytest.mark.parametrize(("stalled", "told"), [(2, 143), (3, 1), (12, 1)])
def test_the_pytorchjob_gives_up_a_run_that_comes_to_no_newer_step(tmp_path: Path, stalled: int, told: int) -> None:
    (tmp_path / "my-run.yaml").write_text("run: mine\nmodel: {name: 3.1-8b}\ndata: {train: x.jsonl}\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    mark = Status(errors.EXIT_FAILED, False, 5, stalled, "my-run.yaml", "a rank was lost")
    (tmp_path / "runs" / "mine" / "status").write_text(mark.line())
    assert code_of_pytorchjob(errors.EXIT_FAILED, tmp_path) == told


def test_skypilot_starts_the_ranks_by_a_script_with_what_it_reads() -> None:
    (task,) = documents(SKYPILOT)
    script = task["run"]
    *_, last = script.strip().splitlines()
    check_command([word.replace("$project", INSIDE) for word in shlex.split(last)])
    exported = {
        word.partition("=")[0]
        for line in script.splitlines()
        if line.startswith("export ")
        for word in line.split()[1:]
    }
    assert exported == variables_of("torchrun.sh") - {"RUN_ID", "MAX_RESTARTS", "PYTHON"}
    assert set(task["envs"]) | set(task["secrets"]) <= OTHERS
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.EXIT_STOPPED]
    assert task["num_nodes"] > 1 and re.fullmatch(r"\w+:[0-9]+", task["resources"]["accelerators"])
    assert "bash launch/setup.sh" in task["setup"]


def test_skypilots_nodes_meet_at_the_first_of_their_addresses(tmp_path: Path) -> None:
    (task,) = documents(SKYPILOT)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "torchrun.sh").write_text('echo "$NNODES $NPROC $HEAD $LOCAL_ADDR $JOIN_TIMEOUT $*"\n')
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}  # fmt: skip
    script = task["run"].replace("cd /work", "")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **told},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "2 8 10.0.0.1:29400 10.0.0.2 1800 my-run.yaml\n", done.stderr


# The container


def test_the_container_is_made_of_files_that_are_there_and_sent_to_its_making() -> None:
    sent = {
        line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {wanted["readme"], *wanted["license-files"]} <= copied


def test_the_container_has_the_tested_versions_and_no_root() -> None:
    words = [word for word, _ in instructions()]
    assert set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    base = dict(instructions()[:1])["FROM"]
    tested = re.search(r"\(Python (\d\.\d+)\)", (ROOT / "constraints.txt").read_text())
    assert tested is not None and base == f"python:{tested[1]}-slim"
    for word, rest in instructions():
        assert word != "RUN" or "pip install" not in rest or "--constraint constraints.txt" in rest
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    entry = yaml.safe_load(dict(instructions())["ENTRYPOINT"])
    assert entry[0] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    set_here = {pair.partition("=")[0] for word, rest in instructions() if word == "ENV" for pair in rest.split()}
    assert set_here <= OTHERS | {"PYTHONUNBUFFERED"}
    assert any(word == "RUN" and "--uid 1000" in rest for word, rest in instructions())


# What stands in comments


def commands_in_comments() -> Iterator[Any]:
    """The commands that the files of launch/ and docs/start.md show, by file."""
    for path in sorted(path for path in LAUNCH.rglob("*") if path.is_file() and path.suffix != ".py"):
        text = re.sub(r"\\\n# +", "", path.read_text())
        for line in re.findall(r"^#     (.*(?:dist[-_]lora train|\b\w+\.sh CONFIG).*)$", text, re.MULTILINE):
            yield pytest.param(line, id=f"{path.name}: {line}")
    table = (ROOT / "docs/start.md").read_text().partition("\n\nThe scripts")[0]
    for line in re.findall(r"`([^`]*CONFIG[^`]*)`", table):
        yield pytest.param(line, id=f"start.md: {line}")


def test_files_that_the_documents_name_are_there() -> None:
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert all((ROOT / name).exists() for name in re.findall(r"launch/[\w./]*\w", text))


@pytest.mark.parametrize("line", list(commands_in_comments()))
def test_a_command_that_a_file_shows_is_one_that_we_take(line: str) -> None:
    words = shlex.split(re.sub(r"\[KEY=VALUE \.\.\.\]", "lora.rank=8", line), comments=True)
    place = next(i for i, word in enumerate(words) if word in ("train", "slurm") or word.endswith(".sh"))
    if words[place].endswith(".sh"):
        assert (ROOT / words[place]).is_file()
        given = {word.partition("=")[0] for word in words[:place] if re.match(r"[A-Z_]+=", word)}
        assert given <= variables_of(Path(words[place]).name)
    check_arguments("slurm" if words[place] == "slurm" else "train", words[place + 1 :])


def test_accelerates_file_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(LAUNCH / "accelerate.yaml"))
    assert found.distributed_type.value == "MULTI_GPU" and found.mixed_precision == "no" and found.num_machines == 1
