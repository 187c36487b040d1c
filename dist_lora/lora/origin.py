"""The base that an adapter belongs to, from its ``dist_lora.json`` or from PEFT's own config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter

from dist_lora.base.index import hash_config, open_index, read_model_json
from dist_lora.base.model_folder import QUANTIZED_FROM_FILE
from dist_lora.base.tokenizer_files import TEMPLATE_FILE, hash_vocabulary
from dist_lora.config.guard import GuardVersion
from dist_lora.config.schema import Quant
from dist_lora.errors import AdapterError, WeightsError
from dist_lora.files import file_exists, read_json
from dist_lora.lora.run_facts import RunFacts, validated

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "dist_lora.json"
FORMAT = 1

_MAX_JSON_BYTES = 2**24


@dataclass(frozen=True)
class BaseIdentity:
    """The model that an adapter was trained on; what is unknown is None.

    ``name`` is a member's name, a hub id or a folder's last component; the hashes are those of
    ``WeightIndex.content_hash`` and ``hash_config``.
    """

    name: str | None
    revision: str | None = None
    content_hash: str | None = None
    config_hash: str | None = None

    def differences(self, here: BaseIdentity) -> list[str]:
        """How ``here`` differs from this model, hash by hash; a hash that this one lacks is not compared."""
        pairs = (
            ("weights", self.content_hash, here.content_hash),
            ("config.json", self.config_hash, here.config_hash),
        )
        return [f"{what} {own}, here {other}" for what, own, other in pairs if own not in (None, other)]


def identify_base(folder: Path, *, name: str | None = None, revision: str | None = None) -> BaseIdentity:
    """The identity of the base in ``folder``, with both hashes; that of the original if ``quantize`` wrote the folder.

    Local, reads headers and a few bytes of each tensor; call it on one rank.

    Args:
        name: a member's name or hub id. Without it: the hub id that config.json's ``_name_or_path`` gives,
            or the folder's last component.

    Raises:
        WeightsError: the folder is damaged.
    """
    if (original := original_of(folder)) is not None:
        return original
    config_hash = hash_config(folder)
    if name is None:
        recorded = read_model_json(folder / "config.json").get("_name_or_path")
        is_hub_id = isinstance(recorded, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", recorded)
        name = recorded if is_hub_id else folder.resolve().name
    return BaseIdentity(name, revision, open_index(folder, allow_bytes=True).content_hash(), config_hash)


def original_of(folder: Path) -> BaseIdentity | None:
    """The identity of the model of which ``folder`` is a copy in the values that training gives it, by ``quantize``.

    None where the folder is no such copy. Local, reads headers and a few bytes of each tensor.

    Raises:
        WeightsError: the record is damaged, or the weights are not those that it was written with.
    """
    file = folder / QUANTIZED_FROM_FILE
    if not file_exists(file):
        return None
    record = read_model_json(file)
    base, own = record.get("base"), record.get("content_hash")
    if record.get("format") != FORMAT or not isinstance(base, dict):
        raise WeightsError(
            f"{file} has format {record.get('format')!r}, and format {FORMAT} with a base was expected. Update dist-lora."
        )
    here = open_index(folder, allow_bytes=True).content_hash()
    if own != here:
        raise WeightsError(
            f"{file} was written with other weights ({own}) than those beside it ({here}). Quantize the model again, or "
            "remove that file if the folder is meant to be a model of its own."
        )
    return _identity(base, where=f"{file}: base")


def own_checksum(content: Mapping[str, Any]) -> str:
    """The checksum that ``dist_lora.json`` holds of its own content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"


def read_origin(folder: Path, config: Mapping[str, Any], *, checksum: str | None) -> BaseIdentity:
    """The identity of the base. ``checksum`` is that of the weights, which our writer records in this file too."""
    file = folder / ORIGIN_FILE
    if not file_exists(file):
        return _identity(
            {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
            where=f"{folder / CONFIG_FILE}: base_model_name_or_path and revision",
        )
    origin = read_adapter_json(file)
    base, own = origin.get("base"), origin.pop("checksum", None)
    if origin.get("format") != FORMAT or not isinstance(base, dict):
        raise AdapterError(
            f"{file} has format {origin.get('format')!r}, and format {FORMAT} is supported. Update dist-lora."
        )
    if own is not None and own != own_checksum(origin):
        raise AdapterError(f"{file} doesn't match its own checksum: it is damaged, or was edited by hand.")
    if checksum is not None and origin.get("weights") not in (None, checksum):
        raise AdapterError(
            f"{file} was written with other weights ({origin.get('weights')}) than those of {WEIGHTS_FILE} "
            f"({checksum}): the files are from two adapters. Copy both from the same one."
        )
    return _identity(base, where=f"{file}: base")


def _identity(recorded: Mapping[str, Any], *, where: str) -> BaseIdentity:
    values = [recorded.get(field.name) for field in fields(BaseIdentity)]
    if not all(value is None or isinstance(value, str) for value in values):
        raise AdapterError(f"{where}: found {values!r}, expected strings or null. The file is damaged.")
    return BaseIdentity(*values)


def read_adapter_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of an adapter's folder.

    Raises:
        AdapterError: the file can't be read, or holds no JSON object.
    """
    try:
        return read_json(file, max_bytes=_MAX_JSON_BYTES)
    except OSError as error:
        raise AdapterError(
            f"{file} can't be read: {error.strerror or error}. An adapter folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} was expected."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{file} is damaged: {error}.") from error


@dataclass(frozen=True)
class RunOrigin:
    """What an adapter's run had decided: recorded in the adapter's folder, so that it is answered as it was trained.

    Empty for an adapter of PEFT, or of a version that didn't record it.

    Args:
        model: the base's absolute folder, or its hub id with ``revision``.
        quant: ``model.quant``.
        kinds: how prompts were written: by the chat template ("chat"), as Stanford Alpaca's text ("instruction"), as they are.
        chat_template: the template's text; None where the tokenizer had none, or several.
        tokenizer: ``hash_tokenizer_files`` of the base's tokenizer.
        vocabulary: ``hash_vocabulary`` of it.
        guard_version, guard_categories: how a Guard was asked: by whose prompt, and (name, description) of each category.
    """

    model: str | None = None
    revision: str | None = None
    quant: Quant | None = None
    kinds: tuple[str, ...] = ()
    chat_template: str | None = None
    tokenizer: str | None = None
    vocabulary: str | None = None
    guard_version: GuardVersion | None = None
    guard_categories: tuple[tuple[str, str], ...] = ()

    def other_vocabulary(self, base: Path) -> str:
        """How the tokenizer of the model in ``base`` gives other ids than the run's; "" if it doesn't, or one is unknown.

        Raises:
            OSError, WeightsError: its files can't be read, or are damaged.
        """
        here = hash_vocabulary(base) if self.vocabulary is not None else None
        if here in (None, self.vocabulary):
            return ""
        return (
            f"with another tokenizer ({self.vocabulary}) than that of {base} ({here}): its vocabulary, added tokens, bos_token "
            "or eos_token differ"
        )

    @staticmethod
    def of_json(recorded: object, *, where: str) -> RunOrigin:
        """The origin that a file recorded; an empty one for None.

        Raises:
            AdapterError: the file is damaged.
        """
        if recorded is None:
            return RunOrigin()
        if not isinstance(recorded, Mapping) or "kinds" not in recorded:
            raise AdapterError(
                f"{where}: found {recorded!r}, expected kinds and what else a run records. The file is damaged."
            )
        return validated(_ORIGIN, recorded, where=where)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; without what only a Guard has, for other adapters."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if not self.guard_categories:
            del found["guard_version"], found["guard_categories"]
        return found


_ORIGIN = TypeAdapter(RunOrigin)


def origin_of(adapter: Path) -> RunOrigin:
    """The origin that an adapter's own ``dist_lora.json`` records; no file beside its folder is read.

    Raises:
        AdapterError: that file is damaged.
    """
    file = adapter / ORIGIN_FILE
    if not file_exists(file):
        return RunOrigin(chat_template=_own_template(adapter))
    return RunOrigin.of_json(_checked_origin(file).get("run"), where=f"{file}: run")


def facts_of(adapter: Path) -> RunFacts:
    """What an adapter's own ``dist_lora.json`` tells of its training; empty where there is none, or of an older version.

    Raises:
        AdapterError: that file is damaged.
    """
    file = adapter / ORIGIN_FILE
    recorded = _checked_origin(file).get("training") if file_exists(file) else None
    return RunFacts.of_json(recorded, where=f"{file}: training")


def _checked_origin(file: Path) -> dict[str, Any]:
    """The content of a ``dist_lora.json`` without its checksum, which it matches."""
    origin = read_adapter_json(file)
    own = origin.pop("checksum", None)
    if own is not None and own != own_checksum(origin):
        raise AdapterError(f"{file} doesn't match its own checksum: it is damaged, or was edited by hand.")
    return origin


def _own_template(adapter: Path) -> str | None:
    """The chat template that another trainer saved in the adapter's folder: TRL does so with the tokenizer."""
    file = adapter / TEMPLATE_FILE
    try:
        if file_exists(file):
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} can't be read: {error}. Copy it again, or remove it.") from error
    file = adapter / "tokenizer_config.json"  # where transformers had it until 4.51
    template = read_adapter_json(file).get("chat_template") if file_exists(file) else None
    if isinstance(template, list):
        named = [one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0] if named else None
    return template if isinstance(template, str) else None
