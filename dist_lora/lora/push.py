"""A folder of an adapter or a model on the Hugging Face hub: in one commit, without the paths of this machine. No torch.

An adapter's folder names the base by its folder here where it isn't of the hub, so that ``dist-lora merge`` finds it again.
In what is uploaded the base has its name alone; the folder itself stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_lora.base.hub import hub_message, status_of
from dist_lora.errors import ConfigError, SaveError
from dist_lora.files import file_exists
from dist_lora.herd.models import member_of
from dist_lora.lora.card import licence_remark
from dist_lora.lora.origin import CONFIG_FILE, ORIGIN_FILE, own_checksum, read_adapter_json
from dist_lora.lora.run_facts import public_name

log = logging.getLogger("dist_lora")

# What the hub takes for a name (validate_repo_id of huggingface_hub 1.0 to 2.4), which is asked for in full here.
_REPOSITORY = re.compile(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?(?<!\.git)")
_MAX_NAME = 96
# Where transformers 4 wrote the folder that a model or a tokenizer was loaded from.
_NAMES_OF_PATHS = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}


def check_push(repository: str | None, *, is_public: bool) -> None:
    """Check what can be checked before the work is done: the name, and that the hub knows the token's owner.

    Raises:
        ConfigError: it can't be pushed; says why and what to do.
    """
    if repository is None:
        if is_public:
            raise ConfigError("--public: it is about --push: name the repository with --push ORG/NAME")
        return
    from huggingface_hub import HfApi, constants, get_token

    if not _REPOSITORY.fullmatch(repository) or len(repository) > _MAX_NAME or "--" in repository or ".." in repository:
        raise ConfigError(f"--push: found {repository[:200]!r}, expected ORG/NAME, like my-team/llama-3.1-8b-tools")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE is set, so the hub isn't asked. Unset it, or leave --push out")
    if get_token() is None:
        raise ConfigError(f"--push: no token of the hub is here. {_LOG_IN}")
    try:
        HfApi().whoami()
    except Exception as error:
        raise _refusal(repository, error, kept="") from error


def push(folder: Path, *, repository: str, is_public: bool, again: str) -> str:
    """Upload a folder's files in one commit, and return the address of the repository, which is made if there is none.

    Args:
        is_public: of a repository that is made here; one that exists stays as it is, and a public one is refused without it.
        again: how to do it again, for errors: the folder stays in any case.

    Raises:
        ConfigError: no right to write, no network, or the repository is public and ``is_public`` isn't set.
        SaveError: the hub failed otherwise.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, kept = HfApi(), f" {folder} is complete; {again}"
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True)
        if not is_public and not api.repo_info(repository).private:
            raise ConfigError(
                f"--push: {repository} exists and is public: add --public, or name another one. {folder} is complete"
            )
        operations = [CommitOperationAdd(name, content) for name, content in _published(folder)]
        api.create_commit(repository, operations, commit_message="Upload by dist_lora")
    except ConfigError:
        raise
    except Exception as error:  # the hub's own errors, the HTTP library's and the disk's
        raise _refusal(repository, error, kept=kept) from error
    if remark := licence_remark(member_of(_base_of(folder)), repository):
        log.warning(remark)
    return f"{api.endpoint}/{repository}"


def _published(folder: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Names in the repository and contents: a file, or bytes in place of one that holds paths of this machine."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == CONFIG_FILE:
            yield name, _without_paths(read_adapter_json(file), "base_model_name_or_path")
        elif name == ORIGIN_FILE:
            yield name, _origin_without_paths(read_adapter_json(file))
        elif name in _NAMES_OF_PATHS and os.path.isabs(
            (content := read_adapter_json(file)).get(_NAMES_OF_PATHS[name]) or ""
        ):
            yield name, _without_paths(content, _NAMES_OF_PATHS[name])
        else:
            yield name, file


def _without_paths(content: dict[str, Any], key: str) -> bytes:
    value = content.get(key)
    changed = content | {key: public_name(value)} if isinstance(value, str) else content
    return (json.dumps(changed, indent=2, sort_keys=True) + "\n").encode()


def _origin_without_paths(content: dict[str, Any]) -> bytes:
    """``dist_lora.json`` without the base's folder: it is then found by the base's name, or by --base."""
    run = content.get("run")
    if not isinstance(run, dict) or not os.path.isabs(run.get("model") or ""):
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    changed = {key: value for key, value in content.items() if key != "checksum"} | {"run": run | {"model": None}}
    return (json.dumps(changed | {"checksum": own_checksum(changed)}, indent=2, sort_keys=True) + "\n").encode()


def _base_of(folder: Path) -> str | None:
    """The base's hub id, by an adapter's files or the metadata of a merged model's card."""
    from huggingface_hub import ModelCard

    if file_exists(folder / CONFIG_FILE):
        named = read_adapter_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    else:
        named = ModelCard.load(folder / "README.md").data.base_model
    return named if isinstance(named, str) else None


def _refusal(repository: str, error: Exception, *, kept: str) -> ConfigError | SaveError:
    """The error in one sentence, by what the hub answered, if it did."""
    status, said = status_of(error), hub_message(error).rstrip(".")
    if status == 401:
        return ConfigError(f"--push: the hub doesn't know this token ({said}). {_LOG_IN}{kept}")
    if status in (403, 404):
        return ConfigError(
            f"--push: this token may not write to {repository} ({said}). Take one with write access to {repository.partition('/')[0]}, "
            f"or another name.{kept}"
        )
    if status is None and not isinstance(error, FileNotFoundError | PermissionError | ValueError):
        return ConfigError(f"--push: the hub can't be reached ({said}).{kept}")
    return SaveError(f"--push: {repository} can't be pushed ({said}).{kept}")


_LOG_IN = (
    "Set HF_TOKEN to one with write access (https://huggingface.co/settings/tokens), or log in with `hf auth login`."
)
