"""The batch script of a job: #SBATCH options, how the ranks are started, and what happens when they end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from dist_lora.config.schema import Config
from dist_lora.slurm.binds import bound_folders
from dist_lora.slurm.job import Needs, Request
from dist_lora.slurm.options import is_given, sbatch_lines
from dist_lora.text import count

# The same endpoint as that of ``world.slurm.rendezvous_of``; a test compares both.
_HEAD = """\
# Rendezvous of torchrun's agents: the first host of the list (gpu003 of gpu[003-004,010]), on a port of this job.
first_host() {
    local list=$1 host='' numbers
    while [[ -n $list && $list != ,* ]]; do
        if [[ $list == '['* ]]; then
            numbers=${list:1}
            host+=${numbers%%[],-]*}
            list=${list#*]}
        else
            host+=${list:0:1}
            list=${list:1}
        fi
    done
    printf '%s' "$host"
}
head=$(first_host "$SLURM_JOB_NODELIST")
port=$((15000 + (SLURM_JOB_ID * 7 + 6) % 17000))
say "rendezvous of torchrun's agents: $head:$port"
"""


def script_of(request: Request, runs: Sequence[Config], needs: Needs) -> str:
    """The whole script. Paths are as typed: it must be submitted from the folder that they are relative to."""
    parts = (
        _sbatch_lines(request, runs, needs),
        _comments(request, runs, needs),
        _settings(request, runs),
        _end(request, runs, needs),
    )
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def log_folders(request: Request, runs: Sequence[Config]) -> list[Path]:
    """The folders that must exist when the script is submitted: Slurm opens the job's log there before it starts it."""
    if is_given(request.extra, "output"):
        return []
    return [_log_folder(runs)]


def _log_folder(runs: Sequence[Config]) -> Path:
    return runs[0].runs_dir if len(runs) > 1 else Path(_run_dir(runs[0]))


def _sbatch_lines(request: Request, runs: Sequence[Config], needs: Needs) -> Iterator[str]:
    yield "#!/bin/bash"
    gpus, extra = needs.machines.gpus_per_node, request.extra
    tasks = gpus if request.launcher == "srun" else 1
    log = f"{_log_folder(runs)}/".replace("%", "%%") + ("slurm-%x-%A_%a.out" if len(runs) > 1 else "slurm-%j.out")
    has_all_memory = needs.is_exclusive or needs.host_gib is None
    options: dict[str, str | None] = {
        "job-name": _job_name(runs),
        "nodes": str(needs.machines.num_nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": f"{request.gpu_type}:{gpus}" if request.gpu_type else str(gpus),
        "cpus-per-task": str(request.cpus_per_gpu * gpus // tasks),
        "mem": "0" if has_all_memory else f"{needs.host_gib}G",
        "exclusive": "" if needs.is_exclusive else None,
        "time": request.time or (_clock(needs.minutes) if needs.minutes else None),
        "signal": f"USR1@{needs.notice_s}",
        "requeue": "",
        "open-mode": "append",
        "array": f"0-{len(runs) - 1}" if len(runs) > 1 else None,
        "output": log,
        "mail-user": request.mail or None,
        "mail-type": "END,FAIL,REQUEUE,TIME_LIMIT" if request.mail else None,
        "partition": request.partition or None,
        "account": request.account or None,
    }
    yield from sbatch_lines(options, extra)
    for name in ("partition", "account", "time"):
        if options[name] is None and not is_given(extra, name):
            yield f"##SBATCH --{name}=... # if your cluster requires it"


def _comments(request: Request, runs: Sequence[Config], needs: Needs) -> Iterator[str]:
    yield from (f"# {line}" for line in needs.lines)
    if needs.is_exclusive and request.is_exclusive is None and not is_given(request.extra, "exclusive"):
        gpus = needs.machines.gpus_per_node
        yield f"# It takes whole nodes with all their memory, taking {gpus} GPUs for all of a node's: --no-exclusive if yours have more."
    yield f"# All ranks save and stop {needs.notice_s} s before the time limit, or when Slurm preempts the job; it is then requeued"
    yield "# automatically and resumes from there. Mistakes and damaged files (exit codes 2, 3 and 4) end it for good."
    yield f"# It gives up after {count(request.max_stalled, 'start')} in a row that {'has' if request.max_stalled == 1 else 'have'} saved no newer step."
    yield "# Submit it from the folder that the paths below are relative to; all nodes must see that folder."
    for folder in log_folders(request, runs):
        yield f"# Slurm opens the log before it starts this script, so first (--submit does it): mkdir -p {shlex.quote(str(folder))}"


def _settings(request: Request, runs: Sequence[Config]) -> Iterator[str]:
    yield "set -uo pipefail"
    for pair in request.environment:
        name, _, value = pair.partition("=")
        yield f"export {name}={shlex.quote(value)}"
    if request.setup:
        yield from _setup(request.setup)
    yield f"python={shlex.quote(request.python)}"
    if len(runs) == 1:
        yield f"config={shlex.quote(str(request.configs[0]))}"
        yield f"run_dir={shlex.quote(_run_dir(runs[0]))}"
    else:
        yield f"configs=({shlex.join(map(str, request.configs))})"
        yield f"run_dirs=({shlex.join(map(_run_dir, runs))})"
        yield "config=${configs[SLURM_ARRAY_TASK_ID]}"
        yield "run_dir=${run_dirs[SLURM_ARRAY_TASK_ID]}"
    yield f"overrides=({shlex.join(request.overrides)})"
    yield f"max_stalled={request.max_stalled}"
    yield 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-' + str(request.cpus_per_gpu) + '}"'


def _setup(commands: Sequence[str]) -> Iterator[str]:
    """The commands of ``--setup``, each as an interactive shell would run it; the job ends where one fails."""
    yield "setup_failed() {"
    yield '    echo "error: --setup: exit code $1 from: $2" >&2'
    yield "    exit 2"
    yield "}"
    yield "set +uo pipefail # conda and .bashrc read variables that aren't set"
    for command in commands:
        yield f'{{\n{command}\n}} || setup_failed "$?" {shlex.quote(command)}'
    yield "set +e -uo pipefail"


def _run_dir(config: Config) -> str:
    return str(config.runs_dir / config.run)


def _job_name(runs: Sequence[Config]) -> str:
    return _word(runs[0].run if len(runs) == 1 else "dist-lora")


def _end(request: Request, runs: Sequence[Config], needs: Needs) -> Iterator[str]:
    text = files("dist_lora.slurm").joinpath("job.sh").read_text()
    yield text.replace("@START@", "\n".join(_start(request, runs, needs))).rstrip()


def _start(request: Request, runs: Sequence[Config], needs: Needs) -> Iterator[str]:
    """The command that starts all ranks, in the background."""
    if len(runs) > 1 and log_folders(request, runs):
        # The log of a task lies beside those of the others, since Slurm knows no name of a run.
        name = f"slurm-${{SLURM_JOB_NAME:-{_job_name(runs)}}}-${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.out"
        yield f'mkdir -p "$run_dir" && ln -sf "$(realpath {shlex.quote(str(_log_folder(runs)))})/{name}" "$run_dir/"\n'
    if request.launcher == "torchrun":
        yield _HEAD
    # srun doesn't inherit --cpus-per-task (since Slurm 22.05), and without --kill-on-bad-exit waits for the last task.
    srun = ['srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"']
    run = []
    if request.container:
        yield from _bound(request, runs)
        image = shlex.quote(request.container)
        if _is_file(request.container):
            run = [f'apptainer exec --nv --bind "${{mounts:1}}" --pwd "$PWD" {image}']
        else:
            srun.append(f'--container-image={image} --container-mounts="${{mounts:1}}" --container-workdir="$PWD"')
    if request.launcher == "torchrun":
        # By default torchrun dies of USR1, and kills its ranks 30 s after a signal.
        run += [
            '"$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES"',
            f'--nproc-per-node={needs.machines.gpus_per_node} --rdzv-backend=c10d --rdzv-endpoint="$head:$port"',
            '--rdzv-id="$attempt" --max-restarts=0 --shutdown-timeout=600',
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            "-m dist_lora train",
        ]
    else:
        run += ['"$python" -m dist_lora train']
    yield " \\\n    ".join([*srun, *run, '"$config" "${overrides[@]}" &'])


def _is_file(container: str) -> bool:
    """Whether it is an image of apptainer, and not a name or a file of pyxis (.sqsh)."""
    return container.endswith(".sif")


def _bound(request: Request, runs: Sequence[Config]) -> Iterator[str]:
    """Sets ``mounts``: what the container sees of this machine, at the same paths.

    A container may have a home folder of its own, so the caches that lie in the user's are named.
    """
    assert request.container is not None
    folders = bound_folders(request.configs, runs, request.binds)
    yield 'export HF_HOME="${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}"'
    yield 'export DIST_LORA_CACHE="${DIST_LORA_CACHE:-$HOME/.cache/dist_lora}"'
    written = {str(path.expanduser()) for config in runs for path in (config.runs_dir, config.data.cache_dir) if path}
    yield f'mkdir -p "$HF_HOME" "$DIST_LORA_CACHE" {shlex.join(sorted(written))}'
    yield f'binds=("$PWD" "$HF_HOME" "$DIST_LORA_CACHE" {shlex.join(map(str, folders))})'
    yield '[[ -z ${HF_HUB_CACHE-} ]] || binds+=("$HF_HUB_CACHE")'
    yield '[[ $(pwd -P) == "$PWD" ]] || binds+=("$(pwd -P)")'
    yield "mounts=''"
    yield 'for bind in "${binds[@]}"; do mounts+=",$bind:$bind"; done\n'


def _clock(minutes: int | None) -> str:
    return f"{(minutes or 0) // 60}:{(minutes or 0) % 60:02d}:00"


def _word(text: str) -> str:
    """A job name that is valid for sbatch and in file names."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
