"""The pages about runs in a real browser, on a phone and on a screen: what a reader sees, and what the page asks for."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.load import dump_config
from dist_lora.config.schema import LINEARS, Config
from dist_lora.evaluation.tool_calls import Counts, ToolCalls
from dist_lora.herd.shape import module_path
from dist_lora.lora.learned import Learned, LearnedLinear, write_learned
from dist_lora.lora.origin import WEIGHTS_FILE
from dist_lora.run_folder.report import write_report
from dist_lora.run_folder.samples import write_samples
from dist_lora.train.meter import Meter

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTHS = (390, 1280)  # pixels
IS_REQUIRED = "TESTS_REQUIRE_BROWSER"  # set by .ci/run, which installs one


def executable() -> str | None:
    """Chromium, as Debian, Fedora and Google name it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser that this machine has; none is downloaded."""
    path = executable()
    if path is None:
        assert not os.environ.get(IS_REQUIRED), "no chromium on the PATH"
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def run_of(folder: Path, *, num_steps: int = 40, rank: int = 16) -> Path:
    """A run's folder with all that a page can show: long names, many evaluations, a loss that isn't a number."""
    folder.mkdir(parents=True)
    settings = {
        "run": folder.name,
        "model": {"name": "/a/folder/whose-name-is-longer-than-a-line-on-a-phone/3.1-70b-instruct", "quant": "nf4"},
        "lora": {"rank": rank},
        "data": {"train": "data/" + "x" * 120 + ".jsonl", "eval": 0.05},
    }
    (folder / "config.yaml").write_text(dump_config(Config.model_validate(settings)))
    meter = Meter(folder, trackers=[], settings={}, every=10**6, first_step=1, num_steps=num_steps)
    for step in range(1, num_steps + 1):
        loss = math.nan if step == 7 else 4.0 / step
        meter.step(
            {
                "step": step, "epoch": 0, "loss": loss, "grad_norm": 0.5, "lr": 1e-4, "target_tokens": 10, "tokens": 100,
                "tokens_per_s": 50.0, "model_flops_per_s": 1e12, "step_s": 2.0, "peak_bytes": 2**30,
            }
        )  # fmt: skip
        if step % 4 == 0:
            values = {"eval_loss": 5.0 / step, "eval_perplexity": 2.0, "eval_exact_match": step / 40}
            calls = ToolCalls(
                {"get_weather" + "_of_a_place" * 9: Counts(4, 3, 2, 1, 1), "g": Counts(unwanted=1)}, answers=5
            )
            meter.evaluated(step, values, tool_calls=calls.as_json())
    meter.close()
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / WEIGHTS_FILE).touch()
    linears = [
        LearnedLinear(module_path(name, layer=layer), tuple(1 / (1 + at) for at in range(rank)), 10.0 + layer)
        for layer in range(80)
        for name in LINEARS
        if name != "o_proj"
    ]
    write_learned(adapter, Learned(tuple(linears)), weights=None)
    for step in (0, num_steps):
        answer = {"prompt": "A question? " * 40, "expected": "x" * 200, "generated": f"<img src=http://x/{step}>"}
        write_samples(folder, step=step, answers=[answer, answer | {"prompt": "Another"}])
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of page."""
    runs = tmp_path_factory.mktemp("runs")
    one = run_of(runs / "a-run-whose-name-is-longer-than-a-line-on-a-phone-of-390-pixels")
    others = [run_of(runs / f"r{rank}", rank=rank) for rank in (1, 4, 8)]
    return {"one run": write_report(one), "several runs": write_report([one, *others])}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["one run", "several runs"])
def test_a_page_is_whole_readable_and_asks_for_nothing(
    browser: Any, pages: dict[str, Path], kind: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 844})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[kind].as_uri())
    assert said == []
    assert asked == [pages[kind].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.locator("svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    num_runs = 4 if kind == "several runs" else 1
    assert len(drawn) == 7 + 3 * num_runs and all(200 < one <= width for one in drawn), drawn
    found = Axe().run(page).response["violations"]  # contrast, alternative texts, headings, scrolling by keyboard, ...
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found] == [], json.dumps(found)[:4000]
    page.close()
