"""The batch script of a job: #SBATCH options, how the ranks are started, and what happens when they end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files

from dist_lora.config.schema import Config
from dist_lora.slurm.job import Needs, Request

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
        _comments(request, needs),
        _settings(request, runs),
        _end(request, needs),
    )
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _sbatch_lines(request: Request, runs: Sequence[Config], needs: Needs) -> Iterator[str]:
    yield "#!/bin/bash"
    tasks = needs.machines.gpus_per_node if request.launcher == "srun" else 1
    cpus = request.cpus_per_gpu * needs.machines.gpus_per_node // tasks
    options: list[str | None] = [
        f"--job-name={_word(runs[0].run if len(runs) == 1 else 'dist-lora')}",
        f"--nodes={needs.machines.num_nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={needs.machines.gpus_per_node}",
        f"--cpus-per-task={cpus}",
        "--mem=0" if needs.host_gib is None else f"--mem={needs.host_gib}G",
        f"--time={request.time or _clock(needs.minutes)}" if request.time or needs.minutes else None,
        f"--signal=USR1@{needs.notice_s}",
        "--requeue",
        "--open-mode=append",
        f"--array=0-{len(runs) - 1}" if len(runs) > 1 else None,
        f"--output=slurm-%x-{'%A_%a' if len(runs) > 1 else '%j'}.out",
        f"--mail-user={request.mail}" if request.mail else None,
        "--mail-type=END,FAIL,REQUEUE,TIME_LIMIT" if request.mail else None,
        f"--partition={request.partition}" if request.partition else None,
        f"--account={request.account}" if request.account else None,
        *request.extra,
    ]
    yield from (f"#SBATCH {option}" for option in options if option)
    for name, value in (("partition", request.partition), ("account", request.account), ("time", request.time)):
        if not value and not (name == "time" and needs.minutes):
            yield f"##SBATCH --{name}=... # if your cluster requires it"


def _comments(request: Request, needs: Needs) -> Iterator[str]:
    yield from (f"# {line}" for line in needs.lines)
    yield f"# All ranks save and stop {needs.notice_s} s before the time limit, or when Slurm preempts the job; it is then requeued"
    yield "# automatically and resumes from there. Mistakes and damaged files (exit codes 2, 3 and 4) end it for good."
    yield f"# It gives up after {request.max_stalled} starts in a row that have saved no newer step."
    yield "# Submit it from the folder that the paths below are relative to; all nodes must see that folder."


def _settings(request: Request, runs: Sequence[Config]) -> Iterator[str]:
    yield "set -uo pipefail"
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
    for pair in request.environment:
        name, _, value = pair.partition("=")
        yield f"export {name}={shlex.quote(value)}"
    yield from request.setup


def _run_dir(config: Config) -> str:
    return str(config.runs_dir / config.run)


def _end(request: Request, needs: Needs) -> Iterator[str]:
    text = files("dist_lora.slurm").joinpath("job.sh").read_text()
    yield text.replace("@START@", "\n".join(_start(request, needs))).rstrip()


def _start(request: Request, needs: Needs) -> Iterator[str]:
    """The command that starts all ranks, in the background."""
    if request.launcher == "torchrun":
        yield _HEAD
    # srun doesn't inherit --cpus-per-task (since Slurm 22.05), and without --kill-on-bad-exit waits for the last task.
    srun = ['srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"']
    container = request.container
    if container and container.endswith(".sif"):
        run = [f'apptainer exec --nv --bind "$PWD" {shlex.quote(container)}']
    elif container:
        srun.append(
            f'--container-image={shlex.quote(container)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD"'
        )
        run = []
    else:
        run = []
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


def _clock(minutes: int | None) -> str:
    return f"{(minutes or 0) // 60}:{(minutes or 0) % 60:02d}:00"


def _word(text: str) -> str:
    """A job name that is valid for sbatch and in file names."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
