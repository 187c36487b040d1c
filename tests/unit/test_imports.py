"""Data flows one way and so do imports: read from the source, so that an import that runs late or never counts too."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "dist_lora"

# A module may import what stands before it here, and what lies in its own folder.
ROAD = (
    "errors",
    "text",
    "files",
    "pace",
    "own_code",
    "profile",
    "config",
    "herd",
    "layout",
    "plan",
    "base",
    "lora",
    "world",
    "engines",
    "supervision",
    "data",
    "checkpoint",
    "evaluation",
    "run_folder",
    "train",
    "chat",
    "prepare",
    "overview",
    "doctor",
    "simulation",
    "slurm",
    "work",
    "api",
    "cli",
    "__main__",
)
# What computes obeys the layout; what is foretold of it, nothing that computes may know.
NEVER_PLAN = ("base", "lora", "world", "engines", "data", "checkpoint", "evaluation", "train")
# These work on files, on any CPU.
NO_ENGINE = ("dist_lora.lora.merge", "dist_lora.checkpoint.gather", "dist_lora.run_folder.report")
# One door for each package that we do not want to meet everywhere.
DOORS = {
    "torch.distributed": (
        "world",
        "engines",
        "supervision",
        "checkpoint",
        "doctor.links",
        "simulation.world",
        "simulation.collectives",
    ),
    "deepspeed": ("engines.zero3",),
    "bitsandbytes": ("base.quant",),
    "triton": ("base.kernels.compiled",),
    "matplotlib": ("simulation.timeline", "run_folder.curves"),
}
# These run what they read, or let a file of the user's do so.
NOWHERE = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "pickletools",
    "torch.load", "torch.save", "torch.package", "torch.jit.load", "torch.serialization", "torch.distributed.checkpoint",
    # numpy's own files may hold pickles, and pandas' do
    "numpy.load", "numpy.save", "numpy.savez", "np.load", "np.save", "np.savez", "read_pickle", "to_pickle",
    # these hand pickles from one process to another
    "multiprocessing", "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor", "xmlrpc",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader",
    # torch.distributed pickles what these are given
    "all_gather_object", "gather_object", "torch.distributed.rpc", "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip
ONLY_FALSE = ("trust_remote_code", "allow_pickle")  # arguments that may be given, and then as False


@dataclass(frozen=True)
class Import:
    """``target`` is the full name of what a line imports.

    ``is_late``: within a function. ``is_for_types``: no program ever runs it.
    """

    target: str
    line: int
    is_late: bool
    is_for_types: bool


@functools.cache
def tree_of(source: str) -> ast.Module:
    """Parsed once, though many tests look at it."""
    return ast.parse(source)


@functools.cache
def imports_of(source: str, *, module: str) -> list[Import]:
    """Every import of a module's source, also in functions, by ``importlib``, and those that only types need."""
    tree = tree_of(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    return [
        Import(target, node.lineno, id(node) in late, id(node) in for_types)
        for node in ast.walk(tree)
        for target in _targets(node, module)
    ]


def _targets(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -node.level] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        # What is named may be a module or something in one; the longer name tells more of both.
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and (_dotted(node.func) or "").rpartition(".")[2] in (
        "import_module",
        "__import__",
    ):
        first = node.args[0] if node.args else None
        yield first.value if isinstance(first, ast.Constant) else "a name that is only known when it runs"


def _dotted(node: ast.AST) -> str | None:
    """``a.b.c`` of an expression that is just that."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def stage_of(name: str) -> int | None:
    """The place on the road of ``dist_lora.lora.layer`` and the like; None where it has none."""
    folder = name.removeprefix("dist_lora.").partition(".")[0]
    return ROAD.index(folder) if folder in ROAD else None


def wrong_ways(source: str, *, module: str) -> list[str]:
    """The imports of ``dist_lora``'s own modules that lead back."""
    here = stage_of(module)
    assert here is not None, f"{module} has no place on the road: add its folder to ROAD, where it belongs"
    found = []
    for line in imports_of(source, module=module):
        if not line.target.startswith("dist_lora.") or line.is_for_types or line.target == "dist_lora.__version__":
            continue
        there = stage_of(line.target)
        assert there is not None, f"{module}:{line.line} imports {line.target}, which has no place on the road"
        if there > here:
            found.append(f"{module}:{line.line} imports {line.target}: {ROAD[there]} comes after {ROAD[here]}")
    return found


def wrong_doors(source: str, *, module: str) -> list[str]:
    """The uses of an outside package in a module that is not its door, by import or as ``torch.distributed.x``."""
    used = [(line.target, line.line) for line in imports_of(source, module=module)]
    used += [
        (_dotted(node) or "", node.lineno) for node in ast.walk(tree_of(source)) if isinstance(node, ast.Attribute)
    ]
    inside = module.removeprefix("dist_lora.")
    return sorted(
        {
            f"{module}:{line} uses {package}, whose door is {' and '.join(doors)}"
            for name, line in used
            for package, doors in DOORS.items()
            if f"{name}.".startswith(f"{package}.") and not any(f"{inside}.".startswith(f"{door}.") for door in doors)
        }
    )


def forbidden(source: str, *, module: str) -> list[str]:
    """The uses of what is used nowhere."""
    tree = tree_of(source)
    used = [(line.target, line.line) for line in imports_of(source, module=module)]
    used += [(_dotted(node), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)]
    found = {f"{module}:{line}: {name}" for name, line in used if name and _is_forbidden(name)}
    for node in ast.walk(tree):
        is_open = isinstance(node, ast.keyword) and node.arg in ONLY_FALSE
        if is_open and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            found.add(f"{module}:{node.value.lineno}: {node.arg} is not False")
        if isinstance(node, ast.Call) and _dotted(node.func) in (
            "eval",
            "exec",
            "compile",
            "builtins.eval",
            "builtins.exec",
        ):
            found.add(f"{module}:{node.lineno}: {_dotted(node.func)}")
    return sorted(found)


def _is_forbidden(name: str) -> bool:
    parts = name.split(".")
    beginnings = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return bool(beginnings & NOWHERE) or parts[-1] in NOWHERE


def modules() -> dict[str, str]:
    """Source by full name, of all modules of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path.read_text(encoding="utf-8")
    return found


SOURCES = modules()


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "dist_lora"])
def test_a_module_imports_only_what_comes_before_it_on_the_road(module: str) -> None:
    assert wrong_ways(SOURCES[module], module=module) == []


def test_the_package_itself_imports_nothing() -> None:
    assert imports_of(SOURCES["dist_lora"], module="dist_lora") == []


@pytest.mark.parametrize("folder", NEVER_PLAN)
def test_what_computes_never_imports_the_plan(folder: str) -> None:
    inside = [name for name in SOURCES if name.startswith(f"dist_lora.{folder}.")]
    plan = {name for name in SOURCES if name.startswith("dist_lora.plan.")}
    assert inside and plan
    assert [name for name in inside if reached(name) & plan] == []


@pytest.mark.parametrize("module", NO_ENGINE)
def test_what_works_on_files_imports_no_engine(module: str) -> None:
    assert [name for name in reached(module) if name.startswith("dist_lora.engines")] == []


def reached(module: str) -> set[str]:
    """All modules of the package that one imports, itself or by another, early or late."""
    found: set[str] = set()
    open_ends = [module]
    while open_ends:
        here = open_ends.pop()
        names = {line.target for line in imports_of(SOURCES[here], module=here) if not line.is_for_types}
        new = ((names | {name.rpartition(".")[0] for name in names}) & SOURCES.keys()) - found
        found |= new
        open_ends += new
    return found


def test_what_is_reached_by_another_is_seen() -> None:
    assert "dist_lora.base.index" in reached("dist_lora.lora.merge")
    assert "dist_lora.engines.fsdp2" in reached("dist_lora.train.build")


def circle_among(sources: dict[str, str]) -> list[str]:
    """Modules that import each other as they are imported, if any do."""
    before: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {line.target for line in imports_of(source, module=module) if not (line.is_late or line.is_for_types)}
        parents = {name.rpartition(".")[0] for name in names}
        before[module] = {name for name in names | parents if name in sources and name != module}
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert circle_among(SOURCES) == []


def test_a_circle_is_seen_and_one_that_closes_late_is_none() -> None:
    sources = {"dist_lora.a.x": "from dist_lora.a import y", "dist_lora.a.y": "from dist_lora.a.x import thing"}
    assert set(circle_among(sources)) == {"dist_lora.a.x", "dist_lora.a.y"}
    sources["dist_lora.a.y"] = "def f():\n    from dist_lora.a.x import thing"
    assert circle_among(sources) == []


@pytest.mark.parametrize("module", SOURCES)
def test_outside_packages_come_in_by_one_door(module: str) -> None:
    assert wrong_doors(SOURCES[module], module=module) == []


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_that_runs_code_from_a_file_is_used(module: str) -> None:
    assert forbidden(SOURCES[module], module=module) == []


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_the_scripts_beside_the_package_run_no_code_from_a_file_either(script: str) -> None:
    assert forbidden((ROOT / "launch" / script).read_text(), module=script) == []


# The reader of the source itself


@pytest.mark.parametrize(
    "source",
    [
        "from dist_lora.train.build import build",
        "import dist_lora.train.build",
        "from dist_lora import train",
        "def late():\n    from dist_lora.train.build import build",
        "from ..train import build",
        "from .. import train",
        "import importlib\nimportlib.import_module('dist_lora.train.build')",
        "from dist_lora.simulation import simulate",
        "if True:\n    import dist_lora.cli",
    ],
)
def test_every_spelling_of_an_import_that_leads_back_is_seen(source: str) -> None:
    assert len(wrong_ways(source, module="dist_lora.data.token_set")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dist_lora.train.build import Trainee",
        "import typing\nif typing.TYPE_CHECKING:\n    from dist_lora.train.build import Trainee",
        "from dist_lora.plan import plan\nfrom dist_lora.world.world import World",
        "from .chat import Encoded\nimport dist_lora\nfrom dist_lora import __version__",
    ],
)
def test_an_import_for_types_or_of_an_earlier_stage_is_fine(source: str) -> None:
    assert wrong_ways(source, module="dist_lora.data.token_set") == []


def test_an_import_beside_those_for_types_counts() -> None:
    source = "if TYPE_CHECKING:\n    pass\nelse:\n    from dist_lora.train.build import Trainee"
    assert len(wrong_ways(source, module="dist_lora.data.token_set")) == 1


def test_a_module_without_a_place_on_the_road_is_told() -> None:
    with pytest.raises(AssertionError, match=r"dist_lora\.odds has no place on the road: add its folder to ROAD"):
        wrong_ways("", module="dist_lora.odds")


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "import torch\ndef f(): return torch.distributed.is_initialized()",
        "import deepspeed",
        "from bitsandbytes.functional import quantize_4bit",
    ],
)
def test_every_way_around_a_door_is_seen(source: str) -> None:
    assert len(wrong_doors(source, module="dist_lora.train.loop")) == 1


def test_a_door_is_open_to_its_package() -> None:
    assert wrong_doors("import torch.distributed as dist", module="dist_lora.world.world") == []
    assert wrong_doors("import bitsandbytes.functional", module="dist_lora.base.quant.nf4") == []
    assert len(wrong_doors("import deepspeed", module="dist_lora.engines.zero3_helpers")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import yaml\nyaml.load(text, Loader=L)",
        "from yaml import FullLoader",
        "import torch.distributed as dist\ndist.broadcast_object_list(x)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=trusted)",
        "f(x, allow_pickle=True)",
        "np.load(x)",
        "from numpy import save",
        "import torch.multiprocessing as mp",
        "from multiprocessing import Queue",
        "def f():\n    from concurrent.futures import ProcessPoolExecutor",
        "from torch.distributed.checkpoint import save",
        "frame.to_pickle(path)",
        "eval(text)",
        "compile(text, 'x', 'exec')",
    ],
)
def test_every_way_to_run_a_file_is_seen(source: str) -> None:
    assert len(forbidden(source, module="dist_lora.train.loop")) == 1


def test_what_only_sounds_like_it_is_fine() -> None:
    source = "model.eval()\nadapters.load(values)\nyaml.safe_load(text)\nf(trust_remote_code=False)"
    assert forbidden(source, module="dist_lora.train.loop") == []


# What is imported when it runs


def imported_by(program: str) -> set[str]:
    """The names in ``sys.modules`` at the end of a program in a process of its own."""
    code = f"{program}\nimport sys\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


LIGHT = [
    name
    for name in SOURCES
    if name.startswith(("dist_lora.config.", "dist_lora.herd.", "dist_lora.layout.", "dist_lora.plan."))
]


def test_config_herd_and_plan_do_without_torch() -> None:
    assert "dist_lora.config.load" in LIGHT and "dist_lora.herd.shape" in LIGHT
    loaded = imported_by("import " + ", ".join(LIGHT))
    assert set(LIGHT) <= loaded
    assert not loaded & {"torch", "numpy", "transformers", "deepspeed", "accelerate", "bitsandbytes", "datasets"}


RUN = "from dist_lora.cli import main\nimport sys\nsys.argv = ['dist-lora', *{arguments!r}]\ntry:\n    main()\nexcept SystemExit as end:\n    assert end.code == {code}, end.code"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["merge", "--help"]], ids=" ".join)
def test_help_answers_without_the_heavy_packages(arguments: list[str]) -> None:
    loaded = imported_by(RUN.format(arguments=arguments, code=0))
    heavy = {"torch", "transformers", "numpy", "yaml", "rich", "accelerate", "datasets", "safetensors"}
    if arguments == ["--help"]:
        heavy |= {"pydantic"}  # typer itself reads the arguments of a command by it
    assert "typer" in loaded
    assert not loaded & heavy


def test_a_mistyped_setting_answers_without_torch(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: a\nmodel: {name: 3.1-8b}\ndata: {train: a.jsonl}\nlora: {rnak: 4}\n")
    loaded = imported_by(RUN.format(arguments=["train", str(config)], code=2))
    assert not loaded & {"torch", "transformers", "numpy"}


def test_a_launcher_of_ranks_does_without_torch(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"run: a\nruns_dir: {tmp_path}\nmodel: {{name: {tmp_path}/none}}\ndata: {{train: a.jsonl}}\n")
    loaded = imported_by(RUN.format(arguments=["train", str(config), "--nproc", "2"], code=2))
    assert "dist_lora.supervision.local_ranks" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}


def test_a_rank_joins_without_what_torch_compiles_with() -> None:
    loaded = imported_by("from dist_lora.engines.precision import set_products\nset_products(is_deterministic=False)")
    assert "torch" in loaded and not loaded & {"torch._dynamo", "torch._inductor", "sympy"}


@pytest.mark.parametrize(
    "arguments",
    [["merge", "none", "--out", "out", "--base", "none"], ["gather", "none", "--out", "out"], ["report", "none"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_on_files_run_without_an_engine(arguments: list[str]) -> None:
    loaded = imported_by(RUN.format(arguments=arguments, code="2 or end.code == 4"))
    assert f"dist_lora.{'lora.merge' if arguments[0] == 'merge' else 'checkpoint.folders'}" in loaded
    assert not [name for name in loaded if name.startswith(("dist_lora.engines", "dist_lora.train"))]


@pytest.mark.parametrize(
    "arguments",
    [
        ["herd"],
        ["configs"],
        ["configs", "show", "3-8b_lora_8x80gb"],
        ["explain", "configs/3.1-8b-instruct_lora_8x80gb.yaml"],
    ],
    ids=" ".join,
)
def test_what_is_reckoned_answers_without_torch(arguments: list[str]) -> None:
    loaded = imported_by(RUN.format(arguments=arguments, code=0))
    assert not loaded & {"torch", "transformers", "numpy", "datasets", "accelerate", "huggingface_hub"}
