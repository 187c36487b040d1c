"""A model of the hub as a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from dist_lora.errors import ConfigError

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
UNWANTED = ("original/*",)  # the same weights in Meta's own format


def fetch_model(hub_id: str) -> Path:
    """The folder of a model in the hub's cache: fetched, brought up to date, or as it lies there without a network.

    Call it on one process of each node: the hub refuses to answer hundreds at once.

    Raises:
        ConfigError: it is gated or not there for this user, or neither the hub nor a whole copy can be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except Exception as error:  # the hub's own kinds, those of the HTTP library beneath it, and the disk's
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            what = (
                "the hub has no such model that you may see. Check the name; if it is private, log in with "
                "`hf auth login` or set HF_TOKEN, on every node."
            )
        elif _status(error) in (401, 403):
            what = (
                f"gated: the hub gives it only to those who have access ({_said(error)}). Ask for it on "
                f"https://huggingface.co/{hub_id} (accept the licence), then log in with `hf auth login` or set "
                "HF_TOKEN, on every node; the token must be allowed to read gated models."
            )
        else:
            what = (
                f"not whole in the local cache, and can't be fetched ({_said(error)}). Download it on a machine with a "
                "network and give the folder as model.name."
            )
        raise ConfigError(f"model.name: {hub_id}: {what}") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, if the hub answered at all: the library wraps one error in another."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _said(error: BaseException) -> str:
    """The hub's own words in one line."""
    words = getattr(error, "server_message", None) or str(error)
    return " ".join(words.split()) or type(error).__name__
