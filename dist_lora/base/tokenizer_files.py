"""The files of a model's tokenizer: which they are, what they hash to, and a copy of them with a run's chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import xxhash

from dist_lora.base.index import read_model_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_FILE = "chat_template.jinja"  # transformers prefers it to the template in tokenizer_config.json
_TEMPLATES = (TEMPLATE_FILE, "chat_template.json", "additional_chat_templates/*.jinja")


def hash_tokenizer_files(folder: Path) -> str:
    """``xxh3_128:<hex>`` over the tokenizer's files, without chat templates in files of their own."""
    digest = xxhash.xxh3_128()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"xxh3_128:{digest.hexdigest()}"


def copy_tokenizer(folder: Path, out: Path, *, chat_template: str | None) -> None:
    """Copy the tokenizer's files from ``folder`` to ``out``, which transformers then loads with ``chat_template``.

    Args:
        chat_template: the template's text; None copies the templates of ``folder``.

    Raises:
        OSError: a file can't be read or written.
        WeightsError: tokenizer_config.json is damaged.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    if chat_template is None:
        for path in [path for pattern in _TEMPLATES for path in sorted(folder.glob(pattern))]:
            target = out / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    else:
        set_template(out, chat_template)


def set_template(folder: Path, chat_template: str) -> None:
    """Make ``chat_template`` the one template of the tokenizer in ``folder``."""
    for path in [path for pattern in _TEMPLATES for path in folder.glob(pattern)]:
        path.unlink()
    config = folder / "tokenizer_config.json"
    if config.exists():
        settings = read_model_json(config)
        if settings.pop("chat_template", None) is not None:
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8", newline="")
