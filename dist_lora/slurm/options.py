"""The #SBATCH options of a job: from the request and the plan, or the user's own in their place; nothing is said twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dist_lora.errors import ConfigError

# sbatch's short options that have a long one, as of Slurm 24.05; all but the last two take a value.
_LONG = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "i": "input", "J": "job-name",
    "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition",
    "q": "qos", "S": "core-spec", "t": "time", "w": "nodelist", "x": "exclude", "H": "hold", "s": "oversubscribe",
}  # fmt: skip
# Of ours, by name: the user's that say the same in other words.
_SAME = {
    "gpus-per-node": ("gpus", "gpus-per-task", "gpus-per-socket", "gres"),
    "mem": ("mem-per-cpu", "mem-per-gpu"),
    "exclusive": ("oversubscribe", "share"),
    "requeue": ("no-requeue",),
}
# What the script itself depends on.
_OURS = {
    "nodes": "use --nodes",
    "ntasks": "it follows from --launcher and --gpus-per-node",
    "ntasks-per-node": "it follows from --launcher and --gpus-per-node",
    "ntasks-per-gpu": "it follows from --launcher and --gpus-per-node",
    "cpus-per-gpu": "use --cpus-per-gpu",
    "array": "give several configs",
    "chdir": "submit from that folder",
    "export": "use --env, and leave the job's environment whole",
}


@dataclass(frozen=True)
class SbatchOption:
    """An option as a user typed it, with its long name and its value (empty for none)."""

    text: str
    name: str
    value: str

    @staticmethod
    def of(text: str) -> SbatchOption:
        """From ``--qos=high``, ``--qos high``, ``-q high`` or ``-qhigh``."""
        text = text.strip()
        if text.startswith("--"):
            first, *rest = text[2:].replace("=", " ", 1).split(maxsplit=1) or [""]
            return SbatchOption(text, first, rest[0].strip() if rest else "")
        return SbatchOption(text, _LONG.get(text[1:2], text[1:2]), text[2:].strip(" ="))

    def says(self, ours: str) -> bool:
        """Whether it sets what an option of ours sets; ``--gres=nvme:1`` is no GPU."""
        if self.name == "gres" and "gpu" not in self.value:
            return False
        return self.name == ours or self.name in _SAME.get(ours, ())


def faults_of(extra: Sequence[str], typed: Mapping[str, str | None]) -> Iterator[str]:
    """What is wrong with the options of ``--sbatch``.

    Args:
        typed: the user's options of ``dist-lora slurm`` by the name of the sbatch option that they set.
    """
    options = [SbatchOption.of(text) for text in extra]
    names = [option.name for option in options]
    for option in options:
        if not option.text.startswith("-") or not option.name:
            yield f"--sbatch: found {option.text!r}, expected an option of sbatch, like --qos=high"
        elif option.name in _OURS:
            yield f"--sbatch: {option.text} would contradict the script: {_OURS[option.name]}"
        if names.count(option.name) > 1 and options[names.index(option.name)] is option:
            yield f"--sbatch: --{option.name} is given {names.count(option.name)} times; give it once"
        for ours, own_option in typed.items():
            if own_option is not None and option.says(ours):
                yield f"{own_option} and --sbatch {option.text}: both set it; give one of them"


def value_of(extra: Sequence[str], name: str) -> str | None:
    """The value that the user's options give to an option of sbatch, or None."""
    return next((option.value for option in map(SbatchOption.of, extra) if option.name == name), None)


def is_given(extra: Sequence[str], name: str) -> bool:
    """Whether the user's options set what an option of ours sets."""
    return any(option.says(name) for option in map(SbatchOption.of, extra))


def sbatch_lines(ours: Mapping[str, str | None], extra: Sequence[str]) -> Iterator[str]:
    """The #SBATCH lines: ours, except those that the user's set, then the user's.

    Args:
        ours: values by name, empty for an option without one; None leaves it out.

    Raises:
        ConfigError: a value can't be written in such a line.
    """
    for name, value in ours.items():
        if value is not None and not is_given(extra, name):
            yield f"#SBATCH --{name}{'=' * bool(value)}{_quoted(value)}"
    yield from (f"#SBATCH {text.strip()}" for text in extra)


def _quoted(value: str) -> str:
    if '"' in value or "\n" in value:
        raise ConfigError(f"a line of #SBATCH can't hold {value!r}: choose a name without line breaks and \"")
    return f'"{value}"' if any(letter in value for letter in " \t'#\\") else value
