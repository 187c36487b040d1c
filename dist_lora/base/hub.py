"""A model of the Hugging Face hub as a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_lora.errors import ConfigError, DistLoraError
from dist_lora.herd.shape import read_shape

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
UNWANTED = ("original/*",)  # the same weights in Meta's own format


def fetch_model(hub_id: str, *, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a model in the hub's cache: downloaded, updated, or, without a network, as it is.

    Call it on one process of each node: the hub refuses hundreds of requests at once. Its config.json comes first, so that a
    model that is no Llama is refused without its weights.

    Args:
        revision: the commit to take; None for the newest.
        wanted: patterns of the files to fetch.

    Raises:
        ConfigError: it is gated or doesn't exist for this user, there is neither a network nor a complete copy, or it is no Llama.
        WeightsError: its config.json is damaged.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        _refuse_foreign(hub_id, revision=revision)
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED))
        )
    except DistLoraError:
        raise
    except Exception as error:  # the hub's own errors, the HTTP library's and the disk's
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            reason = (
                "the hub has no such model, or you have no access to it. Check the name; if it is private, log in with "
                "`hf auth login` or set HF_TOKEN, on every node."
            )
        elif status_of(error) in (401, 403):
            reason = (
                f"gated: you need access to download it ({hub_message(error)}). Request it on "
                f"https://huggingface.co/{hub_id} (accept the licence), then log in with `hf auth login` or set "
                "HF_TOKEN, on every node; the token must be allowed to read gated models."
            )
        else:
            reason = (
                f"incomplete in the local cache, and can't be downloaded ({hub_message(error)}). Download it on a "
                "machine with a network, and set model.name to the folder."
            )
        commit = "" if revision is None else f" (revision {revision})"
        raise ConfigError(f"model.name: {hub_id}{commit}: {reason}") from error


def _refuse_foreign(hub_id: str, *, revision: str | None) -> None:
    """Fetch the config.json of a model of which there is nothing yet, and raise if it is no Llama's."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if try_to_load_from_cache(hub_id, "config.json", revision=revision) is not None:
        return
    try:
        path = hf_hub_download(hub_id, "config.json", revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:  # it has none: told when all is there
        return
    read_shape(Path(path).parent)


def cached_model(hub_id: str, *, revision: str | None = None) -> Path | None:
    """The folder of a model in the hub's cache, as far as it has been downloaded; None if it isn't there. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(WANTED), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def missing_bytes(hub_id: str) -> tuple[int, Path]:
    """Bytes of a model's files that ``fetch_model`` would download now, and the hub's cache, where they would go.

    Zero where the hub can't be asked: ``fetch_model`` then says why, or does with what is there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        files = snapshot_download(hub_id, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), dry_run=True)
    except Exception:
        return 0, Path(HF_HUB_CACHE)
    return sum(file.file_size or 0 for file in files if file.will_download), Path(HF_HUB_CACHE)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if the hub answered at all: the library chains its errors."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def hub_message(error: BaseException) -> str:
    """The hub's own message in one line."""
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(message.split()) or type(error).__name__
