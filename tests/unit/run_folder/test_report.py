"""The page about a run: its numbers are the run's, it needs no other file, and nothing in it is taken for markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.load import dump_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, SaveError
from dist_lora.evaluation.tool_calls import Counts, ToolCalls
from dist_lora.herd.shape import module_path
from dist_lora.lora.learned import LEARNED_FILE, Learned, LearnedLinear, write_learned
from dist_lora.lora.origin import WEIGHTS_FILE
from dist_lora.run_folder.attempt import METRICS_FILE
from dist_lora.run_folder.curves import MOST_POINTS
from dist_lora.run_folder.records import read_lines
from dist_lora.run_folder.report import write_report
from dist_lora.run_folder.samples import SAMPLES_FILE, write_samples
from dist_lora.train.meter import Meter

GIB = 2**30


class Page(HTMLParser):
    """What a browser would take a page for: its tags, whatever it loads, and the rows of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.rows if len(row) == 2}


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "epoch": 0, "loss": 4.0 / step, "grad_norm": 0.5, "lr": 1e-4, "target_tokens": 10, "tokens": 100,
        "tokens_per_s": 50.0, "model_flops_per_s": 1e12, "step_s": 2.0, "peak_bytes": 3 * GIB, **more,
    }  # fmt: skip


def run_of(
    folder: Path,
    *,
    num_steps: int,
    evaluated: dict[int, float] | None = None,
    name: str = "mine",
    lora: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A run's folder, as a run leaves it before its end."""
    folder.mkdir()
    settings = {"run": name, "model": {"name": "3.1-8b"}, "lora": lora or {}, "data": {"train": "x.jsonl"}}
    config = Config.model_validate(settings)
    (folder / "config.yaml").write_text(dump_config(config))
    meter = Meter(folder, trackers=[], settings={}, every=10**6, first_step=1, num_steps=num_steps)
    for step in range(1, num_steps + 1):
        meter.step(line(step, **more))
        if step in (evaluated or {}):
            meter.evaluated(step, {"eval_loss": evaluated[step], "eval_perplexity": math.exp(evaluated[step])})
    meter.close()
    return folder


def test_the_page_has_the_tool_calls_of_the_last_evaluation_by_set_and_tool(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=2)
    earlier = ToolCalls({"<f>": Counts(9, 9)}).as_json()
    calls = ToolCalls({"<f>": Counts(3, 2, 2, 1, missing=1), "g": Counts(unwanted=1)}).as_json()
    head = ["tool calls of", "wanted", "valid", "right name", "right arguments", "missing", "unwanted"]
    tables = [
        head, ["all tools", "3", "2", "2", "1", "1", "1"], ["<f>", "3", "2", "2", "1", "1", "0"],
        ["g", "0", "0", "0", "0", "0", "1"],
    ]  # fmt: skip
    file = run / "tool_calls.jsonl"
    for counted in (calls, {"a": earlier, "b": calls}):
        lines = [{"step": 1, "tool_calls": earlier}, {"step": 2, "tool_calls": counted}]
        file.write_text(
            "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "tool_calls": {"by_tool": 1}}])
        )
        text = write_report(run).read_text()
        rows = [row for row in Page(run / "report.html").rows if len(row) == len(head)]
        assert rows[-len(tables) :] == tables and "Tool calls after step 2" in text and "<f>" not in text
        assert [name in text for name in ("<p>a</p>", "<p>b</p>")] == ["a" in counted] * 2
    file.unlink()
    assert "Tool calls" not in write_report(run).read_text()


def test_the_page_tells_the_runs_own_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=8, evaluated={4: 1.5, 6: 1.25, 8: 1.375})
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "checkpoints" / "step-00000008").mkdir()
    (run / "summary.json").write_text(
        json.dumps({"trainable": 1000, "frozen": 50_000, "steps": 8, "peak_bytes": [GIB, 2 * GIB]})
    )
    (run / "status").write_text("0 final 8 0 - done\n")
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert page.facts == {
        "model": "3.1-8b (unquantized)",
        "adapters": "rank 16, alpha 32, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "weights": "1,000 trained, 50,000 frozen (2.00%)",
        "steps": "8 of 8",
        "loss": "4.0000 at the first step, 0.5000 at the last",
        "held-out loss": "1.3750 at the last evaluation, best 1.2500 at step 6",
        "tokens": "800, 80 trained on",
        "time": "16 s in steps, 50 tokens/s median",
        "peak memory": "1.00, 2.00 GiB",
        "checkpoints": "4, 8",
    }
    assert [row for row in page.rows if len(row) == 3] == [
        ["step", "loss", "perplexity"], ["4", "1.5000", "4.4817"], ["6", "1.2500", "3.4903"], ["8", "1.3750", "3.9551"],
    ]  # fmt: skip
    assert "step 8 is saved; exit code 0: done" in page.text
    assert page.tags.count("svg") == 6  # of the seven curves one has no point: exact answers


def test_the_loss_is_drawn_as_it_was(tmp_path: Path) -> None:
    page = Page(write_report(run_of(tmp_path / "mine", num_steps=5), out=tmp_path / "page.html"))
    svg = page.text[page.text.index("<svg") : page.text.index("</svg>")]
    assert "loss per trained token" in svg  # the first plot; its texts are texts
    (drawn,) = re.findall(r'<path d="((?:[ML] [\d.]+ [\d.]+\s*){5})"[^>]*stroke: #4e79a7', svg)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", drawn)]
    ys = [y for _, y in points]
    top, bottom = ys[0], ys[-1]
    for step, (x, y) in enumerate(points, start=1):
        share = (4 / step - 4 / 5) / (4 - 4 / 5)  # of the way from the last loss to the first
        assert y == pytest.approx(bottom + share * (top - bottom), abs=0.01)
        assert x == pytest.approx(points[0][0] + (step - 1) / 4 * (points[-1][0] - points[0][0]), abs=0.01)


def test_the_page_needs_no_other_file_and_no_other_machine(tmp_path: Path) -> None:
    page = Page(write_report(run_of(tmp_path / "mine", num_steps=3, evaluated={2: 1.0})))
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"url\((?!#)|@import", page.text)


def test_names_within_the_drawings_are_theirs_alone(tmp_path: Path) -> None:
    page = Page(write_report(run_of(tmp_path / "mine", num_steps=3, evaluated={2: 1.0})))
    clips = re.findall(r'<clipPath id="([^"]+)"', page.text)
    assert len(clips) == len(set(clips)) >= 6


def test_a_report_is_the_same_bytes_again(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=3)
    assert write_report(run, out=tmp_path / "a").read_bytes() == write_report(run, out=tmp_path / "b").read_bytes()


def test_what_a_run_says_is_no_markup(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=2)
    (run / "status").write_text("1 again 1 0 - <script>alert(1)</script>\n")
    with (run / "config.yaml").open("a") as file:
        file.write("# <script>alert(2)</script>\n")
    (run / "evaluations.jsonl").write_text('{"step": 1, "<b>": 1}\n')
    page = Page(write_report(run))
    assert "script" not in page.tags and "b" not in page.tags
    assert "&lt;script&gt;alert(1)" in page.text and "&lt;script&gt;alert(2)" in page.text


def test_of_a_long_run_each_point_is_a_mean(tmp_path: Path) -> None:
    page = Page(write_report(run_of(tmp_path / "mine", num_steps=2 * MOST_POINTS + 1)))
    assert "Each point is the mean of 3 steps." in page.text


def test_numbers_that_are_none_leave_gaps(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=2, loss=math.nan)
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "loss": "much", "lr": null}\n{"step": 4, "loss": 1' + 400 * "0" + '}\n{"step": 5, "lo')
    page = Page(write_report(run))
    assert page.facts["steps"] == "4" and page.facts["loss"] == "nan at the first step, nan at the last"
    assert "loss per trained token" not in page.text  # it has no point


def test_a_run_that_is_not_there_or_has_no_step_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: no such folder; expected a run's folder, as runs/NAME"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: is a folder without config.yaml; expected a run's folder"):
        write_report(tmp_path / "empty")
    run = run_of(tmp_path / "mine", num_steps=0)
    with pytest.raises(ConfigError, match=r"mine: metrics.jsonl has no step yet"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/page.html: can't be written: .*Name another file with --out"):
        write_report(run, out=tmp_path / "file" / "page.html")


def test_the_command_prints_the_pages_name_and_imports_no_torch(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=1)
    program = "import sys\nfrom dist_lora.cli import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(run)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr


def test_several_runs_lie_side_by_side(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one", num_steps=4, evaluated={2: 1.5, 4: 1.25}, name="one")
    two = run_of(tmp_path / "two", num_steps=8, name="two", lora={"rank": 4})
    path = write_report([one, two])
    page = Page(path)
    assert path == tmp_path / "comparison.html"
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    assert rows["steps"] == ["4", "8"]
    assert rows["loss"] == [
        "4.0000 at the first step, 1.0000 at the last",
        "4.0000 at the first step, 0.5000 at the last",
    ]
    assert rows["held-out loss"] == ["1.2500 at the last evaluation, best 1.2500 at step 4", ""]
    assert rows["lora.rank"] == ["16", "4"] and "run" not in rows and "optim.lr" not in rows
    svg = page.text[page.text.index("<svg") : page.text.index("</svg>")]
    assert ">one<" in svg and ">two<" in svg and ">one, held out<" in svg and ">two, held out<" not in svg


def test_runs_of_one_name_are_named_by_their_folders(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / name, num_steps=2) for name in ("a", "b")]
    page = Page(write_report(folders))
    assert ["", str(folders[0]), str(folders[1])] in page.rows


def test_the_answers_of_the_first_and_the_last_evaluation_are_shown(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=4)
    for step, generated in ((0, "<b>"), (2, "no"), (4, "yes")):
        write_samples(run, step=step, answers=[{"prompt": "p", "expected": "yes", "generated": generated}])
    odd = {"prompt": "q\u2028r", "expected": "s\u0085", "generated": "t\u2029"}  # in Python these end a line
    write_samples(run, step=4, answers=[{"prompt": "p", "expected": "yes", "generated": "yes"}, odd])
    assert [line["prompt"] for line in read_lines(run / SAMPLES_FILE)] == ["p", "p", "p", "q\u2028r"]
    page = Page(write_report(run))
    assert ["prompt", "expected", "before training", "after step 4"] in page.rows
    assert ["p", "yes", "<b>", "yes"] in page.rows
    write_samples(run, step=2, answers=[{"prompt": "p", "expected": "yes", "generated": "again"}])  # resumed before it
    assert ["p", "yes", "<b>", "again"] in Page(write_report(run)).rows
    assert [line["generated"] for line in read_lines(run / SAMPLES_FILE)] == ["<b>", "again"]


# What was learned

LOWEST, HIGHEST, GREY = "#440154", "#fde725", "#e8e8e8"  # the ends of the colour map, and what lies under it


def learn(run: Path, *linears: tuple[str, int, tuple[float, ...]], weight_norm: float | None = 10.0) -> Path:
    """The adapter's folder of a run with a record of these linears: projection, layer, singular values."""
    adapter = run / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / WEIGHTS_FILE).touch()
    of_all = [LearnedLinear(module_path(name, layer=layer), values, weight_norm) for name, layer, values in linears]
    write_learned(adapter, Learned(tuple(of_all)), weights=None)
    return run


def drawings(page: Page) -> dict[str, str]:
    """The drawings on a page by what a screen reader says of them."""
    return {
        re.search(r'aria-label="([^"]*)"', svg)[1]: svg  # type: ignore[index]
        for svg in re.findall(r"<svg .*?</svg>", page.text, flags=re.DOTALL)
    }


def cells_of(svg: str) -> list[str]:
    """The colours of a heat map's cells, row after row; the scale beside it has other edges."""
    return re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: (#\w{6}); stroke: #ffffff', svg)


def test_what_was_learned_is_told_in_words_numbers_and_drawings(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=2)
    learn(run, ("q_proj", 0, (3.0, 4.0)), ("q_proj", 3, (0.5, 0.0)), ("down_proj", 1, (1.0, 1.0)))
    page = Page(write_report(run))
    assert "dW is 5% to 50% of W by norm, most in layer 0 q_proj, layer 1 down_proj, layer 3 q_proj." in page.text
    assert "In half of the 3 linears, 2 or fewer of 2 directions hold 90% of dW" in page.text
    assert ["q_proj", "2", "2", "27.5%", "50%", "0", "1.49", "1.5"] in page.rows
    drawn = [name for name in drawings(page) if "dW" in name]
    assert drawn == [
        "norm of dW by layer, % of W and projection, 5 to 50",
        "effective rank of dW by layer and projection, 1 to 2",
        "singular values of dW, the largest as 1: medians and range",
    ]
    # Only the three linears have cells, in their colours; what lies under all others is grey.
    size, rank, values = (drawings(page)[name] for name in drawn)
    assert (cells_of(size)[0], cells_of(size)[1]) == (HIGHEST, LOWEST) and len(cells_of(size)) == 3
    assert cells_of(rank)[1:] == [LOWEST, HIGHEST] and GREY in size
    assert ">q_proj<" in values and ">down_proj<" in values and ">up_proj<" not in values
    assert "image" not in page.tags
    ids = re.findall(r' id="(m\w{10}|p\w{10})"', page.text)
    assert len(ids) == len(set(ids)) > 3


def test_an_untrained_linear_is_zero_and_not_blank(tmp_path: Path) -> None:
    run = learn(run_of(tmp_path / "mine", num_steps=2), ("q_proj", 0, (0.0, 0.0)), ("v_proj", 0, (1.0, 0.0)))
    page = Page(write_report(run))
    assert "dW is zero in 1 of 2 linears." in page.text and "dW is 10% of W by norm" in page.text
    size = drawings(page)["norm of dW by layer, % of W and projection, 0 to 10"]
    assert cells_of(size) == [LOWEST, HIGHEST]
    all_zero = learn(tmp_path / "mine", ("q_proj", 0, (0.0, 0.0)))
    assert "Nothing is learned: dW is zero in all 1 linear." in Page(write_report(all_zero)).text


def test_several_runs_have_the_same_scales(tmp_path: Path) -> None:
    one = learn(run_of(tmp_path / "one", num_steps=2, name="one"), ("q_proj", 0, (1.0,)), ("q_proj", 1, (2.0,)))
    two = learn(run_of(tmp_path / "two", num_steps=2, name="two"), ("q_proj", 0, (2.0,)), ("q_proj", 1, (3.0,)))
    maps = [svg for name, svg in drawings(Page(write_report([one, two]))).items() if name.startswith("norm of dW")]
    low, middle, same, high = cells_of(maps[0]) + cells_of(maps[1])
    assert (low, high) == (LOWEST, HIGHEST) and middle == same not in (low, high)
    assert all(re.findall(r">(\d+)<", svg)[-5:] == ["10", "15", "20", "25", "30"] for svg in maps)


def test_what_is_not_known_of_the_adapter_is_said_with_the_command_that_computes_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "mine", num_steps=2)
    assert "The run has not written its adapter yet." in Page(write_report(run)).text
    learn(run, ("q_proj", 0, (1.0,)), weight_norm=None)
    page = Page(write_report(run))
    assert f"those of W are not recorded. This adds them: dist-lora learned {run}" in page.text
    assert "The norm of dW is 1, most in layer 0 q_proj." in page.text
    (run / "adapter" / LEARNED_FILE).write_text("{}")
    assert "learned.json is damaged: format: Field required" in Page(write_report(run)).text
    (run / "adapter" / LEARNED_FILE).unlink()
    told = "Nothing was recorded when the adapter was written. This computes it: dist-lora learned"
    assert f"{told} {run}" in Page(write_report(run)).text


def test_a_report_of_what_was_learned_imports_no_torch_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    run = learn(run_of(tmp_path / "mine", num_steps=1), ("q_proj", 0, (1.0, 0.5)))
    program = "import sys\nfrom dist_lora.cli import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", program, "report", str(run)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").read_bytes() == write_report(run, out=tmp_path / "again").read_bytes()
