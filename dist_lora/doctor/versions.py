"""The packages that a run uses: which versions are installed, and whether they were tested together."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from dist_lora.doctor.findings import Answer, hosts_by

# The same as constraints.txt, which a test checks: an installed package doesn't have that file.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "zstandard": "0.25.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "huggingface_hub": "2.4.0",
    "pydantic": "2.14.3",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "PyYAML": "6.0.3",
    "xxhash": "4.1.0",
    "tensorboard": "2.21.0",
    "matplotlib": "3.11.2",
    "numpy": "2.4.6",
    "Jinja2": "3.1.6",
    "psutil": "7.2.2",
    "regex": "2026.11.15",
}
TESTED_PYTHON = "3.11"
OPTIONAL = ("peft",)  # only for comparisons
SHOWN = ("torch", "transformers", "deepspeed", "accelerate", "bitsandbytes", "datasets", "peft", "safetensors")


def installed_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_versions(version_of: Callable[[str], str | None] = installed_version) -> Answer:
    """The installed versions compared with those that were tested together.

    Args:
        version_of: the version of a package, or None where it isn't installed.
    """
    installed = {name: version_of(name) for name in TESTED}
    answer = Answer(facts={"python": platform.python_version(), "packages": installed})
    shown = [f"Python {platform.python_version()}", *(f"{name} {installed[name] or '-'}" for name in SHOWN)]
    missing = [name for name, version in installed.items() if version is None and name not in OPTIONAL]
    others = _others(installed)
    summary = "as tested together" if not missing and not others else "not all as tested together"
    answer.add("ok", "versions", f"{', '.join(shown)}: {summary}")
    if missing:
        wanted = " ".join(f"{name}=={TESTED[name]}" for name in missing)
        answer.add(
            "fault",
            "versions",
            f"not installed: {', '.join(missing)}",
            f"Install what is missing: pip install {wanted}",
        )
    older = [name for name, version in others.items() if _parts(version) < _parts(TESTED[name])]
    for names, severity in ((older, "warning"), ([name for name in others if name not in older], "note")):
        if names:
            versions = ", ".join(f"{name} {others[name]} (tested: {TESTED[name]})" for name in names)
            answer.add(
                "warning" if severity == "warning" else "note",
                "versions",
                f"{'older than' if severity == 'warning' else 'not as'} tested: {versions}",
                "If something fails, install the tested versions: pip install "
                + " ".join(f"{name}=={TESTED[name]}" for name in names),
            )
    if not platform.python_version().startswith(TESTED_PYTHON + "."):
        answer.add("note", "versions", f"Python {platform.python_version()}; tested with {TESTED_PYTHON}")
    return answer


def examine_compiled(module: str = "torch") -> Answer:
    """Whether Python has kept what it compiled of an imported module; else each rank compiles it anew at each start."""
    spec = sys.modules[module].__spec__
    answer = Answer()
    if spec is None or spec.origin is None or spec.cached is None or Path(spec.cached).exists():
        return answer
    by = "PYTHONDONTWRITEBYTECODE is set" if sys.dont_write_bytecode else "its folder can't be written"
    packages = Path(spec.origin).parents[1]
    answer.add(
        "warning",
        "versions",
        f"each rank compiles {module} and what else it imports anew, which doubles the time of a start: {spec.cached} "
        f"isn't there, and {by}",
        f"Compile once, as who may write there: python -m compileall -q {packages}",
    )
    return answer


def _others(installed: Mapping[str, str | None]) -> dict[str, str]:
    """Versions that differ from the tested ones; a build's suffix (+cu128, +cpu) is no difference."""
    return {
        name: version
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != TESTED[name]
    }


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def compare_nodes(packages: Mapping[str, Mapping[str, str | None]]) -> Answer:
    """Whether all hosts have the same versions.

    Args:
        packages: by host, the version of each package (with its build) and of Python.
    """
    answer = Answer()
    first = next(iter(packages.values()), {})
    for name in first:
        hosts_of = hosts_by((host, versions.get(name) or "not installed") for host, versions in packages.items())
        if len(hosts_of) > 1:
            differences = "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in hosts_of.items())
            answer.add(
                "fault",
                "versions",
                f"nodes have different versions of {name}: {differences}",
                "Start all nodes from the same environment (one image, or one shared folder).",
            )
    return answer
