"""What quantizing the base costs in quality: the quickstart's task trained on each base, as a table.

bash launch/quickstart.sh    # first: makes the model and the data
python -m bench.quality      # about 5 minutes per base on 2 cores
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_lora.config.load import load_config

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
BASES = ("none", "nf4", "int8")


def measure(base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of ``dist-lora eval`` on a base, before and after training on it."""
    settings = [f"run=quality-{base}", f"model.quant={base}", "log.trackers=[]"]
    folder = ROOT / "runs" / f"quality-{base}"
    shutil.rmtree(folder, ignore_errors=True)
    _dist_lora("train", *settings)
    before = json.loads(_dist_lora("eval", *settings, "--json"))
    after = json.loads(_dist_lora("eval", *settings, "--adapter", str(folder / "adapter"), "--json"))
    return before, after


def _dist_lora(command: str, *arguments: str) -> str:
    line = [sys.executable, "-m", "dist_lora", command, str(CONFIG.relative_to(ROOT)), "--nproc", "2", *arguments]
    return subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """The command: see the top of this file."""
    load_config(CONFIG)
    print("| base | held-out loss before | after | answered exactly |\n|---|---|---|---|", flush=True)
    for base in BASES:
        before, after = measure(base)
        match = after["exact_match"]
        print(
            f"| {base} | {before['loss']:.4f} | {after['loss']:.4f} | {match['correct']} of {match['total']} |",
            flush=True,
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
