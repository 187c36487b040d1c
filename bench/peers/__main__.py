"""dist_lora beside PEFT, torchtune and TRL on this machine's CPU, in turn, on the same tokens, with their losses compared.

    bash launch/quickstart.sh                              # once: SmolLM2-135M
    python -m bench.peers --gsm8k FOLDER [ROW ...]         # all rows that aren't measured yet, or some: see --help
    python -m bench.peers                                  # the table of what is measured

It may be interrupted: a row that is done stays so, in .cache/peers-rows.json; --again measures it anew.
Peers run in .cache/peers, which the first run makes (``pip``, by constraints.txt). Each contestant is a process (or one per rank)
that waits until it is asked for a step, so that the steps of a row alternate: A B C A B C ... Medians are of ``--turns`` such
rounds, after one that isn't counted; ratios are medians over the rounds. Beside wall time stands processor time (of all ranks, user
and system): on a machine with other work only that one says much. ``of the products``: the processor time of the products with
frozen weights alone, as a share of ours; no trainer can exceed 1. Memory is the peak resident set of the fullest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.kept import Kept
from bench.peers.contestant import Contestant, Failed, in_turn, largest_difference, median, ratio
from bench.peers.environment import ROOT
from bench.peers.scaling import scaling
from bench.peers.start import start
from bench.peers.work import Work

MEASURED = Kept(ROOT / ".cache" / "peers-rows.json")  # the lines of each row
LOSSES_DIFFER = 1e-3  # relative, over the steps of a row: more is other work


@dataclass(frozen=True)
class Settings:
    """The command line's."""

    gsm8k: Path
    model: Path
    turns: int
    threads: int
    limit_s: float  # after which a row begins no further round


@dataclass(frozen=True)
class Row:
    """Ours against ``peers``."""

    title: str
    work: Work
    peers: tuple[str, ...]
    has_products: bool = True
    compares_documents: bool = False


ROWS = {
    "peft": Row("1 process", Work(), ("peft",)),
    "others": Row("1 process", Work(), ("torchtune", "trl")),
    "node": Row(
        "2 ranks, base_shard=node",
        Work(ranks=2, base_shard="node"),
        ("fsdp2", "zero3"),
        has_products=False,
    ),
    "nf4": Row(
        "2 ranks, base_shard=node, NF4",
        Work(ranks=2, base_shard="node", quant="nf4"),
        ("fsdp2", "zero3"),
        has_products=False,
    ),
    "gpu": Row(
        "2 ranks, base_shard=gpu", Work(ranks=2, base_shard="gpu"), ("ddp",), has_products=False
    ),
    "answers": Row(
        "GSM8K's answers, prompts masked, 8 documents", Work("answers", batch=8), ("peft",)
    ),
    "batches": Row(
        "GSM8K, 16 documents, PEFT's padded", Work("whole", batch=16), ("peft",), compares_documents=True
    ),
}  # fmt: skip


def duel(row: Row, settings: Settings) -> list[str]:
    """The row's lines, one for each peer."""
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name, contextlib.ExitStack() as running:
        job = row.work.prepare(gsm8k=settings.gsm8k, model=settings.model, folder=Path(name) / "work")

        def begin(kind: str, ranks: int) -> Contestant:
            return running.enter_context(Contestant(kind, job, ranks, settings.threads))

        ours, peers, lines = begin("ours", row.work.ranks), [], []
        for kind in row.peers:
            try:
                peers.append(begin(kind, row.work.ranks))
            except Failed as failed:
                lines.append(f"| {row.title} | {kind} | doesn't run: {str(failed).splitlines()[-1][:120]} | | | | | |")
        products = [begin("products", 1)] if row.has_products else []
        in_turn([ours, *peers, *products], settings.turns, limit_s=settings.limit_s)
        share = f"{median(products[0], 'cpu_s') / median(ours, 'cpu_s'):.2f}" if products else ""
        for peer in peers:
            same = f"{largest_difference(ours, peer):.0e}"
            if row.compares_documents:
                same += f" ({documents_differ(ours, peer):.0e} per document)"
            if largest_difference(ours, peer) > LOSSES_DIFFER:
                same += ": not the same work"
            lines.append(
                f"| {row.title} | {peer.kind} | {median(ours, 'cpu_s'):.1f} and {median(peer, 'cpu_s'):.1f} | "
                f"**{ratio(ours, peer, 'cpu_s'):.2f}** ({ratio(ours, peer, 'wall_s'):.2f}) | {share} | "
                f"{ours.turns[-1].peak_bytes / 2**30:.2f} and {peer.turns[-1].peak_bytes / 2**30:.2f}, "
                f"**{ours.turns[-1].peak_bytes / peer.turns[-1].peak_bytes:.2f}** | {same} |"
            )
        return lines


def documents_differ(ours: Contestant, peer: Contestant) -> float:
    """The largest relative difference of a document's loss, by the adapters as they are after the row's steps."""
    losses = [contestant.ask("documents")[0]["losses"] for contestant in (ours, peer)]
    return max(abs(theirs - mine) / mine for mine, theirs in zip(*losses, strict=True))


def short_documents(settings: Settings) -> list[str]:
    """50 documents of 41 tokens beside one of 2,048, both ours."""
    works = (Work(batch=50, tokens=41), Work(batch=1, tokens=2048))
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name, contextlib.ExitStack() as running:
        many, one = (
            running.enter_context(
                Contestant(
                    "ours",
                    work.prepare(gsm8k=settings.gsm8k, model=settings.model, folder=Path(name) / str(work.batch)),
                    threads=settings.threads,
                )
            )
            for work in works
        )
        in_turn([many, one], settings.turns, limit_s=settings.limit_s)
        return [
            f"| 50 documents of 41 tokens | dist_lora itself, one document of 2,048 | {median(many, 'cpu_s'):.1f} and {median(one, 'cpu_s'):.1f} | "
            f"**{ratio(many, one, 'cpu_s'):.2f}** ({ratio(many, one, 'wall_s'):.2f}) | | | |"
        ]


HEAD = """| work | peer | processor seconds per step, ours and the peer's | ours is faster by (wall time) | of the products | peak GiB, ours and the peer's | losses differ by |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    apart: dict[str, Callable[[Settings], list[str]]] = {"short": short_documents, "start": start, "scaling": scaling}
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {' '.join((*ROWS, *apart))}")
    parser.add_argument("--gsm8k", type=Path, help="the folder of its train.jsonl; without it nothing is measured")
    parser.add_argument("--again", action="store_true", help="also rows that are measured already")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--minutes", type=float, default=60, help="after which a row begins no further round")
    given = parser.parse_args()
    unknown = set(given.rows) - {*ROWS, *apart}
    if unknown:
        parser.error(f"no such row: {' '.join(sorted(unknown))}")
    every = (*ROWS, *apart)
    wanted = [name for name in every if not given.rows or name in given.rows]
    settings = given.gsm8k and Settings(
        given.gsm8k, given.model.resolve(), given.turns, given.threads, 60 * given.minutes
    )
    for name in wanted if settings else ():
        measure = partial(apart[name], settings) if name in apart else partial(duel, ROWS[name], settings)
        if not MEASURED.measure(name, measure, again=given.again):
            print(f"{name} is measured already, maybe with other options; --again measures it anew", file=sys.stderr)
    lines = {name: of_row for name, of_row in MEASURED.read().items() if name in wanted}
    if set(lines) != {"scaling"}:
        print(HEAD)
    for name in filter(lines.__contains__, every):
        print("\n".join(lines[name]))


if __name__ == "__main__":
    main()
