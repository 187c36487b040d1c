"""A job as Slurm's variables describe it: its hosts, tasks per node and rendezvous. Needs no torch and no Slurm."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

from dist_lora.errors import ConfigError

MOST_HOSTS = 65536  # Slurm's own limit of a range
FIRST_SPECIAL_STEP = 0xFFFFFF00  # batch, extern and interactive steps are numbered from the end of 32 bits
# Below Linux's range of ports for outgoing connections (from 32768), any of which may be taken by chance.
FIRST_PORT, NUM_PORTS = 15000, 17000
PORTS_PER_JOB = 7  # jobs with consecutive ids differ by this many ports, the steps of a job by one

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_TASKS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


def hosts_of(nodelist: str) -> list[str]:
    """The hosts of a list as Slurm writes it, in its order: ``gpu[003-004,010]`` is gpu003, gpu004 and gpu010.

    The same as ``scontrol show hostnames``, without scontrol. Several brackets, and text after the last one, are
    supported.

    Raises:
        ConfigError: it isn't such a list.
    """
    hosts: list[str] = []
    for word in _words(nodelist):
        for host in _expand(word, nodelist):
            hosts.append(host)
            if len(hosts) > MOST_HOSTS:
                raise _no_nodelist(nodelist, f"more than {MOST_HOSTS} hosts")
    if not hosts:
        raise _no_nodelist(nodelist, "no host")
    return hosts


def _words(nodelist: str) -> Iterator[str]:
    """The parts between the commas outside brackets."""
    depth, word = 0, ""
    for letter in nodelist.strip():
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _no_nodelist(nodelist, "brackets that don't match")
        if letter == "," and not depth:
            yield word
            word = ""
        else:
            word += letter
    if depth:
        raise _no_nodelist(nodelist, "a bracket that is not closed")
    yield word


def _expand(word: str, nodelist: str) -> Iterator[str]:
    """The hosts of one part; the last bracket counts fastest."""
    if not word:
        return
    texts_and_ranges = _BRACKETS.split(word)
    choices = [
        [part] if i % 2 == 0 else _numbers(part, nodelist) for i, part in enumerate(texts_and_ranges)
    ]  # every second part was in brackets
    yield from map("".join, itertools.product(*choices))


def _numbers(ranges: str, nodelist: str) -> list[str]:
    """``08-10,7`` as 08, 09, 10, 7: as many digits as the range begins with."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _no_nodelist(nodelist, f"[{ranges}]: {part!r} is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < MOST_HOSTS:
            raise _no_nodelist(nodelist, f"[{ranges}]: {part} counts down or is longer than {MOST_HOSTS}")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _no_nodelist(nodelist: str, found: str) -> ConfigError:
    return ConfigError(
        f"the node list {nodelist!r}: found {found}; expected hosts as Slurm writes them: n1,gpu[003-004,010]"
    )


def tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` as [2, 2, 2, 1]: the tasks on each node of a step.

    Raises:
        ConfigError: it has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None or int(match[2] or 1) > MOST_HOSTS:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: found {text!r}, expected tasks per node as in 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def is_step(environment: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process as a task of a step.

    A batch shell has no step id; the shell that ``salloc`` opens on a node has one of the special ones.
    """
    text = environment.get("SLURM_STEP_ID", "")
    return text.isdecimal() and int(text) < FIRST_SPECIAL_STEP


def nodes_of(environment: Mapping[str, str]) -> list[str]:
    """The hosts of this step, or of the job in its batch shell; empty for a single node without a name.

    Raises:
        ConfigError: several nodes without a list of them, or a list that can't be parsed.
    """
    kinds = ("STEP", "JOB") if is_step(environment) else ("JOB",)
    names = [*(f"SLURM_{kind}_NODELIST" for kind in kinds), "SLURM_NODELIST"]
    nodelist = next((environment[name] for name in names if environment.get(name)), None)
    if nodelist is not None:
        return hosts_of(nodelist)
    counts = [*(f"SLURM_{kind}_NUM_NODES" for kind in kinds), "SLURM_NNODES"]
    num_nodes = next((environment[name] for name in counts if environment.get(name)), "an unknown number of")
    if num_nodes == "1":
        return []
    raise ConfigError(
        f"{' and '.join(names)} are not set, and the job has {num_nodes} nodes: the rendezvous host is unknown. "
        "Start it within a job (by sbatch, salloc or srun), and pass the job's SLURM_ variables on to where it runs."
    )


def rendezvous_of(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the rendezvous of this step (or of this job, in its batch shell).

    The first host of the node list, and a port derived from the ids of job and step, so that jobs on one machine don't
    collide; MASTER_ADDR and MASTER_PORT override them where they are set.

    Raises:
        ConfigError: several nodes and no list of them, no job id, or a loopback address for several nodes.
    """
    hosts = nodes_of(environment)
    host = environment.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else "127.0.0.1")
    if len(hosts) > 1 and (host == "localhost" or host.startswith("127.") or host == "::1"):
        raise ConfigError(
            f"MASTER_ADDR: found {host}, and the job has {len(hosts)} nodes, each of which would connect to itself. "
            f"Unset it (then {hosts[0]} is used), or set it to a host that all nodes can reach."
        )
    return host, _port_of(environment)


def _port_of(environment: Mapping[str, str]) -> int:
    port = environment.get("MASTER_PORT")
    if port:
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"MASTER_PORT: found {port!r}, expected a number from 1 to 65535")
        return int(port)
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise ConfigError(
            f"SLURM_JOB_ID: found {job!r}, expected the job's id; set MASTER_PORT, or start it within a job"
        )
    step = int(environment["SLURM_STEP_ID"]) if is_step(environment) else PORTS_PER_JOB - 1
    return FIRST_PORT + (int(job) * PORTS_PER_JOB + step) % NUM_PORTS
