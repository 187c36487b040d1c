"""The commands: parse arguments, call one function, turn errors into one message and an exit code.

Nothing heavy is imported at module level: ``--help`` and a mistyped setting answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dist_lora.errors import EXIT_FAILED, ConfigError, DistLoraError, StopNow, exit_code_of
from dist_lora.supervision.told import report_error

if TYPE_CHECKING:
    from dist_lora.config.schema import Config
    from dist_lora.work import End
    from dist_lora.world.launcher import LaunchedRank
    from dist_lora.world.world import World

_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="dist-lora",
    help="LoRA fine-tuning of the Llama-3 herd on sharded GPUs.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=_HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Quantization(StrEnum):
    """``model.quant``, as an option."""

    NONE = "none"
    NF4 = "nf4"
    INT8 = "int8"


class StoredQuantization(StrEnum):
    """The formats that a base can be stored in."""

    NF4 = "nf4"


class MergedDtype(StrEnum):
    """The dtype of all tensors of a merged model."""

    BF16 = "bf16"
    FP32 = "fp32"


class Launcher(StrEnum):
    """What starts a node's ranks in a Slurm job."""

    SRUN = "srun"
    TORCHRUN = "torchrun"


ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value.", metavar="KEY=VALUE")]
NumRanks = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Local ranks to start; default: one per GPU, or one.")
]
Binds = Annotated[
    list[Path] | None,
    typer.Option(help="Path that the container needs besides those that the config names; may be repeated."),
]
GpuType = Annotated[
    str | None, typer.Option(help="The GPU's name in this Slurm, like h100 of gpu:h100:8 in `sinfo -o %G`.")
]
Exclusive = Annotated[
    bool | None,
    typer.Option(help="Whole nodes with all their memory; default: if the GPUs are all that a usual node has."),
]
Push = Annotated[
    str | None,
    typer.Option(help="Also upload the folder to this repository of the hub (made if there is none): ORG/NAME."),
]
Public = Annotated[bool, typer.Option("--public", help="With --push: the repository that is made is public.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from dist_lora.run_folder.log_file import software_version

        print(f"dist-lora {software_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA fine-tuning of the Llama-3 herd on sharded GPUs."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: NumRanks = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and one sample; train nothing.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record one step: a table in the log, a trace in the run's folder.")
    ] = False,
) -> None:
    """Train adapters; the same command resumes from the last checkpoint."""
    from dist_lora.work import EndedBefore
    from dist_lora.work import train as train_here

    if dry_run and profile:
        raise ConfigError("--profile: it records steps, and --dry-run takes none; leave one of them out")
    loaded = _load(config, overrides)
    try:
        train_here(loaded, enter=partial(_joined, nproc), is_dry=dry_run, makes_profile=profile)
    except EndedBefore as before:
        print(before, file=sys.stderr)
        sys.exit(before.exit_code)


@app.command()
def status(
    config: ConfigFile,
    overrides: Overrides = None,
    since: Annotated[float | None, typer.Option(help="Unix time in seconds: an older status is ignored.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's status; the exit code is that of its last attempt, 0 while it runs."""
    from dist_lora.run_folder.status import describe_status

    loaded = _load(config, overrides)
    run_status = describe_status(loaded.runs_dir / loaded.run, since_s=since)
    print(json.dumps(run_status.to_json()) if as_json else run_status.text)
    sys.exit(run_status.exit_code)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[list[int] | None, typer.Option("--nodes", help="Nodes (several with --sweep).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs per node.")] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Type of GPU: h100, a100-80gb, or its name in nvidia-smi (several with --sweep)."),
    ] = None,
    gpu_gib: Annotated[float | None, typer.Option(help="Memory in GiB of a GPU that --gpu doesn't know.")] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="With --gpu-gib: its dense TFLOPS (bf16, or the dtype of the run), for a speed."),
    ] = None,
    host_gib: Annotated[float | None, typer.Option(help="Host memory per node, in GiB.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Machines measured by `doctor --out`, instead of --gpu.")
    ] = None,
    is_sweep: Annotated[
        bool, typer.Option("--sweep", help="List the ways to run this model on these machines.")
    ] = False,
    is_simulated: Annotated[
        bool, typer.Option("--simulate", help="Also run the real step, on fake tensors in a simulated cluster.")
    ] = False,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="With --simulate: draw its memory to this file (.png, .svg), with the numbers in a .json next to it."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory per GPU, communication, time per step, and whether the run fits, before anything is started.

    Options that are left out are taken from the config's section machine, else from this machine.
    """
    from dist_lora.lora.planned import with_adapter
    from dist_lora.plan.command import MachineRequest
    from dist_lora.plan.command import plan as plan_here

    if timeline is not None and not is_simulated:
        raise ConfigError("--timeline: it shows a simulated step; add --simulate")
    if is_sweep and is_simulated:
        raise ConfigError("--sweep: it plans many configs, and --simulate runs the step of one; leave one of them out")
    loaded = with_adapter(_load(config, overrides))
    request = MachineRequest.of(loaded, nodes, gpus_per_node, gpu, gpu_gib, host_gib, measured, tflops)
    if is_simulated:
        from dist_lora.simulation.command import simulate_plan

        simulate_plan(loaded, request, timeline=timeline, prints_json=as_json)
        return
    plan_here(loaded, request, is_sweep=is_sweep, as_json=as_json)


@app.command()
def slurm(
    configs: Annotated[
        list[str],
        typer.Argument(
            help="YAML files (several for an array of jobs) and settings to change: key=value.",
            metavar="CONFIG... [KEY=VALUE]...",
        ),
    ],
    nodes: Annotated[int | None, typer.Option(help="Nodes; default: machine.nodes of the config.")] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(help="GPUs per node; default: machine.gpus_per_node, or 8 (1 with parallel.engine=none)."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Type of GPU, for the plan; default: machine.gpu, or h100-80gb.")
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help="What starts the ranks of a node.")] = Launcher.SRUN,
    time: Annotated[str | None, typer.Option(help="Time limit, like 36:00:00; default: by the plan.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    mail: Annotated[str | None, typer.Option(help="Address to notify at the job's end.")] = None,
    container: Annotated[
        str | None, typer.Option(help="Image to run in: a .sif file (apptainer), or a name (pyxis).")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="Variable to set, NAME=VALUE; may be repeated.")] = None,
    bind: Binds = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Command of bash to run first, like 'module load cuda'; may be repeated.")
    ] = None,
    gpu_type: GpuType = None,
    exclusive: Exclusive = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Option of sbatch, like --qos=high, in place of this script's own; may be repeated."),
    ] = None,
    cpus_per_gpu: Annotated[int, typer.Option(help="CPU cores per GPU.")] = 8,
    max_stalled: Annotated[
        int, typer.Option(help="Give up after this many attempts in a row without a newer checkpoint.")
    ] = 3,
    python: Annotated[
        str | None, typer.Option(help="The Python to start; default: this one, or a container's.")
    ] = None,
    is_submitted: Annotated[
        bool, typer.Option("--submit", help="Pass it to sbatch, and print the job's number.")
    ] = False,
) -> None:
    """Print a batch script for Slurm that saves, stops and requeues itself, filled in from the config's plan."""
    from dist_lora.files import file_exists
    from dist_lora.plan.hardware import find_gpu
    from dist_lora.slurm.command import make_job, submit
    from dist_lora.slurm.job import Request

    files = [name for name in configs if "=" not in name or file_exists(Path(name))]
    request = Request(
        configs=tuple(map(Path, files)), overrides=tuple(name for name in configs if name not in files),
        num_nodes=nodes, gpus_per_node=gpus_per_node, gpu=find_gpu(gpu) if gpu else None, launcher=launcher.value,
        python=python or ("python" if container else sys.executable), time=time, partition=partition, account=account,
        mail=mail, container=container, environment=tuple(env or ()), setup=tuple(setup or ()), extra=tuple(sbatch or ()),
        cpus_per_gpu=cpus_per_gpu, max_stalled=max_stalled, gpu_type=gpu_type, is_exclusive=exclusive,
        binds=tuple(bind or ()),
    )  # fmt: skip
    job = make_job(request)
    print(submit(job) if is_submitted else job.script, end="\n" if is_submitted else "")


@app.command()
def data(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="How many samples to show, with what is trained on marked.")] = 3,
    guard: Annotated[
        str | None,
        typer.Option(
            help="Say what of data.train this Guard finds unsafe: an adapter's folder, or a Guard's name, folder or hub id.",
            metavar="ADAPTER",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run's data are: counts, lengths, targets, what is cut or dropped, duplicates, samples, steps and hours.

    Tokenizes them into the cache that `train` reads. Needs the model's tokenizer and config.json, no weights and no GPU but with --guard.
    """
    from dist_lora.lora.planned import with_adapter

    loaded = with_adapter(_load(config, overrides))
    from dist_lora.overview.command import look

    look(loaded, num_samples=samples, as_json=as_json, guard=guard)


@app.command(name="eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter's folder; without it the base is evaluated.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write each sample's generated answer to this new file, as JSONL.")
    ] = None,
    nproc: NumRanks = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss, perplexity, and of generated answers exact matches and tool calls, if eval.exact_match and eval.tool_calls are set."""
    loaded = _load(config, overrides)
    from dist_lora.work import evaluate as evaluate_here

    def show(result: dict[str, Any]) -> None:
        print(json.dumps(result) if as_json else _as_table(result), flush=True)

    evaluate_here(loaded, enter=partial(_joined, nproc), adapter=adapter, predictions=predictions, show=show)


@app.command()
def gather(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder for its newest.")],
    out: Annotated[Path | None, typer.Option(help="The folder to create.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify the checkpoint, or each of the run's, byte by byte.")
    ] = False,
    push: Push = None,
    public: Public = False,
    as_json: AsJson = False,
) -> None:
    """Gather the ranks' shards into one adapter folder, as PEFT and vLLM load it. Needs no GPU and no other process.

    It says which servers take the adapter. With --verify every byte is read first, and nothing is written if any checkpoint
    is damaged, or without --out.
    """
    if out is None and (push is not None or as_json or not verify):
        given = "neither --out nor --verify is given" if not verify else "--push and --json are about --out"
        raise ConfigError(f"gather: {given}: name the folder to make with --out DIR")
    from dist_lora.checkpoint.gather import gather_adapter, verify_checkpoints
    from dist_lora.lora.adapter_folder import check_out
    from dist_lora.lora.deliver import Delivery, deliver
    from dist_lora.lora.push import check_push
    from dist_lora.lora.served import servers_of_adapter

    check_push(push, is_public=public)
    if out is not None:
        check_out(out)
    if verify:
        verify_checkpoints(checkpoint, report=logging.getLogger("dist_lora").info if as_json else print)
    if out is not None:
        gather_adapter(checkpoint, out=out)
        delivery = Delivery(push, public, as_json, again="the same command does it again")
        deliver(out, str(out), served=servers_of_adapter(out), delivery=delivery)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of all runs: runs_dir.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List all runs of a folder with their state, steps and losses, that which changed last first."""
    from dist_lora.run_folder.runs import list_runs, runs_table
    from dist_lora.text import in_columns

    rows = list_runs(folder)
    if as_json:
        print(json.dumps({"runs": [row.to_json() for row in rows]}))
    elif rows:
        print("\n".join(in_columns([*runs_table(rows)])))
    else:
        print(f"{folder}: no runs yet (dist-lora train makes them)")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder, like runs/NAME; several are laid side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; default: report.html in the run's folder, comparison.html beside several."
        ),
    ] = None,
) -> None:
    """Write an HTML page about a run, or about several side by side: curves, evaluations and settings."""
    from dist_lora.run_folder.report import write_report

    print(write_report(runs, out=out))


@app.command()
def learned(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or that of its run.")],
    base: Annotated[str | None, typer.Option(help="The base model: a member's name, a folder or a hub id.")] = None,
    without_base: Annotated[
        bool,
        typer.Option("--without-base", help="Don't read the base: the size of the changes, not what part of W it is."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show where an adapter has changed its base most, and in how many directions; record it for `report`.

    A run records it at its end, so that nothing is read but a small file; else the base's adapted weights are read once.
    """
    if base is not None and without_base:
        raise ConfigError("learned: --base MODEL and --without-base contradict each other: give one of them")
    from dist_lora.lora.adapter_folder import adapter_in
    from dist_lora.lora.learned import learned_table, sentences
    from dist_lora.text import in_columns
    from dist_lora.work import look_at_learned

    folder = adapter_in(adapter)
    record = look_at_learned(folder, base=base, reads_base=not without_base)
    if as_json:
        print(json.dumps({"adapter": str(folder), "linears": record.to_json()}))
        return
    print("\n".join([*in_columns(learned_table(record), has_numbers=True), *sentences(record)]))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    base: Annotated[str | None, typer.Option(help="The base model: a member's name, a folder or a hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Merge onto a base it was not trained on.")] = False,
    quant: Annotated[
        Quantization, typer.Option(help="Merge into the base's values after this quantization.")
    ] = Quantization.NONE,
    dtype: Annotated[
        MergedDtype | None, typer.Option(help="Dtype of the result; default: that of each tensor.")
    ] = None,
    push: Push = None,
    public: Public = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base weights: a model that runs at the base's speed. Streams from file to file."""
    from dist_lora.lora.deliver import Delivery, deliver
    from dist_lora.lora.push import check_push
    from dist_lora.lora.served import servers_of_merged
    from dist_lora.work import merge as merge_here

    check_push(push, is_public=public)
    report = merge_here(
        adapter, out=out, base=base, force=force, quant=quant.value, dtype=None if dtype is None else dtype.value
    )
    deliver(
        out,
        f"{out}: {report.changed_tensors} of the base's matrices changed, in {report.seconds:.1f} s",
        served=servers_of_merged(out, base=report.base, dtype=report.dtype),
        delivery=Delivery(
            push, public, as_json, again=f"push it by: hf upload{'' if public else ' --private'} {push} {out}"
        ),
    )


@app.command()
def fetch(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fetch a config's model, tokenizer and data from the hub, so that `train` needs no network afterwards."""
    loaded = _load(config, overrides)
    from dist_lora.prepare.fetch import fetch_all

    fetch_all(loaded, report=print)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A member's name, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    quant: Annotated[StoredQuantization, typer.Option(help="The format to store it in.")] = StoredQuantization.NF4,
) -> None:
    """Store a model in the values that `train` gives it with model.quant, so that each start reads less."""
    from dist_lora.prepare.quantize import quantize_model

    assert quant is StoredQuantization.NF4
    print(quantize_model(model, out=out))


@app.command()
def generate(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    prompt: Annotated[str | None, typer.Option(help="What to answer; without it a chat starts.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts: JSONL with prompt or messages, or a text a line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: the file to create, JSONL with answers.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model: a member's name, a folder or a hub id.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue plain text, without a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
) -> None:
    """Answer one prompt, a file of them, or chat, with an adapter and its base on this machine."""
    if (prompts is None) != (out is None) or (prompts is not None and prompt is not None):
        raise ConfigError("generate: --prompts FILE and --out FILE belong together, and --prompt TEXT is without them")
    from dist_lora.chat.command import answer, answer_file

    if prompts is not None and out is not None:
        count = answer_file(
            adapter,
            base=base,
            prompts=prompts,
            out=out,
            system=system,
            is_plain=plain,
            max_new_tokens=max_new_tokens,
        )
        print(f"{out}: {count:,} answers")
        return
    answer(adapter, base=base, prompt=prompt, system=system, is_plain=plain, max_new_tokens=max_new_tokens)


@app.command()
def explain(config: ConfigFile, overrides: Overrides = None) -> None:
    """Explain what LoRA does to the config's model: which linear layers, how many weights, what that saves."""
    from dist_lora.lora.planned import with_adapter
    from dist_lora.plan.explain import explain as explained

    print(explained(with_adapter(_load(config, overrides))))


@app.command()
def herd(as_json: AsJson = False) -> None:
    """List the Llama 3 models: fine-tuned, multilingual, long context or tool use; release and licence."""
    from dist_lora.herd.members import herd_rows, herd_table
    from dist_lora.text import in_columns

    print(json.dumps({"members": herd_rows()}) if as_json else "\n".join(in_columns(herd_table())))


configs = typer.Typer(invoke_without_command=True, context_settings=_HELP, rich_markup_mode=None)
app.add_typer(configs, name="configs")


@configs.callback()
def list_configs(context: typer.Context, as_json: AsJson = False) -> None:
    """List a config for each member of the herd, by method and machine, with the memory it needs."""
    if context.invoked_subcommand is None:
        from dist_lora.plan.presets import preset_rows, preset_table
        from dist_lora.text import in_columns

        print(json.dumps({"configs": preset_rows()}) if as_json else "\n".join(in_columns(preset_table())))
    elif as_json:
        raise ConfigError("--json: it is about the list; `configs show NAME` prints YAML")


@configs.command()
def show(name: Annotated[str, typer.Argument(help="One of the list.", metavar="NAME")]) -> None:
    """Print a config to start from: `dist-lora configs show NAME > my-run.yaml`."""
    from dist_lora.plan.presets import find_preset, text_of

    print(text_of(find_preset(name)), end="")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A run to check: its folder, its model, its dtypes.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    nproc: NumRanks = None,
    out: Annotated[Path | None, typer.Option(help="Write what was measured, for `plan --measured`.")] = None,
    deadline: Annotated[float, typer.Option(min=1, help="The most seconds that a check may take.")] = 60,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, devices, disk, network, clocks and speed; what is wrong, and what to do.

    Under a launcher (as for `train`) also the links between the ranks. Exit code 1 if anything is a fault.
    """
    loaded = None if config is None else _load(config, overrides)
    from dist_lora.world.launcher import launched_rank

    launched = launched_rank(os.environ)
    _check_nproc(nproc, launched)
    if out is not None and (launched is None or launched.world_rank == 0):
        from dist_lora.files import refuse_file

        refuse_file(out, option="--out", is_replaced=True)
    if launched is None:
        _start_ranks(nproc or _num_gpus())
    from dist_lora.doctor.command import Request, diagnose

    sys.exit(diagnose(launched, Request(loaded, out, as_json, deadline)))


def _load(config: Path, overrides: list[str] | None) -> Config:
    from dist_lora.work import load

    return load(config, overrides or ())


def _as_table(result: dict[str, Any]) -> str:
    from dist_lora.evaluation.tool_calls import by_set, lines_of
    from dist_lora.evaluation.verdicts import guard_table

    lines: list[str] = []
    for name, value in result.items():
        if name == "guard":
            for of_set, report in _by_set(value):
                lines += ["", *of_set, *guard_table(report).splitlines(), ""]
            continue
        if name == "tool_calls":
            for of_name, calls in by_set(value).items():
                lines += [*([of_name] if of_name else []), *lines_of(calls)]
            continue
        if name == "sets":
            lines += _table_of_sets(value)
            continue
        if name == "exact_match":
            value = f"{value['correct']} of {value['total']} ({value['correct'] / value['total']:.1%})"
        lines.append(f"{name:14} {value:.6g}" if isinstance(value, float) else f"{name:14} {value}")
    return "\n".join(lines)


def _by_set(value: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """A Guard's reports, each with its held-out set's name as a line before it; of a single set none."""
    return [([], value)] if "by_category" in value else [([name], report) for name, report in value.items()]


def _table_of_sets(sets: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each held-out set."""
    from dist_lora.text import in_columns

    names = list(next(iter(sets.values())))
    rows = [["set", *(name.replace("_", " ") for name in names)]]
    for name, facts in sets.items():
        cells = [f"{fact['correct']} of {fact['total']}" if isinstance(fact, dict) else fact for fact in facts.values()]
        rows.append([name, *(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)])
    return list(in_columns(rows))


@contextmanager
def _joined(
    nproc: int | None, config: Config, *, end: End = lambda error: None, needs_all: bool = True
) -> Iterator[World]:
    """The ``World`` of this rank, started by a launcher or alone; else it starts local ranks.

    Args:
        needs_all: use all GPUs; else one process, unless a launcher or ``nproc`` says otherwise.
        end: called by the rank that reports an error to the user, after the report.

    Raises:
        SystemExit: with the exit code of the local ranks, or of an error, which is reported.
    """

    def report(error: BaseException, who: str = "") -> None:
        report_error(error, who)
        end(error)

    try:
        from dist_lora.world.launcher import launched_rank

        launched = launched_rank(os.environ)
        _check_nproc(nproc, launched)
        if launched is not None and launched.world_rank > 0:
            logging.getLogger("dist_lora").setLevel(logging.ERROR)  # the first rank reports on behalf of all
        if launched is None:
            _start_ranks(nproc or (_num_gpus() if needs_all else 1))
        from dist_lora.supervision.run_rank import joined

        with joined(launched, config, report=report) as world:
            yield world
    except StopNow as error:  # before there was a rank that could report it, or while one reported another error
        report(error)
        sys.exit(error.exit_code)


def _check_nproc(nproc: int | None, launched: LaunchedRank | None) -> None:
    if launched is not None and nproc not in (None, launched.local_size):
        raise ConfigError(
            f"--nproc: found {nproc}, and the launcher started {launched.local_size} processes on each node "
            f"({launched.world_size} in total). Leave --nproc out under a launcher, which says how many there are."
        )


def _start_ranks(num_ranks: int) -> None:
    """Run this command as ``num_ranks`` local ranks and exit with their code; one is this process: then it returns."""
    if num_ranks > 1:
        from dist_lora.supervision.local_ranks import run_ranks

        sys.exit(run_ranks(sys.argv[1:], num_ranks=num_ranks))


def _num_gpus() -> int:
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class _Lines(logging.Formatter):
    """A line as it is; a warning is called one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's message."""
        text = super().format(record)
        is_unmarked = record.levelno == logging.WARNING and not text.lower().startswith("warning")
        return f"warning: {text}" if is_unmarked else text


def main() -> NoReturn:
    """Run a command; exits with the codes of ``errors``."""
    # Before torch is imported: a lost peer makes its C++ parts (c10d, gloo) print stacks that bury our own sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logger = logging.getLogger("dist_lora")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines("%(message)s"))
        logger.addHandler(handler)
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(EXIT_FAILED)
    except DistLoraError as error:
        from dist_lora.world.launcher import is_first_of_node

        if is_first_of_node(os.environ):  # the other ranks of this node have the same error
            report_error(error)
        sys.exit(exit_code_of(error))
    sys.exit(0)
