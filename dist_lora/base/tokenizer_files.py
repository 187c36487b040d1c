"""The files of a model's tokenizer: which they are, what they hash to, and a copy of them with a run's chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import xxhash

from dist_lora.base.index import read_model_json
from dist_lora.errors import WeightsError

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
WITHOUT_WEIGHTS = ("config.json", *TOKENIZER_FILES, *_TEMPLATES)
"""Patterns of a model's files that its data depend on."""


def hash_tokenizer_files(folder: Path) -> str:
    """``xxh3_128:<hex>`` over the tokenizer's files, without chat templates in files of their own."""
    digest = xxhash.xxh3_128()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists():
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"xxh3_128:{digest.hexdigest()}"


def hash_vocabulary(folder: Path) -> str | None:
    """``xxh3_128:<hex>`` over what gives a token its id: vocabulary, added tokens, and the tokens that begin and end a text.

    Equal for files that differ in their writing, in the chat template or in the padding token. None where there is no
    ``tokenizer.json`` to read it from.

    Raises:
        OSError, WeightsError: a file can't be read, or is damaged.
    """
    if not (folder / "tokenizer.json").exists():
        return None
    content = read_model_json(folder / "tokenizer.json")
    file = folder / "tokenizer_config.json"
    settings = read_model_json(file) if file.exists() else {}
    try:
        vocabulary = content["model"]["vocab"]
        pairs = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
        )
        ids = dict(pairs) | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        ends = [_content_of(settings.get(name)) for name in ("bos_token", "eos_token")]
        text = json.dumps([sorted(ids.items()), ends])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsError(
            f"{folder / 'tokenizer.json'} is damaged: {type(error).__name__}: {error}. Copy it again."
        ) from error
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def _content_of(token: object) -> object:
    """A special token's text; tokenizer_config.json has it alone, or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


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
