"""What the comparison with other trainers prints is what its turns say, and all get the same tokens."""

from __future__ import annotations

import json
import sys

from bench.kept import Kept
from bench.peers import __main__ as bench
from bench.peers.contestant import Contestant, Turn, largest_difference, median, ratio
from bench.peers.padding import padded
from bench.peers.turns import Job

JOB = Job("", "", "", 16, 32, 1e-4, "none", "")


def contestant(seconds: list[float], losses: list[float]) -> Contestant:
    turns = [Turn(2 * cpu_s, cpu_s, 0, loss) for cpu_s, loss in zip(seconds, losses, strict=True)]
    return Contestant("ours", JOB, turns=turns)


def test_the_first_turn_is_not_timed_but_its_loss_is_compared() -> None:
    ours, peer = contestant([100, 1, 2, 3], [2.0, 1, 1, 1]), contestant([1, 2, 5, 6], [2.5, 1, 1, 1])
    assert (median(ours, "cpu_s"), median(peer, "wall_s")) == (2, 10)
    assert ratio(ours, peer, "cpu_s") == 2  # the median of 2, 2.5 and 2, not the ratio of medians
    assert largest_difference(ours, peer) == 0.25


def test_documents_are_padded_to_the_longest_and_padding_is_masked_and_no_target() -> None:
    batch = padded([([5, 6, 7], [-100, 6, 7]), ([8], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in padded([([5, 6], [5, 6]), ([7, 8], [7, 8])])


def test_rows_that_are_measured_stay_so_and_are_printed_without_measuring(monkeypatch, tmp_path, capsys) -> None:
    measured = {"gpu": ["| 2 ranks | ddp |"], "peft": ["| 1 process | peft |"]}
    monkeypatch.setattr(bench, "MEASURED", Kept(tmp_path / "rows.json"))
    monkeypatch.setattr(bench, "duel", lambda row, settings: [f"| {row.title} | anew |"])
    (tmp_path / "rows.json").write_text(json.dumps(measured))
    monkeypatch.setattr(sys, "argv", ["bench.peers"])
    bench.main()
    assert capsys.readouterr().out == f"{bench.HEAD}\n| 1 process | peft |\n| 2 ranks | ddp |\n"
    monkeypatch.setattr(sys, "argv", ["bench.peers", "--gsm8k", str(tmp_path), "nf4", "gpu"])
    bench.main()
    nf4 = "| 2 ranks, base_shard=node, NF4 | anew |"
    assert capsys.readouterr().out == f"{bench.HEAD}\n{nf4}\n| 2 ranks | ddp |\n"
    assert json.loads((tmp_path / "rows.json").read_text()) == measured | {"nf4": [nf4]}
    monkeypatch.setattr(sys, "argv", ["bench.peers", "--gsm8k", str(tmp_path), "--again", "gpu"])
    bench.main()
    assert json.loads((tmp_path / "rows.json").read_text())["gpu"] == ["| 2 ranks, base_shard=gpu | anew |"]
